"""The order of the images: a pure function of (seed, epoch), the same for any number of processes.

Nothing here holds state, so a run can go on from any optimizer step and no generator has to be saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tuning.sizes import BatchPlan

Rows = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float32]
SIZE = 900  # stream of `uniform`; those below 100 belong to pictures, those from 1,000 on to forward passes


class Item(NamedTuple):
    """One place in a micro-batch.

    Attributes:
        epoch: pass over the data; with `row` it seeds every random draw for the image.
        row: of the dataset.
        weight: 1 = a real image of this step, 0 = filler that keeps the batch full (a short last window).
        content: the row itself where it has been read already; None = it is still to be read.
        place: in the epoch's order, of an image that may come more than once in it; None = it comes once.
    """

    epoch: int
    row: int
    weight: float
    content: Mapping[str, Any] | None = None
    place: int | None = None

    @property
    def draw(self) -> int:
        """What seeds every random draw for the image, with (seed, epoch): one of its own for every time it comes."""
        return self.row if self.place is None else self.place


def epoch_order(images: int, seed: int, epoch: int) -> Rows:
    """Permutation of ``range(images)`` for one epoch."""
    order: Rows = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(images)
    return order


def uniform(seed: int, epoch: int, index: np.ndarray, stream: int) -> np.ndarray:
    """Independent draws in [0, 1), one per image, as a hash of (seed, epoch, index, stream).

    Args:
        index: `Item.draw` of the images, shape ``(B,)``.
        stream: names the use (flips, crops, ...), so that uses are independent.
    """
    return (hashed(seed, epoch, index, stream) >> np.uint64(11)).astype(np.float64) / 2**53


def hashed(seed: int, epoch: int | np.ndarray, index: np.ndarray, stream: int) -> npt.NDArray[np.uint64]:
    """64 random bits for every index, also with an epoch for each; otherwise as `uniform`.

    SplitMix64 (Steele, Lea & Flood 2014) over the counters; no generator, hence nothing to save or to share.
    """
    state = np.zeros(len(index), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for counter in (seed, epoch, stream, index):
            state = _mix(state + np.asarray(counter, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return state


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _mix_one(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def step_seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """Seed of torch's generators for one forward pass (dropout, drop-path), in [0, 2^53)."""
    state = 0  # `uniform` for one index, without arrays: this is drawn once a forward pass
    for counter in (seed, step, 1_000 + micro_step, rank):
        state = _mix_one((state + counter + 0x9E3779B97F4A7C15) % 2**64)
    return state >> 11


def drawn_size(sizes: Sequence[int], seed: int, step: int) -> int:
    """One of *sizes* for optimizer step *step* of the run (0 the first), all with equal probability."""
    return sizes[int(uniform(seed, step, np.array([0]), SIZE)[0] * len(sizes))]


@dataclass(frozen=True)
class TrainOrder:
    """Which images every process sees in every forward pass of an epoch.

    An optimizer step takes the next `batch_size` images of the epoch's order. They are dealt out contiguously: first to
    forward pass 0 of rank 0, 1, ..., then to forward pass 1. The last step of an epoch may be short; its last forward
    pass is filled up with images from the start of the order at weight 0.
    """

    images: int
    seed: int
    batch: BatchPlan
    rank: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the images."""
        return self.batch.steps_per_epoch(self.images)

    def images_in(self, step: int) -> int:
        """Real images of optimizer step *step* of an epoch, over all processes."""
        return min(self.batch.batch_size, self.images - step * self.batch.batch_size)

    def sequence(self, epoch: int) -> Rows:
        """The rows of the dataset in the order of an epoch, `images` of them."""
        return epoch_order(self.images, self.seed, epoch)

    def rows(self, epoch: int, step: int) -> list[int]:
        """Rows of the dataset in optimizer step *step* of an epoch, over all processes."""
        start = step * self.batch.batch_size
        order = self.sequence(epoch)
        return [int(row) for row in order[start : start + self.images_in(step)]]

    def micro_batches(self, epoch: int, first_step: int = 0) -> Iterator[list[Item]]:
        """This process's micro-batches of an epoch, from optimizer step *first_step* on, all of full size."""
        order = self.sequence(epoch)
        for step in range(first_step, self.steps_per_epoch):
            for places, weights in self._step(step):
                both = zip(places.tolist(), weights.tolist(), strict=True)
                yield [self._item(order, epoch, place, weight) for place, weight in both]

    def indices(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Rows, Weights]]:
        """Rows and weights of `micro_batches`, ``(B,)`` each: without an object for every image."""
        order = self.sequence(epoch)
        for step in range(first_step, self.steps_per_epoch):
            for places, weights in self._step(step):
                yield order[places], weights

    def _step(self, step: int) -> Iterator[tuple[Rows, Weights]]:
        """Places in the epoch's order and weights, for each forward pass of this process."""
        micro, start, real = self.batch.micro_batch, step * self.batch.batch_size, self.images_in(step)
        for pass_number in range(self.batch.micro_steps(real)):
            first = (pass_number * self.batch.world_size + self.rank) * micro
            places = np.arange(first, first + micro)
            yield (start + places) % self.images, (places < real).astype(np.float32)

    def _item(self, order: np.ndarray, epoch: int, place: int, weight: float) -> Item:
        return Item(epoch, int(order[place]), weight)


@dataclass(frozen=True)
class EvalOrder:
    """Every image exactly once over all processes, in batches; filler at weight 0 keeps the processes equally long.

    Attributes:
        together: every process has images that follow each other, for data that is read in blocks; otherwise pieces of
            the result come in the order of the dataset.
    """

    images: int
    batch_size: int
    rank: int
    world_size: int
    together: bool = False

    def micro_batches(self) -> Iterator[list[Item]]:
        """This process's batches; the same number and sizes on every process."""
        share = -(-self.images // self.world_size)
        every = range(self.rank, self.rank + self.world_size * share, self.world_size)
        mine = range(self.rank * share, (self.rank + 1) * share) if self.together else every
        for first in range(0, share, self.batch_size):
            yield [self._item(index) for index in mine[first : first + self.batch_size]]

    def _item(self, index: int) -> Item:
        filler = self.images - 1 if self.together else index % self.images
        return Item(0, index if index < self.images else filler, float(index < self.images))


@dataclass(frozen=True)
class SameBatches(EvalOrder):
    """Every image once, in batches whose images depend on no number of processes: process r has the r-th of every W.

    Batches are equally large up to one image. A process that runs out of them repeats one at weight 0.
    """

    def micro_batches(self) -> Iterator[list[Item]]:
        """This process's batches, as many on every process."""
        batches = -(-self.images // self.batch_size)
        for number in range(self.rank, self.world_size * -(-batches // self.world_size), self.world_size):
            batch = number % batches
            first, end = (self.images * edge // batches for edge in (batch, batch + 1))
            yield [Item(0, row, float(number < batches)) for row in range(first, end)]
