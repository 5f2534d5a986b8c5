"""The steps of `scale_model` played event by event on W ranks: what stragglers and slow loaders add."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tests.benchmarks.scale_model import Step


@dataclass(frozen=True)
class Disturbance:
    """What goes otherwise than on paper.

    Attributes:
        jitter: standard deviation of log(seconds of a rank's passes), drawn for every rank and step; their mean stays.
        slow_rank: factor on the passes of rank 0.
        batch: seconds of a rank's loaders for the batch of one step; 0 = always there.
        ahead: batches that may lie ready.
    """

    jitter: float = 0.0
    slow_rank: float = 1.0
    batch: float = 0.0
    ahead: int = 2


def simulate(step: Step, world: int, steps: int, disturbed: Disturbance = Disturbance(), seed: int = 0) -> float:
    """Mean seconds of an optimizer step over *steps* of them."""
    return Simulation(step, world, steps, disturbed, seed).run() / steps


class Simulation:
    """Ranks, their loaders and one channel that reduces bucket after bucket.

    A bucket is reduced when every rank has it and the one before is through. A rank begins its next step when its own
    passes, the last bucket, and everybody's vote are through and it has updated.
    """

    def __init__(self, step: Step, world: int, steps: int, disturbed: Disturbance, seed: int) -> None:
        self.step, self.world, self.steps, self.disturbed = step, world, steps, disturbed
        self.random = random.Random(seed)
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self.batches, self.starved, self.making = [0] * world, [True] * world, [False] * world
        self.made, self.on_gpu = 0, 0.0
        self.vote_ends: float | None = None
        self._begin_step()

    def run(self) -> float:
        """Play all events; the time of the last."""
        for rank in range(self.world):
            self._make_batch(rank)
        while self._events:
            self.now, _, happens = heapq.heappop(self._events)
            happens()
        assert self.made == self.steps
        return self.now

    def _after(self, seconds: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._number), happens))

    # Loaders

    def _make_batch(self, rank: int) -> None:
        if self.making[rank] or self.batches[rank] >= self.disturbed.ahead:
            return
        self.making[rank] = True
        self._after(self.disturbed.batch, partial(self._batch_made, rank))

    def _batch_made(self, rank: int) -> None:
        self.making[rank] = False
        self.batches[rank] += 1
        if self.starved[rank]:
            self._start(rank)
        if self.made < self.steps:
            self._make_batch(rank)

    # Steps

    def _begin_step(self) -> None:
        self.missing = [self.world] * len(self.step.ready)  # ranks that don't have the bucket yet
        self.next_bucket, self.reducing = 0, False
        self.voting, self.computing = self.world, self.world
        self.on_gpu, self.vote_ends = self.now, None

    def _start(self, rank: int) -> None:
        if self.batches[rank] == 0:
            self.starved[rank] = True
            return
        self.starved[rank] = False
        self.batches[rank] -= 1
        self._make_batch(rank)
        slow = self.disturbed.slow_rank if rank == 0 else 1.0
        jitter = self.disturbed.jitter
        factor = slow * self.random.lognormvariate(-(jitter**2) / 2, jitter)
        for bucket, ready in enumerate(self.step.ready):
            self._after(factor * ready, partial(self._has_bucket, bucket))
        self._after(factor * self.step.host, self._votes)
        self._after(factor * self.step.compute, self._computed)

    def _has_bucket(self, bucket: int) -> None:
        self.missing[bucket] -= 1
        self._reduce()

    def _reduce(self) -> None:
        if self.reducing or self.next_bucket == len(self.missing) or self.missing[self.next_bucket]:
            return
        self.reducing = True
        self._after(self.step.reduces[self.next_bucket], self._reduced)

    def _reduced(self) -> None:
        self.reducing = False
        self.next_bucket += 1
        self.on_gpu = self.now
        self._reduce()
        self._perhaps_end()

    def _votes(self) -> None:
        self.voting -= 1
        if self.voting == 0:
            self._after(self.step.vote, self._voted)

    def _voted(self) -> None:
        self.vote_ends = self.now
        self._perhaps_end()

    def _computed(self) -> None:
        self.computing -= 1
        self.on_gpu = self.now
        self._perhaps_end()

    def _perhaps_end(self) -> None:
        """Let every rank go on when the last of what all wait for is through."""
        if self.computing or self.next_bucket < len(self.missing) or self.vote_ends is None:
            return
        ends = max(self.on_gpu + self.step.messages, self.vote_ends) + self.step.update
        self.made += 1
        if self.made == self.steps:
            self._after(ends - self.now, lambda: None)
            return
        self._begin_step()
        for rank in range(self.world):
            self._after(ends - self.now, partial(self._start, rank))
