"""Losses of single images; the engine alone averages them, over all images of an optimizer step."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(smoothing: float = 0.0) -> Loss:
    """Cross-entropy with label smoothing (Szegedy et al. 2016).

    Args:
        smoothing: probability mass spread evenly over all classes, in [0, 1).

    Returns:
        ``(logits (B, K), labels (B,)) -> losses (B,)`` in float32.
    """

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)

    return loss
