"""Metrics agree with scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, top_k_accuracy_score

from tuning.judging.metrics import classification_metrics, rank_classes


def drawn(images: int, classes: int, seed: int, absent: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that lean towards the labels, and labels without the absent classes."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([c for c in range(classes) if c not in absent], images)
    logits = rng.normal(size=(images, classes))
    logits[np.arange(images), labels] += 1
    return torch.from_numpy(logits), torch.from_numpy(labels)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true", "ignore:A single label was found")
@pytest.mark.parametrize(
    ("images", "classes", "absent"), [(200, 2, ()), (300, 5, (0, 4)), (500, 10, (3,)), (40, 30, (1, 2)), (1, 3, (0,))]
)
def test_like_scikit_learn(images: int, classes: int, absent: tuple[int, ...]) -> None:
    logits, labels = drawn(images, classes, seed=images, absent=absent)
    losses = torch.linspace(0, 3, images)
    metrics = classification_metrics(rank_classes(logits), labels, losses, classes)
    predicted = logits.argmax(dim=1)
    assert metrics["top1"] == pytest.approx(accuracy_score(labels, predicted))
    assert metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert metrics["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert metrics["loss"] == pytest.approx(losses.double().mean().item())
    assert ("top5" in metrics) == (classes > 5)
    if classes > 5:
        every = top_k_accuracy_score(labels, logits, k=5, labels=range(classes))
        assert metrics["top5"] == pytest.approx(every)


def test_balanced_accuracy_is_not_moved_by_a_large_class() -> None:
    labels = torch.tensor([0] * 90 + [1] * 10)
    ranked = torch.zeros(100, 2, dtype=torch.int64)
    ranked[:, 1] = 1
    metrics = classification_metrics(ranked, labels, torch.zeros(100), 2)
    assert (metrics["top1"], metrics["balanced_accuracy"]) == (pytest.approx(0.9), 0.5)


def test_ranks_are_best_first() -> None:
    logits = torch.tensor([[0.1, 3.0, -1.0, 2.0, 0.5, 0.2, 0.3], [7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    assert rank_classes(logits).tolist() == [[1, 3, 4, 6, 5], [0, 1, 2, 3, 4]]
    assert rank_classes(logits[:, :3]).tolist() == [[1, 0, 2], [0, 1, 2]]
