"""Losses of single images, whose mean is torch's."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from torch.nn import functional as F

from tuning.flags import LossName
from tuning.losses import Loss, balanced_weights, binary_cross_entropy, chosen, cross_entropy, focal


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


@pytest.mark.parametrize("name", get_args(LossName))
@pytest.mark.parametrize("parts", [[24], [12, 12], [5, 19], [7, 7, 7, 3]])
def test_any_split_of_a_step_gives_the_same_gradient(parts: list[int], name: LossName) -> None:
    """Shares of micro-batches and processes: sums over the images of the whole step, filler at weight 0."""
    logits, labels = draw()
    loss = chosen(name, 0.1, balanced_weights(labels.numpy(), 4), 2.0)
    whole = logits.clone().requires_grad_()
    loss(whole, labels).mean().backward()
    split = logits.clone().requires_grad_()
    for part, its_labels in zip(split.split(parts), labels.split(parts), strict=True):
        filled, filled_labels = torch.cat((part, part[:2])), torch.cat((its_labels, its_labels[:2]))
        counts = torch.tensor([1.0] * len(part) + [0.0] * 2)
        ((loss(filled, filled_labels) * counts).sum() / 24).backward()
    assert torch.allclose(split.grad, whole.grad, atol=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_binary_cross_entropy_is_one_sigmoid_a_class(smoothing: float) -> None:
    logits, labels = draw()
    targets = F.one_hot(labels, 4) * (1 - smoothing) + smoothing / 4
    p = logits.double().sigmoid()
    expected = -(targets * p.log() + (1 - targets) * (1 - p).log()).mean(dim=1)
    losses = binary_cross_entropy(smoothing)(logits, labels)
    assert losses.shape == (24,)
    assert losses.dtype == torch.float32
    assert torch.allclose(losses.double(), expected, atol=1e-6)
    assert torch.allclose(losses.mean(), BinaryCrossEntropy(smoothing)(logits, labels))


def test_binary_cross_entropy_by_hand() -> None:
    loss = binary_cross_entropy()(torch.tensor([[math.log(3), -math.log(3)]]), torch.tensor([0]))
    assert loss.tolist() == pytest.approx([-math.log(0.75)])  # both are right with probability 3/4


def test_focal_loss_by_hand() -> None:
    logits, labels = torch.tensor([[0.9, 0.1], [0.9, 0.1]]).log(), torch.tensor([0, 1])
    expected = [-(0.1**2) * math.log(0.9), -(0.9**2) * math.log(0.1)]
    assert focal(2.0)(logits, labels).tolist() == pytest.approx(expected, rel=1e-5)
    assert focal(0.5)(logits, labels).tolist() == pytest.approx(
        [-(0.1**0.5) * math.log(0.9), -(0.9**0.5) * math.log(0.1)], rel=1e-5
    )


def test_focal_loss_without_gamma_is_cross_entropy() -> None:
    logits, labels = draw()
    mine, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    assert torch.equal(focal(0.0)(mine, labels), cross_entropy()(plain, labels))
    focal(0.0)(mine, labels).sum().backward()
    cross_entropy()(plain, labels).sum().backward()
    assert torch.allclose(mine.grad, plain.grad)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_focal_gradients_are_finite_and_right(gamma: float) -> None:
    """Where the label has all the probability a power below 1 has no finite derivative."""
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0], [0.3, -0.2]], requires_grad=True)
    focal(gamma)(logits, torch.zeros(3, dtype=torch.int64)).sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0].abs().max() < 1e-6
    p = torch.tensor([0.3, -0.2], dtype=torch.float64).softmax(0)[0].item()
    by_hand = (1 - p) ** gamma * (gamma * p * math.log(p) + p - 1)  # Lin et al. 2017, appendix B
    assert logits.grad[2, 0].item() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("name", ["bce", "focal"])
def test_class_weights_are_factors_by_the_label(name: LossName) -> None:
    logits, labels = draw()
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0])
    plain = chosen(name, 0.0, None, 2.0)(logits, labels)
    assert torch.allclose(chosen(name, 0.0, weights, 2.0)(logits, labels), weights[labels] * plain)


@pytest.mark.parametrize("name", ["bce", "focal"])
def test_half_precision_logits_are_raised_first(name: LossName) -> None:
    logits, labels = draw()
    low = chosen(name, 0.0, None, 2.0)(logits.bfloat16(), labels)
    assert low.dtype == torch.float32
    assert torch.equal(low, chosen(name, 0.0, None, 2.0)(logits.bfloat16().float(), labels))


def two_labels() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    logits, labels = draw()
    return logits, labels, labels.roll(1), torch.rand(24, generator=torch.Generator().manual_seed(3))


def weighed(loss: Loss, smoothing: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The losses of both labels by their shares, the logits and the target that stands for both."""
    logits, labels, others, shares = two_labels()
    losses = torch.lerp(loss(logits, others), loss(logits, labels), shares)
    target = shares[:, None] * F.one_hot(labels, 4) + (1 - shares[:, None]) * F.one_hot(others, 4)
    return losses, logits, target * (1 - smoothing) + smoothing / 4


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_two_labels_are_the_target_between_them(smoothing: float) -> None:
    """Cross-entropy and BCE are linear in the target: timm's losses of the soft target, class weights too."""
    losses, logits, target = weighed(cross_entropy(smoothing), smoothing)
    assert torch.allclose(losses.mean(), SoftTargetCrossEntropy()(logits, target))
    losses, logits, target = weighed(binary_cross_entropy(smoothing), smoothing)
    assert torch.allclose(losses.mean(), BinaryCrossEntropy()(logits, target))
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0])
    losses, logits, target = weighed(cross_entropy(smoothing, weights), smoothing)
    assert torch.allclose(losses, F.cross_entropy(logits, target, weights, reduction="none"), rtol=1e-4)
