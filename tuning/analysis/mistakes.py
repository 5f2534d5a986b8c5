"""What a model gets wrong, from its probabilities for every image: pure functions over arrays. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Probabilities = NDArray[np.float32]
ROWS_AT_A_TIME = 8192  # of (N, K) arrays that are made on the way


@dataclass(frozen=True)
class Pair:
    """Images of one class that are taken for another.

    Attributes:
        actual, predicted: indices of the classes.
        count: images.
        share: of the images of the class *actual*.
    """

    actual: int
    predicted: int
    count: int
    share: float


class PerClass(NamedTuple):
    """Counts of every class, each ``(K,)``.

    Attributes:
        images: that carry the label.
        hits: of these, predicted as such.
        predicted: images that are predicted as the class.
    """

    images: Indices
    hits: Indices
    predicted: Indices

    def recall(self, index: int) -> float | None:
        """Share of the images of a class that are recognised; None without an image."""
        return float(self.hits[index] / self.images[index]) if self.images[index] else None

    def precision(self, index: int) -> float | None:
        """Share of the images taken for a class that belong to it; None where none is."""
        return float(self.hits[index] / self.predicted[index]) if self.predicted[index] else None

    def f1(self, index: int) -> float | None:
        """Harmonic mean of recall and precision; None where neither an image nor a prediction is of the class."""
        both = self.images[index] + self.predicted[index]
        return float(2 * self.hits[index] / both) if both else None


def per_class(labels: Indices, predicted: Indices, classes: int) -> PerClass:
    """Counts from which recall and precision of every class follow."""
    images, taken = (np.bincount(values, minlength=classes) for values in (labels, predicted))
    return PerClass(images, np.bincount(labels[labels == predicted], minlength=classes), taken)


def confusion(labels: Indices, predicted: Indices, shown: Sequence[int] | Indices) -> Indices:
    """Confusion matrix of the classes *shown*: entry ``[i, j]`` counts images of class i that are taken for class j.

    One row and one column more than *shown*: the last ones count all other classes together, so that the sum is the
    number of images with a label or a prediction among *shown*.
    """
    place = {int(index): position for position, index in enumerate(shown)}
    size = len(place) + 1
    matrix = np.zeros((size, size), np.int64)
    codes, counts = np.unique(np.stack([labels, predicted]), axis=1, return_counts=True)
    for actual, taken, count in zip(*codes.tolist(), counts.tolist(), strict=True):
        row, column = place.get(actual, size - 1), place.get(taken, size - 1)
        if min(row, column) < size - 1:
            matrix[row, column] += count
    return matrix


def confused_pairs(labels: Indices, predicted: Indices) -> list[Pair]:
    """Every pair of classes that was confused, most images first; A taken for B and B taken for A are two pairs."""
    wrong = labels != predicted
    if not wrong.any():
        return []
    images = np.bincount(labels)
    codes, counts = np.unique(np.stack([labels[wrong], predicted[wrong]]), axis=1, return_counts=True)
    pairs = [Pair(a, p, n, n / int(images[a])) for a, p, n in zip(*codes.tolist(), counts.tolist(), strict=True)]
    return sorted(pairs, key=lambda pair: (-pair.count, -pair.share, pair.actual, pair.predicted))


def most_confused(pairs: Sequence[Pair], classes: int, limit: int) -> list[int]:
    """At most *limit* classes, in the order of the class map: all, or those of the pairs with the most images."""
    if classes <= limit:
        return list(range(classes))
    chosen: dict[int, None] = {}
    for pair in pairs:
        fresh = {pair.actual, pair.predicted} - chosen.keys()
        if len(chosen) + len(fresh) > limit:
            break
        chosen |= dict.fromkeys(fresh)
    return sorted(chosen)


def losses(probabilities: Probabilities, labels: Indices) -> NDArray[np.float64]:
    """Cross-entropy of every image in nats, ``(N,)``; a probability that float32 rounds to 0 counts as its smallest."""
    own = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return -np.log(np.maximum(own, np.finfo(np.float32).tiny))


def worst_mistakes(probabilities: Probabilities, labels: Indices, limit: int) -> Indices:
    """The wrongly classified images with the highest loss, worst first: at most *limit* positions in the arrays."""
    wrong = np.flatnonzero(probabilities.argmax(axis=1) != labels)
    order = np.argsort(-losses(probabilities, labels)[wrong], kind="stable")
    return wrong[order][:limit]


@dataclass(frozen=True)
class LabelErrors:
    """Images whose label is likely wrong, the likeliest first.

    Attributes:
        index: positions in the arrays, ``(M,)``.
        suggested: the class that they rather belong to, ``(M,)``.
    """

    index: Indices
    suggested: Indices


def label_errors(probabilities: Probabilities, labels: Indices) -> LabelErrors:
    """Images off the diagonal of the confident joint, by normalised margin (Northcutt et al. 2021, sections 3.1, 3.2).

    The threshold of class j is the mean of ``p[:, j]`` over the images labelled j. An image counts as class j when
    ``p[j]`` reaches that threshold; of several such classes the most probable one counts. Its label is in doubt when
    that class is another one and the most probable class of all is, too. The rank is ``p[label] - max of the others``,
    lowest first. A class without an image is never suggested.

    Args:
        probabilities: ``(N, K)``, of a model that has not been trained on these images.
        labels: ``(N,)``.
    """
    images = np.bincount(labels, minlength=probabilities.shape[1])
    own = probabilities[np.arange(len(labels)), labels]
    sums = np.bincount(labels, own, len(images))
    thresholds = np.divide(sums, images, out=np.full(len(images), np.inf), where=images > 0)
    suggested = np.empty(len(labels), np.int64)
    margins = np.empty(len(labels), np.float64)
    for start in range(0, len(labels), ROWS_AT_A_TIME):
        part = slice(start, start + ROWS_AT_A_TIME)
        confident = np.where(probabilities[part] >= thresholds, probabilities[part], -1.0)
        best = confident.argmax(axis=1)
        reached = confident.max(axis=1) >= 0
        suggested[part] = np.where(reached, best, labels[part])
        others = probabilities[part].copy()
        others[np.arange(len(others)), labels[part]] = -1.0
        margins[part] = own[part] - others.max(axis=1)
    doubtful = np.flatnonzero((suggested != labels) & (margins < 0))
    index = doubtful[np.argsort(margins[doubtful], kind="stable")]
    return LabelErrors(index, suggested[index])
