"""An order of the images for data that can only be read in blocks: shuffled, but near to how it lies.

Like `sampling.TrainOrder` a pure function of (seed, epoch, step), the same images in every optimizer step on any number
of processes. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from tuning.data.sampling import Item, Rows, TrainOrder, Weights
from tuning.sizes import BatchPlan

MOST_LANES = 64  # a power of two: so many processes can each have data of their own
STREAM = 3  # of the generator; 0 draws the order of `sampling`, 1 and 2 belong to mixing


@dataclass(frozen=True)
class Blocks:
    """Rows that are read together, such as the row groups of parquet files.

    Attributes:
        starts: first row of every block, ascending, and the number of rows at the end, ``(G + 1,)``.
        held: blocks that all processes together keep in memory to shuffle.
    """

    starts: Rows
    held: int

    def __len__(self) -> int:
        return len(self.starts) - 1


@dataclass(frozen=True)
class LocalOrder(TrainOrder):
    """Which images every process sees, where a process should read few blocks at a time, and each block once.

    The blocks of an epoch are shuffled and laid end to end. Every few that follow each other are a *window*, in which
    the rows are shuffled. This sequence is cut into `lanes` equal parts; an optimizer step takes the next few rows of
    each. Its images are dealt out by lane: with as many processes as divide `lanes`, each has lanes of its own, and
    reads its own part of the data. (In the short last step of an epoch a few images come from a neighbour's lanes, so
    that forward passes are the same on any number of processes.)
    """

    blocks: Blocks = field(compare=False, kw_only=True)

    @property
    def lanes(self) -> int:
        """Places of the data that a step takes images from; a power of two that divides the batch."""
        lanes = math.gcd(self.batch.batch_size, MOST_LANES)
        while lanes > max(1, self.blocks.held):
            lanes //= 2
        return lanes

    @property
    def window(self) -> int:
        """Blocks whose rows are shuffled together."""
        return max(1, self.blocks.held // self.lanes)

    @property
    def share(self) -> float:
        """Part of the lanes that this process takes images from."""
        first, end = (n * self.lanes / self.batch.world_size for n in (self.rank, self.rank + 1))
        return (math.ceil(end) - math.floor(first)) / self.lanes

    def rows(self, epoch: int, step: int) -> list[int]:
        """Rows of the dataset in optimizer step *step* of an epoch, over all processes."""
        sequence = _Sequence(self, epoch)
        return [int(row) for row in sequence.rows(sequence.places(step))]

    def micro_batches(self, epoch: int, first_step: int = 0) -> Iterator[list[Item]]:
        """This process's micro-batches of an epoch, from optimizer step *first_step* on, all of full size."""
        for rows, weights in self.indices(epoch, first_step):
            both = zip(rows.tolist(), weights.tolist(), strict=True)
            yield [Item(epoch, row, weight) for row, weight in both]

    def indices(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Rows, Weights]]:
        """Rows and weights of `micro_batches`, ``(B,)`` each."""
        sequence = _Sequence(self, epoch)
        for step in range(first_step, self.steps_per_epoch):
            yield from self._dealt(sequence, step)

    def _dealt(self, sequence: _Sequence, step: int) -> Iterator[tuple[Rows, Weights]]:
        """A process's forward passes lie side by side, unlike those of `TrainOrder`.

        Filler repeats the last rows of the step; a forward pass of nothing else, what this process has at hand.
        """
        places = sequence.places(step)
        real, micro = len(places), self.batch.micro_batch
        passes = self.batch.micro_steps(real)
        for number in range(self.rank * passes, (self.rank + 1) * passes):
            among = np.arange(number * micro, (number + 1) * micro)
            filled = places[np.where(among < real, among, real - 1 - (among - real) % real)]
            if among[0] >= real:
                filled = sequence.places(step - 1)[self.rank * self.batch.accumulation * micro :][:micro]
            yield sequence.rows(filled), (among < real).astype(np.float32)


class _Sequence:
    """The rows of one epoch in order, worked out window by window."""

    def __init__(self, order: LocalOrder, epoch: int) -> None:
        self._order, self._key = order, [order.seed, epoch]
        starts = order.blocks.starts
        self._blocks = self._generator(0).permutation(len(order.blocks))
        ends = np.cumsum(np.diff(starts)[self._blocks])
        last = np.arange(order.window, len(ends) + order.window, order.window) - 1  # block of every window
        self._ends = ends[np.minimum(last, len(ends) - 1)]
        self._window = lru_cache(2 * order.lanes)(self._shuffled)

    def places(self, step: int) -> Rows:
        """Where the real images of a step are in the sequence, lane by lane."""
        order = self._order
        bounds = np.arange(order.lanes + 1) * order.images // order.lanes
        each = order.batch.batch_size // order.lanes
        places = bounds[:-1, None] + np.arange(step * each, (step + 1) * each)
        return places[places < bounds[1:, None]]

    def rows(self, places: Rows) -> Rows:
        """Rows of the dataset at these places."""
        windows = np.searchsorted(self._ends, places, side="right")
        rows = np.empty_like(places)
        for window in np.unique(windows):
            there = windows == window
            first = self._ends[window - 1] if window else 0
            rows[there] = self._window(int(window))[places[there] - first]
        return rows

    def _shuffled(self, window: int) -> Rows:
        blocks, starts, size = self._blocks, self._order.blocks.starts, self._order.window
        some = blocks[window * size : (window + 1) * size]
        rows: Rows = np.concatenate([np.arange(starts[block], starts[block + 1]) for block in some])
        return self._generator(window + 1).permutation(rows)

    def _generator(self, use: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=self._key, counter=[0, use, 0, STREAM]))


def train_order(images: int, seed: int, batch: BatchPlan, rank: int, blocks: Blocks | None) -> TrainOrder:
    """The order of a stage: near to the blocks of the data where it has any."""
    if blocks is None:
        return TrainOrder(images, seed, batch, rank)
    return LocalOrder(images, seed, batch, rank, blocks=blocks)
