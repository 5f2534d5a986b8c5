"""Flags of the group overfit."""

from dataclasses import dataclass
from typing import Optional


@dataclass(frozen=True)
class OverfitFlags:
    overfit_target: float = 0.1
    """Training loss that counts as learned by recipes/overfit.py: cross-entropy in nats, mean over one pass."""
    overfit_steps: int = 200
    """Optimizer steps after which recipes/overfit.py gives up; --max-steps may lower it."""
    overfit_stage: Optional[str] = None
    """Stage whose open layers and learning rates recipes/overfit.py takes: its name, or its number from 1. Default:
    the last, and with --replay the one that the file names."""
    replay: Optional[str] = None
    """File faults/step-*.json of an earlier run: recipes/overfit.py takes exactly the images listed there."""
