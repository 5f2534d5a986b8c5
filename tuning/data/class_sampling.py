"""An order of the images in which rare classes come more often: a pure function of (seed, epoch), like `sampling`.

Drawn as evenly as whole numbers allow, instead of independently with replacement: how often a class comes in an epoch
varies by one, and no image comes again before all others of its class have come. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tuning.data.sampling import Item, Rows, TrainOrder, epoch_order, hashed
from tuning.flags.names import SamplingName
from tuning.sizes import BatchPlan

# Kang et al. 2020 (arXiv:1910.09217), eq. 1: a class of n images is drawn with probability proportional to n^q.
EXPONENTS: dict[SamplingName, float] = {"shuffle": 1.0, "sqrt": 0.5, "balanced": 0.0}
STREAM = 20  # of `hashed`
PERIOD = 64  # epochs, a power of two, after which the roundings of a class's images repeat
# 0, 1/2, 1/4, 3/4, 1/8, ... (van der Corput 1935): so any few epochs that follow each other round evenly, too.
PHASES = np.array([int(f"{epoch:06b}"[::-1], 2) for epoch in range(PERIOD)]) / PERIOD


@dataclass(frozen=True)
class Classes:
    """The images class by class.

    Attributes:
        rows: of the dataset, those of the first class first, ``(N,)``.
        counts: images of every class that has any, in the same order, ``(K,)``.
    """

    rows: Rows
    counts: Rows

    @classmethod
    def of(cls, labels: np.ndarray) -> Classes:
        """The classes of images with the *labels* ``(N,)``."""
        counts = np.bincount(labels)
        return cls(np.argsort(labels, kind="stable"), counts[counts > 0])


def drawn(counts: np.ndarray, exponent: float, epoch: int) -> Rows:
    """Images that an epoch takes of every class, ``(K,)``: as many in all as there are.

    Systematic sampling (Madow 1949): each class gets its share of the epoch, rounded down or up, and over `PERIOD`
    epochs its mean is exact to 1 / `PERIOD` of an image.

    Args:
        counts: images of every class, all above 0, ``(K,)``.
        exponent: from 0 (all classes alike) to 1 (as they are).
    """
    masses = np.cumsum(counts.astype(np.float64) ** exponent)
    edges = counts.sum() * masses / masses[-1]  # in this order whole numbers stay whole
    edges[-1] = counts.sum()
    taken: Rows = np.diff(np.floor(edges + PHASES[epoch % PERIOD]).astype(np.int64), prepend=0)
    return taken


def drawn_before(counts: np.ndarray, exponent: float, epoch: int) -> Rows:
    """What all epochs before this one took of every class together, ``(K,)``."""
    periods, rest = divmod(epoch, PERIOD)
    before = np.zeros(len(counts), dtype=np.int64)
    for number in range(PERIOD if periods else rest):
        once = drawn(counts, exponent, number)
        before += once * (periods + (number < rest))
    return before


def sampled(classes: Classes, exponent: float, seed: int, epoch: int) -> Rows:
    """The rows of one epoch, class by class, ``(N,)``.

    A class goes round all its images in random order, then round again in another one; an epoch takes the next so many
    of this endless sequence.
    """
    counts, taken = classes.counts, drawn(classes.counts, exponent, epoch)
    first = drawn_before(counts, exponent, epoch)
    start_round = first // counts
    rounds = -(-(first + taken) // counts) - start_round  # that the epoch touches, of every class
    groups = np.repeat(np.arange(len(counts)), rounds)  # one for each of them
    round_numbers = np.arange(len(groups)) - np.repeat(np.cumsum(rounds) - rounds, rounds) + start_round[groups]
    sizes = counts[groups]
    ends = np.cumsum(sizes)
    member = np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)
    rows = classes.rows[np.repeat((np.cumsum(counts) - counts)[groups], sizes) + member]
    bits = hashed(seed, np.repeat(round_numbers, sizes), rows, STREAM)
    key = (np.repeat(np.arange(len(groups), dtype=np.uint64), sizes) << np.uint64(32)) | (bits >> np.uint64(32))
    shuffled: Rows = rows[np.argsort(key, kind="stable")]
    begins = np.cumsum(rounds * counts) - rounds * counts + first % counts
    offsets = np.cumsum(taken) - taken
    order: Rows = shuffled[np.arange(taken.sum()) - np.repeat(offsets - begins, taken)]
    return order


@dataclass(frozen=True)
class SampledOrder(TrainOrder):
    """`TrainOrder` with as many images an epoch, of which those of rare classes come several times.

    Attributes:
        classes: of the images.
        exponent: of the number of images of a class; its share of an epoch is proportional to that.
    """

    classes: Classes = field(compare=False, repr=False, kw_only=True)
    exponent: float = field(kw_only=True)

    def sequence(self, epoch: int) -> Rows:
        """The rows of the dataset in the order of an epoch, `images` of them."""
        rows = sampled(self.classes, self.exponent, self.seed, epoch)
        shuffled: Rows = rows[epoch_order(self.images, self.seed, epoch)]
        return shuffled

    def _item(self, order: np.ndarray, epoch: int, place: int, weight: float) -> Item:
        return Item(epoch, int(order[place]), weight, place=place)


def sampled_order(labels: np.ndarray, sampling: SamplingName, seed: int, batch: BatchPlan, rank: int) -> TrainOrder:
    """The order of a stage with ``--sampling`` other than shuffle, for images with the *labels* ``(N,)``."""
    return SampledOrder(len(labels), seed, batch, rank, classes=Classes.of(labels), exponent=EXPONENTS[sampling])


def times_drawn(counts: np.ndarray, sampling: SamplingName) -> np.ndarray:
    """How often an image of every class comes in an epoch, on average, ``(K,)``; 0 for a class without images."""
    present = counts > 0
    masses = np.where(present, counts.clip(min=1).astype(np.float64) ** EXPONENTS[sampling], 0.0)
    times: np.ndarray = counts.sum() * masses / masses.sum() / counts.clip(min=1)
    return times
