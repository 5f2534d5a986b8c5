"""Losses of single images; the engine alone averages them, over all images of an optimizer step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]


def balanced_weights(labels: np.ndarray, classes: int) -> Tensor:
    """Weight of every class, ``N / (classes * its images)``: their mean over the images is 1 (King & Zeng 2001).

    Classes without images don't count as classes and get weight 1, which only label smoothing uses.

    Args:
        labels: ``(N,)`` integers.

    Returns:
        ``(classes,)`` float32.
    """
    counts = np.bincount(labels, minlength=classes)
    weights = np.where(counts > 0, len(labels) / ((counts > 0).sum() * counts.clip(min=1)), 1.0)
    return torch.from_numpy(weights).float()


def cross_entropy(smoothing: float = 0.0, class_weights: Tensor | None = None) -> Loss:
    """Cross-entropy with label smoothing (Szegedy et al. 2016) and class weights.

    Args:
        smoothing: probability mass spread evenly over all classes, in [0, 1).
        class_weights: ``(K,)``, factor of each class's part of the loss; None = 1.

    Returns:
        ``(logits (B, K), labels (B,)) -> losses (B,)`` in float32.
    """

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        weights = None if class_weights is None else class_weights.to(logits.device, non_blocking=True)
        return F.cross_entropy(logits.float(), labels, weights, reduction="none", label_smoothing=smoothing)

    return loss
