"""What pictures, page and tracker show of a model's mistakes: small, however many images and classes there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torchmetrics.functional.classification import binary_average_precision, binary_precision_recall_curve

from tuning.analysis import mistakes
from tuning.analysis.mistakes import Indices, Pair, PerClass, Probabilities
from tuning.data.sources import Data
from tuning.tracking.pages import thumbnail

PAIRS, CASES = 20, 24  # shown of confused pairs, of worst mistakes and of likely label errors
CLASSES_DRAWN, CURVES_DRAWN = 24, 8
CURVE_POINTS = 200


@dataclass(frozen=True)
class Case:
    """One image that the model and its label disagree about.

    Attributes:
        name: its path below the data folder, or its row where it has none.
        row: of the evaluation data.
        label, predicted, suggested: indices of classes; *suggested* is *predicted* for a mistake.
        own, top, of_suggested: probabilities of the label, of the predicted class, of the suggested one.
        picture: JPEG; None where it can't be read any more.
    """

    name: str
    row: int
    label: int
    predicted: int
    suggested: int
    own: float
    top: float
    of_suggested: float
    picture: bytes | None


@dataclass(frozen=True)
class Curve:
    """Precision over recall of one class against all others, recall rising; `area` is the average precision."""

    index: int
    recall: tuple[float, ...]
    precision: tuple[float, ...]
    area: float


@dataclass(frozen=True)
class Overview:
    """The error analysis of one evaluation.

    Attributes:
        classes: names.
        images, wrong, doubtful: images evaluated; of these misclassified; of these with a label in doubt.
        counts: of every class.
        pairs: the most confused, at most `PAIRS`; pair_count: how many there are.
        drawn: classes of `confusion`, whose last row and column are all others together.
        worst: mistakes with the highest loss, at most `CASES`.
        suspects: likely label errors, at most `CASES`.
        curves: of at most `CURVES_DRAWN` classes, those with the most mistakes.
    """

    classes: tuple[str, ...]
    images: int
    wrong: int
    doubtful: int
    counts: PerClass
    pairs: tuple[Pair, ...]
    pair_count: int
    drawn: tuple[int, ...]
    confusion: Indices
    worst: tuple[Case, ...]
    suspects: tuple[Case, ...]
    curves: tuple[Curve, ...]


def look_at(probabilities: Probabilities, labels: Indices, rows: Indices, names: Sequence[str], data: Data) -> Overview:
    """Analyse the predictions for images of ``data.eval``.

    Args:
        probabilities: ``(N, K)`` float32.
        labels: ``(N,)``.
        rows: of ``data.eval``, ``(N,)``.
        names: of the images, N of them.
    """
    predicted = probabilities.argmax(axis=1)
    counts = mistakes.per_class(labels, predicted, len(data.classes))
    pairs = mistakes.confused_pairs(labels, predicted)
    drawn = mistakes.most_confused(pairs, len(data.classes), CLASSES_DRAWN)
    found = mistakes.label_errors(probabilities, labels)

    def case(index: int, suggested: int | None = None) -> Case:
        row, label, taken = int(rows[index]), int(labels[index]), int(predicted[index])
        suggested = taken if suggested is None else suggested
        own, top, rather = probabilities[index, [label, taken, suggested]].tolist()
        picture = thumbnail(data.eval[row])
        return Case(names[index], row, label, taken, suggested, own, top, rather, picture)

    suspects = zip(found.index[:CASES].tolist(), found.suggested[:CASES].tolist(), strict=True)
    return Overview(
        classes=data.classes,
        images=len(labels),
        wrong=int((predicted != labels).sum()),
        doubtful=len(found.index),
        counts=counts,
        pairs=tuple(pairs[:PAIRS]),
        pair_count=len(pairs),
        drawn=tuple(drawn),
        confusion=mistakes.confusion(labels, predicted, drawn),
        worst=tuple(case(index) for index in mistakes.worst_mistakes(probabilities, labels, CASES).tolist()),
        suspects=tuple(case(index, suggested) for index, suggested in suspects),
        curves=tuple(curve(probabilities[:, k], labels == k, k) for k in _hardest(counts)),
    )


def named_pairs(overview: Overview) -> list[dict[str, Any]]:
    """The most confused pairs as `json` can write them."""
    classes = overview.classes
    return [
        {"label": classes[p.actual], "predicted": classes[p.predicted], "images": p.count, "share": p.share}
        for p in overview.pairs
    ]


def _hardest(counts: PerClass) -> Sequence[int]:
    """The classes with the most images missed or wrongly taken for them, in the order of the class map."""
    present = np.flatnonzero((counts.images > 0) & (counts.images < counts.images.sum()))
    errors = counts.images + counts.predicted - 2 * counts.hits
    order = np.argsort(-errors[present], kind="stable")
    return sorted(present[order][:CURVES_DRAWN].tolist())


def curve(scores: Probabilities, belongs: np.ndarray, index: int) -> Curve:
    """The precision-recall curve of one class at `CURVE_POINTS` points at most.

    Args:
        scores: probability of the class, ``(N,)``.
        belongs: whether the image carries its label, ``(N,)`` bool, both kinds present.
    """
    probabilities, targets = torch.from_numpy(scores.copy()), torch.from_numpy(belongs.astype(np.int64))
    precision, recall, _ = (values.flip(0).numpy() for values in binary_precision_recall_curve(probabilities, targets))
    area = float(binary_average_precision(probabilities, targets))
    # Of the points with the same recall the first has the highest precision.
    places = np.unique(np.searchsorted(recall, np.linspace(0, 1, CURVE_POINTS)))
    return Curve(index, tuple(recall[places].tolist()), tuple(precision[places].tolist()), area)
