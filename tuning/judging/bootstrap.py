"""How far a metric could lie from what was measured, had other images of the same kind been drawn."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tuning.judging.final_metrics import BINS, probabilities
from tuning.judging.metrics import TOP_K, rank_classes
from tuning.losses import cross_entropy

Array = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]
LEVEL, SEED = 0.95, 0
AT_ONCE = 4_000_000  # draws in memory


def intervals(
    logits: Tensor, labels: Tensor, resamples: int, seed: int = SEED, level: float = LEVEL
) -> dict[str, list[float]]:
    """Percentile intervals of the metrics of `final_metrics`, ``{name: [low, high]}`` (Efron & Tibshirani 1993, 13.3).

    Every resample draws N images with replacement. It says nothing of other seeds or of other kinds of images.

    Args:
        logits: ``(N, K)``.
        labels: ``(N,)`` int64.
        resamples: of the images, at least 1.
        level: share of the resamples within the interval.
    """
    images, generator = len(labels), np.random.default_rng(seed)
    judged = _Judged(logits, labels)
    found: dict[str, list[Array]] = {}
    for count in _chunks(resamples, images):
        for name, values in judged.metrics(generator.integers(0, images, (count, images))).items():
            found.setdefault(name, []).append(values)
    tail = (1 - level) / 2
    return {
        name: [float(v) for v in np.nanquantile(np.concatenate(parts), [tail, 1 - tail])]
        for name, parts in found.items()
        if not np.isnan(np.concatenate(parts)).all()
    }


def _chunks(resamples: int, images: int) -> Iterator[int]:
    most = max(1, AT_ONCE // images)
    for start in range(0, resamples, most):
        yield min(most, resamples - start)


class _Judged:
    """What the metrics need of every image, as arrays ``(N,)``."""

    def __init__(self, logits: Tensor, labels: Tensor) -> None:
        ranked, p = rank_classes(logits), probabilities(logits)
        self.classes = logits.shape[1]
        self.labels, self.predicted = labels.numpy(), ranked[:, 0].numpy()
        self.hit = (self.labels == self.predicted).astype(np.float64)
        self.hit5 = (ranked == labels[:, None]).any(dim=1).double().numpy()
        self.losses = cross_entropy()(logits, labels).double().numpy()
        confidence = p.max(dim=1).values.numpy()
        # Edges belong to the bin above, as in torchmetrics.
        self.bins = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidence, side="right")
        self.gap = self.hit - confidence
        self.scores = np.unique(p[:, 1].numpy(), return_inverse=True)[1] if self.classes == 2 else None

    def metrics(self, drawn: Index) -> dict[str, Array]:
        """Each metric in every resample ``(R,)``; NaN where it is undefined. *drawn*: images ``(R, N)``."""
        found = {"top1": self.hit[drawn].mean(axis=1), "loss": self.losses[drawn].mean(axis=1)}
        if self.classes > TOP_K:
            found["top5"] = self.hit5[drawn].mean(axis=1)
        support = _sums(self.labels, drawn, self.classes)
        predicted = _sums(self.predicted, drawn, self.classes)
        hits = _sums(self.labels, drawn, self.classes, self.hit)
        found["balanced_accuracy"] = _mean_ratio(hits, support)
        found["macro_f1"] = _mean_ratio(2 * hits, support + predicted)
        found["ece"] = np.abs(_sums(self.bins, drawn, BINS, self.gap)).sum(axis=1) / drawn.shape[1]
        if self.scores is not None:
            found |= self._ranking(self.scores, drawn)
        return found

    def _ranking(self, scores: Index, drawn: Index) -> dict[str, Array]:
        """Area under the ROC curve, ties counting one half, and average precision, of class 1."""
        count = int(scores.max()) + 1
        positive = _sums(scores, drawn, count, self.labels.astype(np.float64))[:, ::-1]  # highest score first
        negative = _sums(scores, drawn, count)[:, ::-1] - positive
        true, false = positive.cumsum(axis=1), negative.cumsum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            area = (negative * (true - positive / 2)).sum(axis=1) / (true[:, -1] * false[:, -1])
            precision = np.where(true + false > 0, true / (true + false), 0.0)
            average = (positive * precision).sum(axis=1) / true[:, -1]
        return {"roc_auc": area, "average_precision": np.where(false[:, -1] > 0, average, np.nan)}


def _sums(values: Index, drawn: Index, count: int, weights: Array | None = None) -> Array:
    """Per resample, how often (or with which sum of *weights*) each of *count* values was drawn: ``(R, count)``."""
    cells = values[drawn] + count * np.arange(len(drawn))[:, None]
    weight = None if weights is None else weights[drawn].ravel()
    return np.bincount(cells.ravel(), weight, count * len(drawn)).reshape(len(drawn), count).astype(np.float64)


def _mean_ratio(above: Array, below: Array) -> Array:
    """Mean of ``above / below`` over the columns in which *below* is not 0."""
    ratio = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    return ratio.sum(axis=1) / np.maximum((below > 0).sum(axis=1), 1)  # type: ignore[no-any-return]
