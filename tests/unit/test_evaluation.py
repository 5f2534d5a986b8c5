"""Losses at the best temperature: what was learned, without how boldly it is said."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from tuning.data.loader import Micro
from tuning.errors import UserError
from tuning.evaluation import TEMPERATURES, evaluate, evaluate_calibrated

IMAGES, CLASSES = 40, 3


def logits_and_labels() -> tuple[Tensor, Tensor]:
    """Right two times of three, more or less."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(IMAGES) % CLASSES
    return torch.randn(IMAGES, CLASSES, generator=generator) + F.one_hot(labels, CLASSES), labels


def batches(logits: Tensor, labels: Tensor, weights: Tensor) -> Iterator[Micro]:
    """In an order that is not the dataset's, as the inputs of a network that gives them back."""
    for rows in torch.randperm(len(labels), generator=torch.Generator().manual_seed(1)).split(16):
        yield Micro(logits[rows], labels[rows], weights[rows], rows)


def losses(logits: Tensor, labels: Tensor, weights: Tensor | None = None, classes: Tensor | None = None) -> Tensor:
    weights = torch.ones(IMAGES) if weights is None else weights
    feed = batches(logits, labels, weights)
    metrics, found = evaluate_calibrated(Accelerator(), nn.Identity(), feed, IMAGES, CLASSES, classes)
    again = batches(logits, labels, weights)
    assert metrics == evaluate(Accelerator(), nn.Identity(), again, IMAGES, CLASSES), "in the same pass"
    return found


@pytest.mark.usefixtures("fresh_accelerate")
class TestCalibratedLosses:
    def test_they_are_the_least_over_all_temperatures_in_the_order_of_the_images(self) -> None:
        logits, labels = logits_and_labels()
        everywhere = [F.cross_entropy(logits / t, labels, reduction="none") for t in TEMPERATURES]
        best = min(everywhere, key=lambda values: float(values.double().mean()))
        assert torch.equal(losses(logits, labels), best.double())

    def test_boldness_doesn_t_count(self) -> None:
        logits, labels = logits_and_labels()
        timid, bold = losses(0.5 * logits, labels), losses(20 * logits, labels)
        assert float(timid.mean()) == pytest.approx(float(bold.mean()), abs=1e-3)
        assert float(bold.mean()) < F.cross_entropy(logits * 20, labels) - 1

    def test_what_tells_nothing_apart_has_the_loss_of_chance(self) -> None:
        _, labels = logits_and_labels()
        noise = 50 * torch.randn(IMAGES, CLASSES, generator=torch.Generator().manual_seed(5))
        assert float(losses(noise, labels).mean()) == pytest.approx(1.0986, abs=0.02)
        assert float(losses(torch.zeros(IMAGES, CLASSES), labels).mean()) == pytest.approx(1.0986, abs=1e-4)

    def test_class_weights_and_pictures_that_can_t_be_read(self) -> None:
        logits, labels = logits_and_labels()
        weights, readable = torch.tensor([1.0, 0.0, 2.0]), torch.ones(IMAGES)
        readable[[3, 17]] = 0
        given = losses(logits, labels, readable, weights)
        assert len(given) == IMAGES - 2
        assert (given[labels[readable > 0] == 1] == 0).all()
        with pytest.raises(UserError, match="none of the 40 evaluation pictures could be read"):
            losses(logits, labels, torch.zeros(IMAGES))
