"""Test-time augmentation: probabilities averaged over views of each picture (Krizhevsky et al. 2012)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from tuning.judging.final_metrics import mean_of

Forward = Callable[[Tensor], Tensor]
Views = Literal["none", "flip", "flips", "dihedral"]
ROWS, COLUMNS = 2, 3  # axes of (B, 3, S, S)


def views(images: Tensor, name: Views) -> list[Tensor]:
    """The views of a batch ``(B, 3, S, S)``, the pictures themselves first: 1, 2, 4 or 8."""
    if name == "none":
        return [images]
    mirrored = [images, images.flip(COLUMNS)]
    if name == "flip":
        return mirrored
    flipped = [*mirrored, *(view.flip(ROWS) for view in mirrored)]
    return flipped if name == "flips" else [*flipped, *(view.transpose(ROWS, COLUMNS) for view in flipped)]


def averaged(model: Forward, name: Views) -> Forward:
    """*model*, called once a view; returns the logarithm of the mean probabilities ``(B, K)`` in place of logits."""
    if name == "none":
        return model

    def forward(images: Tensor) -> Tensor:
        shaped = [view.contiguous(memory_format=torch.channels_last) for view in views(images, name)]
        return mean_of([model(view).float() for view in shaped])

    return forward
