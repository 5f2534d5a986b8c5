"""Flags of the group averages."""

from dataclasses import dataclass
from typing import Optional


@dataclass(frozen=True)
class AveragesFlags:
    swa_epochs: int = 0
    """Average the weights at the ends of this many last epochs, or of the sgdr cycles within them (SWA, Izmailov et al.
    2018). Evaluated as eval_swa/..., with running statistics of their own; 0 = off."""
    swa_lr: Optional[float] = None
    """Constant learning rate of those epochs, fraction of the peak, for example 0.5; the schedule then ends before
    them. Default: the schedule goes on."""
    snapshots: bool = False
    """Keep the weights of every sgdr cycle's end in snapshots/NN and judge them at the end: each, as an ensemble, and
    averaged (Huang et al. 2017)."""
