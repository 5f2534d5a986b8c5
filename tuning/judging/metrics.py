"""Metrics of one evaluation, from what was predicted for every image."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix, multiclass_f1_score

TOP_K = 5


def classification_metrics(ranked: Tensor, labels: Tensor, losses: Tensor, classes: int) -> dict[str, float]:
    """``top1``, ``top5`` (with more than five classes), ``balanced_accuracy``, ``macro_f1`` and ``loss``, as fractions.

    Balanced accuracy is the mean recall over the classes that occur in *labels* (Brodersen et al. 2010), as in
    scikit-learn; macro F1 the mean over the classes that occur in labels or predictions, as there.

    Args:
        ranked: the most probable classes of each image, best first, ``(N, k)`` int64 with k = min(5, classes).
        labels: ``(N,)`` int64.
        losses: loss of each image, ``(N,)``.
        classes: number of classes.
    """
    confusion = multiclass_confusion_matrix(ranked[:, 0], labels, num_classes=classes).double()
    per_class = confusion.sum(dim=1)
    recall = confusion.diagonal()[per_class > 0] / per_class[per_class > 0]
    metrics = {
        "top1": float(multiclass_accuracy(ranked[:, 0], labels, num_classes=classes, average="micro")),
        "balanced_accuracy": float(recall.mean()),
        "macro_f1": float(multiclass_f1_score(ranked[:, 0], labels, classes, average="macro")),
        "loss": float(losses.double().mean()),
    }
    if classes > TOP_K:
        metrics["top5"] = float((ranked == labels[:, None]).any(dim=1).double().mean())
    return metrics


def rank_classes(logits: Tensor) -> Tensor:
    """The classes of each image, most probable first: ``(B, K)`` -> ``(B, min(5, K))`` int64."""
    return torch.topk(logits, k=min(TOP_K, logits.shape[1]), dim=1).indices
