"""Bootstrap intervals: each resample's metric is the metric, and the spread is what theory says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_final_metrics import answers

from tuning.judging import bootstrap
from tuning.judging.bootstrap import _Judged, intervals
from tuning.judging.final_metrics import final_metrics


@pytest.mark.parametrize(("images", "classes"), [(200, 2), (211, 3), (90, 7)])
def test_a_resample_has_the_metrics_of_its_images(images: int, classes: int) -> None:
    logits, labels = answers(images, classes)
    drawn = np.random.default_rng(1).integers(0, images, (4, images))
    drawn[0] = np.arange(images)
    found = _Judged(logits, labels).metrics(drawn)
    for number, rows in enumerate(drawn):
        alone = final_metrics(logits[rows], labels[rows])
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            assert found[name][number] == pytest.approx(value, abs=1e-6), name


def test_the_spread_of_the_accuracy_is_the_binomial_one() -> None:
    labels = torch.zeros(1000, dtype=torch.int64)
    logits = torch.tensor([[1.0, 0.0]] * 800 + [[0.0, 1.0]] * 200)
    low, high = intervals(logits, labels, 4000)["top1"]
    half = 1.96 * math.sqrt(0.8 * 0.2 / 1000)
    assert (low, high) == pytest.approx((0.8 - half, 0.8 + half), abs=0.003)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """200 samples of 100 images from a model that is right with probability 0.7."""
    covered, generator = 0, torch.Generator().manual_seed(0)
    for _ in range(200):
        hit = torch.rand(100, generator=generator) < 0.7
        logits = torch.stack([hit.float(), (~hit).float(), torch.zeros(100)], 1)
        low, high = intervals(logits, torch.zeros(100, dtype=torch.int64), 200)["top1"]
        covered += low <= 0.7 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_the_same_seed_gives_the_same_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = answers(50, 3)
    first = intervals(logits, labels, 100)
    assert intervals(logits, labels, 100) == first
    assert intervals(logits, labels, 100, seed=1) != first
    monkeypatch.setattr(bootstrap, "AT_ONCE", 70)
    assert intervals(logits, labels, 100) == first


def test_resamples_without_a_class_do_not_count_and_undefined_metrics_are_left_out() -> None:
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.5]])
    found = intervals(logits, torch.tensor([1, 0, 0]), 200)  # some resamples hold one class only
    assert all(np.isfinite(found[name]).all() for name in found)
    assert "roc_auc" in found
    assert "roc_auc" not in intervals(logits, torch.tensor([1, 1, 1]), 200)
