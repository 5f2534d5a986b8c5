"""Metrics of a finished model against scikit-learn, and calibration error against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as oracle
import torch
from torch import Tensor

from tuning.judging.final_metrics import BINS, calibration_error, final_metrics, mean_of, per_class, probabilities


def answers(images: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits that are right more often than not, in steps so coarse that scores of images tie (not within one)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (images,), generator=generator)
    logits = torch.randn(images, classes, generator=generator) + torch.nn.functional.one_hot(labels, classes)
    return (logits * 4).round() / 4 + torch.arange(classes) * 1e-3, labels


@pytest.mark.parametrize(("images", "classes"), [(200, 2), (211, 3), (300, 7), (23, 12)])
def test_equal_to_scikit_learn(images: int, classes: int) -> None:
    logits, labels = answers(images, classes)
    found, predicted, p = final_metrics(logits, labels), logits.argmax(1), probabilities(logits).numpy()
    assert found["top1"] == pytest.approx(oracle.accuracy_score(labels, predicted))
    assert found["balanced_accuracy"] == pytest.approx(oracle.balanced_accuracy_score(labels, predicted))
    assert found["macro_f1"] == pytest.approx(oracle.f1_score(labels, predicted, average="macro"))
    assert found["loss"] == pytest.approx(oracle.log_loss(labels, p, labels=range(classes)))
    if classes > 5:
        ties_broken = logits.topk(5).indices
        assert found["top5"] == pytest.approx(float((ties_broken == labels[:, None]).any(1).double().mean()))
    else:
        assert "top5" not in found
    assert ("roc_auc" in found) == ("average_precision" in found) == (classes == 2)
    if classes == 2:
        assert found["roc_auc"] == pytest.approx(oracle.roc_auc_score(labels, p[:, 1]))
        assert found["average_precision"] == pytest.approx(oracle.average_precision_score(labels, p[:, 1]))


def test_every_class_is_equal_to_scikit_learn() -> None:
    logits, labels = answers(60, 5)
    logits[:, 3] = -9  # never predicted
    labels[labels == 4] = 0  # never there
    found = per_class(logits, labels, list("abcde"))
    report = oracle.precision_recall_fscore_support(labels, logits.argmax(1), labels=range(5), zero_division=0)
    for number, name in enumerate("abcde"):
        values = [found[name][key] for key in ("precision", "recall", "f1", "support")]
        assert values == pytest.approx([column[number] for column in report])
    assert [one["predicted"] for one in found.values()] == torch.bincount(logits.argmax(1), minlength=5).tolist()


def test_calibration_error_by_its_definition() -> None:
    logits, labels = answers(500, 4)
    for temperature in (1.0, 0.5, 3.0):
        p = probabilities(logits, temperature).numpy()
        confidence, hit = p.max(1), p.argmax(1) == labels.numpy()
        bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
        gaps = [abs(hit[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in {*bins}]
        assert calibration_error(logits, labels, temperature) == pytest.approx(sum(gaps), abs=1e-6)


def test_what_one_class_alone_does_not_define_is_none() -> None:
    logits = torch.randn(9, 2)
    found = final_metrics(logits, torch.ones(9, dtype=torch.int64))
    assert (found["roc_auc"], found["average_precision"]) == (None, None)
    assert found["balanced_accuracy"] == pytest.approx(found["top1"])


def test_confident_scores_keep_their_order() -> None:
    logits = torch.tensor([[0.0, 30.0], [0.0, 31.0], [0.0, 32.0]])  # all 1.0 in float32
    assert final_metrics(logits, torch.tensor([0, 1, 1]))["roc_auc"] == 1.0


def test_the_mean_of_probabilities() -> None:
    one, two = torch.randn(5, 3), torch.randn(5, 3) * 4
    mean = (one.softmax(1) + two.softmax(1)) / 2
    torch.testing.assert_close(mean_of([one, two]).softmax(1), mean)
    torch.testing.assert_close(mean_of([one]).softmax(1), one.softmax(1))
