"""What a model gets wrong, from its probabilities: against scikit-learn, by hand, and with planted wrong labels."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, log_loss, precision_recall_fscore_support
from sklearn.model_selection import cross_val_predict

from tuning.analysis.mistakes import (
    Pair,
    confused_pairs,
    confusion,
    label_errors,
    losses,
    most_confused,
    per_class,
    worst_mistakes,
)


def some(images: int = 200, classes: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that know something of the labels."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, images)
    logits = generator.normal(size=(images, classes)) + 1.5 * np.eye(classes)[labels]
    return (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32), labels


def test_confusion_equals_scikit_learn() -> None:
    probabilities, labels = some()
    predicted = probabilities.argmax(1)
    whole = confusion(labels, predicted, range(5))
    assert (whole[:5, :5] == confusion_matrix(labels, predicted)).all()
    assert not whole[5].any()
    assert not whole[:, 5].any()


def test_a_part_of_the_confusion_counts_the_rest_together() -> None:
    probabilities, labels = some()
    predicted = probabilities.argmax(1)
    whole, part = confusion_matrix(labels, predicted), confusion(labels, predicted, [1, 3])
    assert (part[:2, :2] == whole[np.ix_([1, 3], [1, 3])]).all()
    assert part[0, 2] == whole[1, [0, 2, 4]].sum()
    assert part[2, 1] == whole[[0, 2, 4], 3].sum()
    assert part[2, 2] == 0, "what touches no shown class is left out"


def test_recall_and_precision_equal_scikit_learn() -> None:
    probabilities, labels = some()
    predicted = probabilities.argmax(1)
    counts = per_class(labels, predicted, 5)
    precision, recall, _, images = precision_recall_fscore_support(labels, predicted)
    assert [counts.recall(i) for i in range(5)] == pytest.approx(recall)
    assert [counts.precision(i) for i in range(5)] == pytest.approx(precision)
    assert (counts.images == images).all()
    empty = per_class(np.array([0, 0]), np.array([0, 1]), 4)
    assert (empty.recall(3), empty.precision(3), empty.precision(1)) == (None, None, 0.0)


def test_confused_pairs_by_hand() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2])
    taken = np.array([0, 1, 1, 2, 0, 0, 2, 2, 2])
    assert confused_pairs(labels, taken) == [Pair(1, 0, 2, 1.0), Pair(0, 1, 2, 0.5), Pair(0, 2, 1, 0.25)]
    assert confused_pairs(labels, labels) == []


def test_many_classes_are_cut_down_to_the_most_confused() -> None:
    pairs = [Pair(7, 2, 9, 0.9), Pair(2, 7, 8, 0.1), Pair(5, 900, 4, 0.1), Pair(1, 3, 2, 0.1)]
    assert most_confused(pairs, 1000, 5) == [2, 5, 7, 900]
    assert most_confused(pairs, 4, 5) == [0, 1, 2, 3]
    assert most_confused([], 1000, 5) == []


def test_many_classes_need_no_square_matrix() -> None:
    """A hundred thousand classes: their matrix would have 80 GB."""
    labels = np.arange(0, 100_000, 10)
    taken = np.where(labels % 1000 == 0, labels + 1, labels)
    pairs = confused_pairs(labels, taken)
    assert len(pairs) == 100
    assert confusion(labels, taken, most_confused(pairs, 100_000, 20)).shape == (21, 21)


def test_losses_and_worst_mistakes() -> None:
    probabilities, labels = some()
    assert losses(probabilities, labels).mean() == pytest.approx(log_loss(labels, probabilities), abs=1e-6)
    worst = worst_mistakes(probabilities, labels, 10)
    wrong = probabilities.argmax(1) != labels
    assert wrong[worst].all()
    own = probabilities[np.arange(200), labels]
    assert own[worst].tolist() == sorted(own[wrong])[:10]
    assert len(worst_mistakes(probabilities, labels, 10**6)) == wrong.sum()


def test_a_probability_of_nothing_is_a_finite_loss() -> None:
    certain = np.array([[1, 0], [1, 0]], np.float32)
    labels = np.array([1, 0])
    assert np.isfinite(losses(certain, labels)).all()
    assert worst_mistakes(certain, labels, 5).tolist() == [0]


def test_label_errors_by_hand() -> None:
    """Thresholds: class 0 (.9 + .8 + .2) / 3 = .633, class 1 (.7 + .9 + .45) / 3 = .683, class 2 without an image."""
    first = [0.9, 0.8, 0.2, 0.3, 0.1, 0.55]
    probabilities = np.array([[p, 1 - p, 0] for p in first], np.float32)
    labels = np.array([0, 0, 0, 1, 1, 1])
    found = label_errors(probabilities, labels)
    assert found.index.tolist() == [2], "image 5 is wrong, but not sure enough to doubt its label"
    assert found.suggested.tolist() == [1]


@pytest.mark.parametrize("seed", range(3))
def test_planted_label_errors_come_first(seed: int) -> None:
    """A tenth of the labels turned over; probabilities out of sample, by a plain classifier."""
    generator = np.random.default_rng(seed)
    true = generator.integers(0, 4, 1200)
    points = generator.normal(size=(1200, 6)) + 2.6 * np.eye(4, 6)[true]
    flipped = generator.choice(1200, 120, replace=False)
    labels = true.copy()
    labels[flipped] = (true[flipped] + generator.integers(1, 4, 120)) % 4
    probabilities = cross_val_predict(LogisticRegression(), points, labels, method="predict_proba").astype(np.float32)
    found = label_errors(probabilities, labels)
    first = np.isin(found.index[:60], flipped)
    assert first.mean() > 0.95, "ten per cent of all labels are wrong"
    assert np.isin(flipped, found.index).mean() > 0.65
    planted = np.isin(found.index, flipped)
    assert (found.suggested[planted] == true[found.index[planted]]).mean() > 0.9


def test_label_errors_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = label_errors(*some())
    monkeypatch.setattr("tuning.analysis.mistakes.ROWS_AT_A_TIME", 7)
    parts = label_errors(*some())
    assert len(whole.index) > 0
    assert (whole.index == parts.index).all()
    assert (whole.suggested == parts.suggested).all()
