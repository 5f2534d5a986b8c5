"""Losses of single images, whose mean is torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tuning.losses import balanced_weights, cross_entropy


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


def draw(images: int = 24, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, classes, generator=generator) * 3, torch.randint(classes, (images,), generator=generator)


def test_balanced_weights_have_mean_one_over_the_images() -> None:
    labels = np.array([0] * 6 + [1] * 3 + [2] * 1)
    weights = balanced_weights(labels, 3)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    assert weights[torch.from_numpy(labels)].mean() == pytest.approx(1.0)
    assert balanced_weights(np.array([1, 0, 1, 0]), 2).tolist() == [1.0, 1.0]


def test_a_class_without_images_weighs_no_more_than_others() -> None:
    """--limit-train can leave one out; label smoothing would multiply its weight with its log-probability."""
    labels = np.array([0] * 6 + [2] * 2)
    weights = balanced_weights(labels, 4)
    assert weights.tolist() == pytest.approx([8 / 12, 1.0, 2.0, 1.0])
    assert weights[torch.from_numpy(labels)].mean() == pytest.approx(1.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_weighted_losses_are_torchs(smoothing: float) -> None:
    logits, labels = draw()
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0])
    losses = cross_entropy(smoothing, weights)(logits, labels)
    assert losses.shape == (24,)
    # torch's weighted mean divides by the weights of the images; the engine divides by their number.
    mean = F.cross_entropy(logits, labels, weights, label_smoothing=smoothing)
    assert torch.allclose(losses.sum() / weights[labels].sum(), mean)
    if not smoothing:
        assert torch.allclose(losses, weights[labels] * cross_entropy()(logits, labels))


@pytest.mark.parametrize("parts", [[24], [12, 12], [5, 19], [7, 7, 7, 3]])
def test_any_split_of_a_step_gives_the_same_gradient(parts: list[int]) -> None:
    """Shares of micro-batches and processes: sums over the images of the whole step, filler at weight 0."""
    logits, labels = draw()
    loss = cross_entropy(0.1, balanced_weights(labels.numpy(), 4))
    whole = logits.clone().requires_grad_()
    loss(whole, labels).mean().backward()
    split = logits.clone().requires_grad_()
    for part, its_labels in zip(split.split(parts), labels.split(parts), strict=True):
        filled, filled_labels = torch.cat((part, part[:2])), torch.cat((its_labels, its_labels[:2]))
        counts = torch.tensor([1.0] * len(part) + [0.0] * 2)
        ((loss(filled, filled_labels) * counts).sum() / 24).backward()
    assert torch.allclose(split.grad, whole.grad, atol=1e-7)
