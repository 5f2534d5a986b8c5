"""Losses of single images; the engine alone averages them, over all images of an optimizer step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from timm.loss.binary_cross_entropy import BinaryCrossEntropy
from torch import Tensor
from torch.nn import functional as F

from tuning.flags import LossName

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


def binary_cross_entropy(smoothing: float = 0.0, class_weights: Tensor | None = None) -> Loss:
    """Every class against the rest, as timm has it (Wightman et al. 2021, arXiv:2110.00476), mean over the classes.

    Args:
        smoothing: probability mass spread evenly over all classes, in [0, 1), as for `cross_entropy`.
        class_weights: ``(K,)``, factor of an image's loss by its label; None = 1.

    Returns:
        ``(logits (B, K), labels (B,)) -> losses (B,)`` in float32.
    """
    one_vs_rest = BinaryCrossEntropy(smoothing=smoothing, reduction="none")

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return _weighted(one_vs_rest(logits.float(), labels).mean(dim=1), labels, class_weights)

    return loss


def focal(gamma: float = 2.0, class_weights: Tensor | None = None) -> Loss:
    """``-(1 - p)^gamma ln p`` of the softmax probability p of the label (Lin et al. 2017, arXiv:1708.02002).

    Args:
        gamma: 0 = cross-entropy.
        class_weights: ``(K,)``, factor of an image's loss by its label, the paper's alpha; None = 1.

    Returns:
        ``(logits (B, K), labels (B,)) -> losses (B,)`` in float32.
    """

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        surprise = F.cross_entropy(logits.float(), labels, reduction="none")
        missing = -torch.expm1(-surprise)
        # At 0 a power below 1 has no finite derivative.
        missing = missing.clamp(min=torch.finfo(missing.dtype).tiny)
        return _weighted(missing**gamma * surprise, labels, class_weights)

    return loss


def _weighted(losses: Tensor, labels: Tensor, class_weights: Tensor | None) -> Tensor:
    if class_weights is None:
        return losses
    return losses * class_weights.to(losses.device, non_blocking=True)[labels]


def chosen(name: LossName, smoothing: float, class_weights: Tensor | None, gamma: float) -> Loss:
    """The loss that ``--loss`` names; *gamma* is for ``focal``, which takes no *smoothing*."""
    match name:
        case "cross-entropy":
            return cross_entropy(smoothing, class_weights)
        case "bce":
            return binary_cross_entropy(smoothing, class_weights)
        case "focal":
            return focal(gamma, class_weights)
