"""The paired test: McNemar by hand, the bootstrap against scipy's and against images drawn one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import bootstrap
from sklearn.metrics import balanced_accuracy_score

from tuning.comparison import paired as module
from tuning.comparison.paired import paired


def answers(images: int = 400, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two models that are often right together; the classes are of different sizes."""
    generator = np.random.default_rng(seed)
    labels = generator.choice(classes, images, p=np.arange(1, classes + 1) / sum(range(1, classes + 1)))
    first = generator.random(images) < 0.7
    second = np.where(generator.random(images) < 0.7, first, generator.random(images) < 0.9)
    return first, second, labels


@pytest.mark.parametrize(("b", "c"), [(1, 9), (0, 5), (4, 4), (0, 0), (12, 3)])
def test_mcnemar_by_hand(b: int, c: int) -> None:
    """p = 2 sum_{k <= min(b, c)} C(b + c, k) / 2^(b + c), at most 1."""
    first = np.array([True] * b + [False] * c + [True] * 10 + [False] * 3)
    second = np.array([False] * b + [True] * c + [True] * 10 + [False] * 3)
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    found = paired(first, second, np.zeros(len(first), np.int64), resamples=10)
    assert found.p == pytest.approx(min(1.0, 2 * tail))
    assert (found.only_first, found.only_second, found.images) == (b, c, b + c + 13)
    assert found.top1 == pytest.approx((c - b) / (b + c + 13))


def test_one_and_nine_is_the_textbook_value() -> None:
    first = np.array([True] + [False] * 9)
    assert paired(first, ~first, np.zeros(10, np.int64), resamples=10).p == pytest.approx(22 / 1024)


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
def test_differences_are_those_of_the_accuracies() -> None:
    first, second, labels = answers()
    found = paired(first, second, labels, resamples=10)
    assert found.top1 == pytest.approx(second.mean() - first.mean())
    balanced = [balanced_accuracy_score(labels, np.where(hits, labels, 99)) for hits in (first, second)]
    assert found.balanced_accuracy == pytest.approx(balanced[1] - balanced[0])


def test_the_interval_is_scipys() -> None:
    first, second, labels = answers()
    found = paired(first, second, labels)

    def difference(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return b.mean(axis=axis) - a.mean(axis=axis)

    samples = (first.astype(float), second.astype(float))
    theirs = bootstrap(samples, difference, paired=True, method="percentile", n_resamples=10_000, rng=1)
    low, high = theirs.confidence_interval
    assert found.top1_interval == pytest.approx((low, high), abs=0.004)
    assert found.top1_interval[0] < found.top1 < found.top1_interval[1]


def test_the_balanced_interval_is_that_of_images_drawn_one_by_one() -> None:
    first, second, labels = answers(images=60, classes=4)
    found = paired(first, second, labels)
    generator, differences = np.random.default_rng(5), []
    for _ in range(6000):
        drawn = generator.integers(0, 60, 60)
        gained = second[drawn].astype(float) - first[drawn]
        differences.append(np.mean([gained[labels[drawn] == k].mean() for k in np.unique(labels[drawn])]))
    expected = np.quantile(differences, [0.025, 0.975])
    assert found.balanced_accuracy_interval == pytest.approx(tuple(expected), abs=0.02)
    assert expected[1] - expected[0] > 0.15, "else the tolerance would say nothing"


def test_draws_in_parts_and_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, labels = answers()
    whole = paired(first, second, labels)
    assert paired(first, second, labels) == whole, "the seed is fixed"
    monkeypatch.setattr(module, "CELLS_AT_ONCE", 1000)
    parts = paired(first, second, labels)
    assert parts.top1_interval == pytest.approx(whole.top1_interval, abs=1e-9)


def test_equal_models_differ_by_nothing() -> None:
    first, _, labels = answers()
    found = paired(first, first, labels)
    assert (found.p, found.top1, found.top1_interval) == (1.0, 0.0, (0.0, 0.0))


def test_many_classes_are_quick() -> None:
    first, second, _ = answers(images=5000)
    found = paired(first, second, np.arange(5000) % 1000, resamples=200)
    assert found.balanced_accuracy_interval[0] < found.balanced_accuracy < found.balanced_accuracy_interval[1]
