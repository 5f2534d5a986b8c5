"""Losses of single images, whose mean is torch's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tuning.losses import cross_entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_the_mean_is_torchs(smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(16, 7, generator=generator) * 5, torch.randint(7, (16,), generator=generator)
    losses = cross_entropy(smoothing)(logits, labels)
    assert losses.shape == (16,)
    assert torch.allclose(losses.mean(), F.cross_entropy(logits, labels, label_smoothing=smoothing))
    singly = [F.cross_entropy(logits[n], labels[n], label_smoothing=smoothing) for n in range(16)]
    assert torch.allclose(losses, torch.stack(singly))


def test_half_precision_logits_lose_nothing_more() -> None:
    logits, labels = torch.tensor([[80.0, 1.0, -80.0]]), torch.tensor([2])
    loss = cross_entropy()(logits.bfloat16(), labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(160.0)


def test_gradients_reach_the_logits() -> None:
    logits = torch.zeros(2, 4, requires_grad=True)
    cross_entropy()(logits, torch.tensor([0, 3])).sum().backward()
    expected = torch.full((2, 4), 0.25) - F.one_hot(torch.tensor([0, 3]), 4)
    assert torch.allclose(logits.grad, expected)
