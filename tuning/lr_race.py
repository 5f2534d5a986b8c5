"""A short race between learning rates: who runs next, who won, and what a search may cost. Imports no torch.

A range test sees every learning rate for one step. Which of two rates is better after many steps it can't tell, so the
candidates around its answer train for some steps each, from the same start and on the same images; then the evaluation
images judge them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

RUNGS_A_DECADE = 4
WIDE = 2  # rungs between the first candidates; those beside the best of them come last
MOST = 9  # candidates
USUAL = 6  # candidates that a race is expected to need
FEWEST_STEPS, FEWEST_RACED = 30, 40  # of a sweep, of a candidate
SMALLEST_SEARCH = FEWEST_STEPS + USUAL * FEWEST_RACED  # optimizer steps; a search for less would be guesswork
CLEARLY = 3.0  # standard errors that the winner must be better than the start


@dataclass(frozen=True)
class Candidate:
    """One learning rate in the race.

    Attributes:
        lr: peak learning rate of the head.
        steps: that it trained; fewer than those of the race if it diverged.
        judged: loss of every evaluation image afterwards; empty if it diverged.
    """

    lr: float
    steps: int
    judged: tuple[float, ...]

    @property
    def score(self) -> float:
        """Mean loss of the evaluation images; infinite if it diverged."""
        mean = sum(self.judged) / len(self.judged) if self.judged else math.inf
        return mean if math.isfinite(mean) else math.inf

    def record(self) -> dict[str, float]:
        """For ``metrics.jsonl``."""
        place = {"lr_finder/race_lr": self.lr, "lr_finder/log10_lr": math.log10(self.lr)}
        return {**place, "lr_finder/race_loss": self.score}


def rung_lr(centre: float, rung: int) -> float:
    """The learning rate *rung* quarters of a decade above *centre*."""
    return centre * 10 ** (rung / RUNGS_A_DECADE)


def next_rung(scores: Mapping[int, float], centre: float, low: float, high: float) -> int | None:
    """Who runs next, in quarters of a decade from the centre; None when the race is over.

    The centre, then one half a decade away, then on beside the best of these until it has both neighbours, or the
    lowest while all diverge; then the two a quarter of a decade beside it.

    Args:
        scores: of the rungs that ran, lower is better, infinite if they diverged.
        low, high: learning rates that no candidate goes beyond.
    """
    if not scores:
        return 0
    if len(scores) >= MOST:
        return None
    wide = [rung for rung in scores if rung % WIDE == 0]
    best = min(wide, key=lambda rung: (scores[rung], abs(rung) if math.isfinite(scores[rung]) else rung))
    beside = [best - WIDE, best + WIDE] if math.isinf(scores[best]) else [best - WIDE, best + WIDE, best - 1, best + 1]
    left = [rung for rung in beside if rung not in scores and low * 0.999 <= rung_lr(centre, rung) <= high * 1.001]
    return left[0] if left else None


def winner(candidates: Sequence[Candidate], start: Sequence[float]) -> tuple[float | None, str]:
    """The learning rate that gains most on *start*, its neighbours counting half as much each; or None and why.

    One trial has luck; a learning rate in the middle of others that do well has less need of it. None when all
    diverged, when not one is clearly better than the start (the mean over the images of what it gained is above three
    standard errors of that mean), and when the winner is clearly better but neither neighbour is.

    Args:
        candidates: lowest learning rate first.
        start: loss of every evaluation image before any training, the same images in the same order.
    """
    if all(math.isinf(candidate.score) for candidate in candidates):
        return None, f"all diverge: every candidate from {candidates[0].lr:.1e} to {candidates[-1].lr:.1e}"
    gains = [_gain(candidate, start) for candidate in candidates]
    clear = [_is_clear(candidate, start) for candidate in candidates]
    best = max(range(len(gains)), key=lambda place: (clear[place], _with_neighbours(gains, place)))
    lr, steps = candidates[best].lr, candidates[best].steps
    if not clear[best]:
        told = f"after {steps} steps no candidate is clearly better on the {len(start)} evaluation images than before"
        return None, f"nothing learned: {told}"
    if len(clear) > 1 and not any(_beside(clear, best)):
        return None, f"chance: after {steps} steps {lr:.1e} is clearly better than before, those beside it are not"
    return lr, ""


def _gain(candidate: Candidate, start: Sequence[float]) -> float:
    """Mean of what the images gained, 0 for what got worse: how much worse is of no interest."""
    return max(0.0, sum(start) / len(start) - candidate.score)


def _is_clear(candidate: Candidate, start: Sequence[float]) -> bool:
    if math.isinf(candidate.score):
        return False
    gains = [before - after for before, after in zip(start, candidate.judged, strict=True)]
    mean = sum(gains) / len(gains)
    error = math.sqrt(sum((gain - mean) ** 2 for gain in gains) / max(1, len(gains) - 1) / len(gains))
    return mean > CLEARLY * error


def _beside(values: Sequence[T], place: int) -> list[T]:
    return [values[number] for number in (place - 1, place + 1) if 0 <= number < len(values)]


def _with_neighbours(gains: Sequence[float], place: int) -> float:
    """One that has no neighbour on a side is taken for its own."""
    beside = _beside(gains, place)
    return (sum(beside) + (4 - len(beside)) * gains[place]) / 4


def affordable(planned: int, share: float, steps: int, sweeps: int, raced: int) -> tuple[int, int, int]:
    """(steps a sweep, sweeps, steps a candidate) of a search that costs a *share* of the run's *planned* steps.

    Never less than `SMALLEST_SEARCH` steps: with less there is no answer worth having. A race gets what six candidates
    need, sweeps the rest; sweeps are given up before they get shorter than 30 steps.
    """
    budget = max(SMALLEST_SEARCH, int(share * planned))
    if raced:
        raced = min(raced, max(FEWEST_RACED, (budget - FEWEST_STEPS * sweeps) // USUAL))
    left = max(FEWEST_STEPS, budget - USUAL * raced)
    sweeps = max(1, min(sweeps, left // min(steps, FEWEST_STEPS)))
    return min(steps, left // sweeps), sweeps, raced
