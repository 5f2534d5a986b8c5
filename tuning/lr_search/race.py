"""A short race between learning rates: who runs next, who won, and what a search may cost. Imports no torch.

A range test sees every learning rate for one step. Which of two rates is better after many steps it can't tell, so the
candidates around its answer train for some steps each, from the same start and on the same images; then the evaluation
images judge them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LADDER = 1, 2, 3, 6  # of every decade: about a quarter of it apart, and numbers that one types
WIDE = 2  # rungs between the first candidates; those beside the best of them come last
MOST = 9  # candidates
WHOLE, PART = 100, 50  # steps of a stage that is raced whole without being asked; of a candidate in one that is longer
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
        reached: the metric that chooses ``model/``, higher is better; minus infinity if it diverged.
    """

    lr: float
    steps: int
    judged: tuple[float, ...]
    reached: float = -math.inf

    @property
    def score(self) -> float:
        """Mean loss of the evaluation images; infinite if it diverged."""
        mean = sum(self.judged) / len(self.judged) if self.judged else math.inf
        return mean if math.isfinite(mean) else math.inf

    def record(self) -> dict[str, float]:
        """For ``metrics.jsonl``."""
        place = {"lr_finder/race_lr": self.lr, "lr_finder/log10_lr": math.log10(self.lr)}
        return {**place, "lr_finder/race_loss": self.score, "lr_finder/race_reached": self.reached}


def rung_lr(centre: float, rung: int) -> float:
    """The learning rate *rung* rungs of `LADDER` above the 1 or 3 of a decade that is nearest to *centre*."""
    first = WIDE * round(math.log10(centre) * len(LADDER) / WIDE)
    decade, place = divmod(first + rung, len(LADDER))
    return float(f"{LADDER[place]}e{decade}")


def next_rung(scores: Mapping[int, float], centre: float, low: float, high: float) -> int | None:
    """Who runs next, in rungs from the centre, about quarters of a decade; None when the race is over.

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


def winner(candidates: Sequence[Candidate], start: Sequence[float], whole: bool) -> tuple[float | None, str]:
    """The middle, on the log axis, of the best learning rate and those beside it that are as good; or None and why.

    After a *whole* race there is nothing to conclude: every candidate has been the run, and what reached most wins.

    As good: the mean over the images of what the best is ahead is within a standard error of that mean, and so for all
    between. None when all diverged; when the best is not clearly better than the start, by three standard errors; and
    when it is, but neither neighbour: one trial has luck, a learning rate among others that learn has less need of it.

    Args:
        candidates: lowest learning rate first.
        start: loss of every evaluation image before any training, the same images in the same order.
        whole: the candidates trained the stage to its end, exactly as the run will.
    """
    best = min(range(len(candidates)), key=lambda place: candidates[place].score)
    first, lr, steps = candidates[0].lr, candidates[best].lr, candidates[best].steps
    if math.isinf(candidates[best].score):
        return None, f"all diverge: every candidate from {first:.1e} to {candidates[-1].lr:.1e}"
    clear = [_ahead(candidate.judged, start) > CLEARLY for candidate in candidates]
    if not clear[best]:
        told = f"after {steps} steps no candidate is clearly better on the {len(start)} evaluation images than before"
        return None, f"nothing learned: {told}"
    if len(clear) > 1 and not any(clear[place] for place in (best - 1, best + 1) if 0 <= place < len(clear)):
        return None, f"chance: after {steps} steps {lr:.1e} is clearly better than before, those beside it are not"
    if whole:
        return max(candidates, key=lambda candidate: (candidate.reached, -candidate.score)).lr, ""
    alike = [candidate.lr for candidate in _alike(candidates, best)]
    return math.exp(sum(map(math.log, alike)) / len(alike)), ""


def _alike(candidates: Sequence[Candidate], best: int) -> Sequence[Candidate]:
    """The best and, on either side, those that follow on it as long as it is not ahead of them by a standard error."""

    def is_alike(place: int) -> bool:
        inside = 0 <= place < len(candidates) and bool(candidates[place].judged)
        return inside and _ahead(candidates[best].judged, candidates[place].judged) <= 1

    low = high = best
    while is_alike(low - 1):
        low -= 1
    while is_alike(high + 1):
        high += 1
    return candidates[low : high + 1]


def _ahead(losses: Sequence[float], others: Sequence[float]) -> float:
    """By how many standard errors of the mean difference *losses* are below *others*, image by image; below 0 if not.

    Losses of a trial that diverged, of which there are none, are far behind.
    """
    if not losses:
        return -math.inf
    differences = [other - loss for loss, other in zip(losses, others, strict=True)]
    mean = sum(differences) / len(differences)
    variance = sum((difference - mean) ** 2 for difference in differences) / max(1, len(differences) - 1)
    error = math.sqrt(variance / len(differences))
    return mean / error if error else math.copysign(math.inf, mean) if mean else 0.0


def affordable(planned: int, share: float, steps: int, sweeps: int, raced: int) -> tuple[int, int, int]:
    """(steps a sweep, sweeps, steps a candidate) of a search that costs a *share* of the run's *planned* steps.

    For races that are not whole. Never less than `SMALLEST_SEARCH` steps: with less there is no answer worth having. A
    race gets what six candidates need, sweeps the rest; sweeps are given up before they get shorter than 30 steps.
    """
    budget = max(SMALLEST_SEARCH, int(share * planned))
    if raced:
        raced = min(raced, max(FEWEST_RACED, (budget - FEWEST_STEPS * sweeps) // USUAL))
    left = max(FEWEST_STEPS, budget - USUAL * raced)
    sweeps = max(1, min(sweeps, left // min(steps, FEWEST_STEPS)))
    return min(steps, left // sweeps), sweeps, raced
