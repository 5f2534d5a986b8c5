"""Metrics of a finished model, from its logits and the labels of the same images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    multiclass_calibration_error,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
    multiclass_stat_scores,
)

from tuning.judging.metrics import classification_metrics, rank_classes
from tuning.losses import cross_entropy

BINS = 15  # of confidence, as in Guo et al. 2017


def probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Softmax of ``logits / temperature`` in float64, so that confident predictions don't tie: ``(N, K)``."""
    return (logits.double() / temperature).softmax(dim=1)


def final_metrics(logits: Tensor, labels: Tensor) -> dict[str, float | None]:
    """``top1``, ``top5`` (more than five classes), ``balanced_accuracy``, ``macro_f1``, ``loss``, ``ece``.

    For two classes also ``roc_auc`` and ``average_precision`` of the second class; None where only one occurs in
    *labels*. ECE is the
    expected calibration error over 15 equal bins of confidence (Naeini et al. 2015; Guo et al. 2017).

    Args:
        logits: ``(N, K)``.
        labels: ``(N,)`` int64.
    """
    classes = logits.shape[1]
    losses, ranked = cross_entropy()(logits, labels), rank_classes(logits)
    metrics: dict[str, float | None] = dict(classification_metrics(ranked, labels, losses, classes))
    metrics["ece"] = calibration_error(logits, labels)
    if classes == 2:
        scores, both = probabilities(logits)[:, 1], len(set(labels.tolist())) == 2
        metrics["roc_auc"] = float(binary_auroc(scores, labels)) if both else None
        metrics["average_precision"] = float(binary_average_precision(scores, labels)) if both else None
    return metrics


def calibration_error(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> float:
    """Mean distance between confidence and accuracy, over bins of confidence, weighted by their images; in [0, 1]."""
    p = probabilities(logits, temperature)
    return float(multiclass_calibration_error(p, labels, num_classes=p.shape[1], n_bins=BINS, norm="l1"))


def per_class(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``{class: {precision, recall, f1, support, predicted}}``; 0 where a ratio has nothing to divide by."""
    predicted, count = rank_classes(logits)[:, 0], len(classes)
    columns = [
        metric(predicted, labels, num_classes=count, average="none").tolist()
        for metric in (multiclass_precision, multiclass_recall, multiclass_f1_score)
    ]
    hits, wrong, _, _, support = multiclass_stat_scores(predicted, labels, num_classes=count, average="none").T
    columns += [support.tolist(), (hits + wrong).tolist()]
    names = ("precision", "recall", "f1", "support", "predicted")
    return {name: dict(zip(names, values, strict=True)) for name, *values in zip(classes, *columns, strict=True)}


def mean_of(logits: Sequence[Tensor]) -> Tensor:
    """Logarithm of the mean of several predictions' probabilities: its softmax is that mean. Each ``(N, K)``."""
    logs = torch.stack([one.double().log_softmax(dim=1) for one in logits])
    return (logs.logsumexp(dim=0) - torch.tensor(len(logits)).double().log()).float()
