"""Two models judged on the same images: is one better, and by how much? Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

Hits = NDArray[np.bool_]
Indices = NDArray[np.int64]
RESAMPLES, SEED, LEVEL = 10_000, 0, 0.95
CELLS_AT_ONCE = 4_000_000  # counts in memory


@dataclass(frozen=True)
class Paired:
    """The second model against the first, on the same images.

    Attributes:
        images: number of them.
        only_first, only_second: images that one of the two alone gets right.
        p: two-sided exact McNemar test of equal accuracy.
        top1, balanced_accuracy: second minus first.
        top1_interval, balanced_accuracy_interval: 95 % of the paired bootstrap.
    """

    images: int
    only_first: int
    only_second: int
    p: float
    top1: float
    top1_interval: tuple[float, float]
    balanced_accuracy: float
    balanced_accuracy_interval: tuple[float, float]


def paired(first: Hits, second: Hits, labels: Indices, resamples: int = RESAMPLES, seed: int = SEED) -> Paired:
    """Compare two models image by image.

    McNemar (1947), exact: of the images that one model alone gets right, each belongs to either with probability 1/2 if
    both are equally accurate. Bootstrap: images are drawn with replacement, each with the answers of both models
    (Efron and Tibshirani 1993, 13.3). Both see the chance in the images, not that in training.

    Args:
        first, second: whether each image was classified right, ``(N,)``.
        labels: ``(N,)``.
    """
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    apart = only_first + only_second
    p = float(binomtest(only_first, apart).pvalue) if apart else 1.0
    cells = _cells(first, second, labels)
    draws = _resampled(cells, resamples, seed)
    measured = _differences(cells[None])
    intervals = [tuple(np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()) for values in draws]
    return Paired(
        len(labels),
        only_first,
        only_second,
        p,
        float(measured[0][0]),
        intervals[0],
        float(measured[1][0]),
        intervals[1],
    )


def _cells(first: Hits, second: Hits, labels: Indices) -> Indices:
    """Images of every class that the first alone gets right, that neither or both do, and the second alone: ``(K, 3)``.

    Nothing else of an image enters the differences, so counts of these are all that has to be drawn anew.
    """
    _, classes = np.unique(labels, return_inverse=True)
    outcome = second.astype(np.int64) - first.astype(np.int64) + 1
    return np.bincount(3 * classes + outcome, minlength=3 * (classes.max() + 1)).reshape(-1, 3)


def _resampled(cells: Indices, resamples: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    generator, images = np.random.default_rng(seed), int(cells.sum())
    share = cells.ravel() / images
    at_once = max(1, CELLS_AT_ONCE // cells.size)
    parts = [
        _differences(generator.multinomial(images, share, min(at_once, resamples - start)).reshape(-1, *cells.shape))
        for start in range(0, resamples, at_once)
    ]
    top1, balanced = (np.concatenate(column) for column in zip(*parts, strict=True))
    return top1, balanced


def _differences(cells: Indices) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Differences of accuracy and of balanced accuracy for tables of counts, ``(R, K, 3)`` -> ``(R,)`` each.

    Balanced accuracy is the mean recall over the classes that occur.
    """
    gained, support = cells[..., 2] - cells[..., 0], cells.sum(axis=2)
    recall = np.divide(gained, support, out=np.zeros(gained.shape), where=support > 0)
    return gained.sum(axis=1) / support.sum(axis=1), recall.sum(axis=1) / (support > 0).sum(axis=1)
