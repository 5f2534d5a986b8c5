"""Flags of the group stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class StageFlags:
    freeze_epochs: int = 3
    """Epochs in which only the head is open, before --epochs. 0 = none."""
    freeze_lr: float = 1e-3
    """Peak learning rate of the head while all else is closed."""
    cache_features: bool = False
    """Compute the input of the head once per image and fit the head on that: head-only epochs cost almost nothing,
    and augmentation is off in them."""
    epochs: int = 10
    """Epochs after --freeze-epochs. 0 = head only."""
    unfreeze: Literal["all", "gradual", "norms", "norms-biases"] = "all"
    """Open everything at once, or from the top in four equal parts; or, beside the head, normalisation layers alone, or
    these and all biases (Ben Zaken et al. 2022)."""
    batch_norm: Literal["auto", "frozen", "train"] = "auto"
    """Statistics of BatchNorm in open layers: frozen keeps those of the weights, train follows the batches. auto =
    frozen with pretrained weights, train without. Closed layers are always frozen."""
