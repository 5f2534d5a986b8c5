"""A short race between learning rates: who runs next, who won, and what a search may cost. Imports no torch.

A range test sees every learning rate for one step. Which of two rates is better after many steps it can't tell, so the
candidates around its answer train for some steps each, from the same start and on the same images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tuning.lr_curve import EXPLAINED, FLAT, SMALLEST_DROP

RUNGS_A_DECADE = 2
MOST = 7  # candidates
USUAL = 5  # candidates that a race is expected to need
FEWEST_STEPS, FEWEST_RACED = 30, 32  # of a sweep, of a candidate
SMALLEST_SEARCH = FEWEST_STEPS + USUAL * FEWEST_RACED  # optimizer steps; a search for less would be guesswork


@dataclass(frozen=True)
class Candidate:
    """One learning rate in the race.

    Attributes:
        lr: peak learning rate of the head.
        losses: of every step; fewer than `steps` if they diverged.
        steps: of the race.
    """

    lr: float
    losses: tuple[float, ...]
    steps: int

    @property
    def score(self) -> float:
        """Mean loss of the last third, each on images before it trains on them; infinite if it diverged."""
        if len(self.losses) < self.steps or not all(map(math.isfinite, self.losses)):
            return math.inf
        last = self.losses[-max(1, self.steps // 3) :]
        return sum(last) / len(last)


def rung_lr(centre: float, rung: float) -> float:
    """The learning rate *rung* half-decades above *centre*."""
    return centre * 10 ** (rung / RUNGS_A_DECADE)


def next_rung(scores: Mapping[int, float], centre: float, low: float, high: float) -> int | None:
    """Who runs next: the centre, one beside it, then on beside the best so far; None when that has both neighbours.

    Args:
        scores: of the rungs that ran, lower is better.
        low, high: learning rates that no candidate goes beyond.
    """
    if not scores:
        return 0
    if len(scores) >= MOST:
        return None
    best = min(scores, key=lambda rung: (scores[rung], abs(rung)))
    beside = [rung for rung in (best - 1, best + 1) if rung not in scores]
    inside = [rung for rung in beside if low * 0.999 <= rung_lr(centre, rung) <= high * 1.001]
    return inside[0] if inside else None


def winner(candidates: Sequence[Candidate]) -> tuple[float | None, str]:
    """The learning rate at which the score is lowest; or None and why.

    It is that of the best candidate, moved to the bottom of the parabola through its score and those of its neighbours
    over the log of the learning rate, by a quarter of a decade at most. None when all diverged, or when the loss of the
    best ends less than 5 % below that of the first steps.
    """
    place = min(range(len(candidates)), key=lambda number: candidates[number].score)
    best = candidates[place]
    if math.isinf(best.score):
        return None, f"all diverge: every candidate from {candidates[0].lr:.1e} to {candidates[-1].lr:.1e}"
    first = best.losses[: max(1, best.steps // 10)]
    level = sum(first) / len(first)
    if level - best.score < SMALLEST_DROP * abs(level):
        return None, f"{FLAT}: {EXPLAINED[FLAT]}"
    beside = [candidates[number].score for number in (place - 1, place + 1) if 0 <= number < len(candidates)]
    return rung_lr(best.lr, _bottom(beside[0], best.score, beside[1]) if len(beside) == 2 else 0.0), ""


def _bottom(below: float, best: float, above: float) -> float:
    """Where the parabola through three scores is lowest, in rungs from the middle one, which is the lowest of them."""
    bend = below - 2 * best + above
    if math.isinf(bend):  # one of them diverged: as near to the other as the bottom can be
        return 0.0 if below == above else -0.5 if above > below else 0.5
    return 0.5 * (below - above) / bend if bend > 0 else 0.0


def affordable(planned: int, share: float, steps: int, sweeps: int, raced: int) -> tuple[int, int, int]:
    """(steps a sweep, sweeps, steps a candidate) of a search that costs a *share* of the run's *planned* steps.

    Never less than `SMALLEST_SEARCH` steps: with less there is no answer worth having. A race gets what five candidates
    need, sweeps the rest; sweeps are given up before they get shorter than 30 steps.
    """
    budget = max(SMALLEST_SEARCH, int(share * planned))
    if raced:
        raced = min(raced, max(FEWEST_RACED, (budget - FEWEST_STEPS * sweeps) // USUAL))
    left = max(FEWEST_STEPS, budget - USUAL * raced)
    sweeps = max(1, min(sweeps, left // min(steps, FEWEST_STEPS)))
    return min(steps, left // sweeps), sweeps, raced
