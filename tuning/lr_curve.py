"""What a learning rate range test says: suggestions from loss curves, or plainly that they hold no confident answer.

A curve is the loss of one optimizer step at each of exponentially rising learning rates (Smith 2017,
arXiv:1506.01186). Imports no torch.

How `suggest` chooses: the middle one of `valley`, `steep` and `minimum`, so that one rule that goes astray is outvoted.
How `band` chooses: the median of what the sweeps chose, if most of them chose and all of those lie within a decade.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
Curve = tuple[Sequence[float], Sequence[float]]  # learning rates, losses

FEWEST_POINTS = 8
SMOOTHING_DECADES = 0.6  # of learning rate, over which the moving average forgets
SMALLEST_DROP = 0.05  # of the first level of the loss
SUREST_DROP = 5.0  # standard errors
STRAIGHTEST_DROP = 0.5  # way down in all / length of the way
WIDEST_BAND = 10.0  # highest / lowest choice of several sweeps
SLIDE_POINTS, SLIDE_THRESHOLD = 15, 0.005  # of fastai

TOO_SHORT, FLAT, NOISY = "too few points", "flat", "noisy"
DIVERGES, EDGE = "diverges at once", "minimum at the edge"
EXPLAINED = {
    TOO_SHORT: f"fewer than {FEWEST_POINTS} steps had a finite loss",
    FLAT: f"the loss falls by less than {SMALLEST_DROP:.0%} anywhere",
    NOISY: "the fall of the loss doesn't stand out from its noise; more images a step or more steps may help",
    DIVERGES: "the loss rises from the first steps on; begin at a lower learning rate",
    EDGE: "the loss still falls at the highest learning rate; end at a higher one",
}


@dataclass(frozen=True)
class Suggestion:
    """What the rules say of one curve, as learning rates; None where there is no answer.

    Attributes:
        valley: in the middle third of the longest fall (fastai's ``valley``).
        steep: where the loss falls fastest on the axis of log LR (fastai's ``steep``).
        slide: left of the last rise, by fastai's ``slide``; None also for curves too short for it.
        minimum: a tenth of that of the lowest loss (fastai's ``minimum``).
        chosen: the middle one of valley, steep and minimum, if the curve is fit for an answer.
        reason: why `chosen` is None: a key of `EXPLAINED`; empty with an answer.
    """

    valley: float | None = None
    steep: float | None = None
    slide: float | None = None
    minimum: float | None = None
    chosen: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Band:
    """What several sweeps say together.

    Attributes:
        chosen: median of their choices on the log axis; None without a confident answer.
        low, high: the lowest and the highest choice; None where no sweep chose.
        reason: why there is no confident answer; empty with one.
        suggestions: of every sweep.
    """

    chosen: float | None
    low: float | None
    high: float | None
    reason: str
    suggestions: tuple[Suggestion, ...]


def suggest(lrs: Sequence[float], losses: Sequence[float]) -> Suggestion:
    """Suggestions of one curve as it stands: smooth it first (`smoothed`); it ends before the first NaN or infinity.

    There is no confident answer for a curve of fewer than 8 finite points, or whose loss falls by less than 5 % of its
    first level or not clearly (`_is_noisy`). One that still falls at its upper edge, by 5 % of its whole fall over the
    last tenth of the points, leaves the rules as they are but no choice. Raises ValueError for learning rates that
    don't rise from above 0, or lengths that differ.
    """
    x, y = _checked(lrs, losses)
    x, y, broke = _finite_part(x, y)
    reason = _why_unfit(y, broke)
    if reason not in ("", EDGE):
        return Suggestion(reason=reason)
    rules = {"valley": valley(x, y), "steep": steep(x, y), "slide": slide(x, y), "minimum": minimum(x, y)}
    middle = sorted((rules["valley"] or 0.0, rules["steep"] or 0.0, rules["minimum"] or 0.0))[1]
    return Suggestion(**rules, chosen=None if reason else middle, reason=reason)


def band(curves: Sequence[Curve]) -> Band:
    """One answer from several sweeps, each with other images: their losses as measured, not smoothed.

    The first tenth of each is left out, where the moving average has seen few losses. Raises ValueError for no curve.
    """
    if not curves:
        raise ValueError("a band needs at least one curve")
    suggestions = tuple(_read(*_checked(*curve)) for curve in curves)
    chosen = sorted(s.chosen for s in suggestions if s.chosen is not None)
    low, high = (chosen[0], chosen[-1]) if chosen else (None, None)
    reason = _why_no_band(suggestions, chosen)
    middle = None if reason else math.sqrt(chosen[(len(chosen) - 1) // 2] * chosen[len(chosen) // 2])
    return Band(middle, low, high, reason, suggestions)


def _read(lrs: Values, losses: Values) -> Suggestion:
    _, y, broke = _finite_part(lrs, losses)
    if len(y) >= FEWEST_POINTS and _is_noisy(y):
        return Suggestion(reason=_why_unfit(y, broke) or NOISY)
    skipped, smooth = len(y) // 10, smoothed(losses, smoothing(lrs))
    return suggest(list(lrs[skipped:]), list(smooth[skipped:]))


def _why_no_band(suggestions: Sequence[Suggestion], chosen: Sequence[float]) -> str:
    if 2 * len(chosen) <= len(suggestions):
        ((reason, times),) = Counter(s.reason for s in suggestions if s.reason).most_common(1)
        where = "" if len(suggestions) == 1 else f" ({times} of {len(suggestions)} sweeps)"
        return f"{reason}: {EXPLAINED[reason]}{where}"
    if chosen[-1] > WIDEST_BAND * chosen[0]:
        return f"sweeps disagree: they chose from {chosen[0]:.1e} to {chosen[-1]:.1e}"
    return ""


def smoothing(lrs: Sequence[float] | Values) -> float:
    """The factor of the moving average for these learning rates: it forgets within 0.6 decades, however many steps."""
    if len(lrs) < 2:
        return 0.0
    decades = math.log10(lrs[-1] / lrs[0]) / (len(lrs) - 1)
    return min(max(1 - decades / SMOOTHING_DECADES, 0.0), 0.98)


def smoothed(losses: Sequence[float] | Values, beta: float) -> Values:
    """Exponential moving average with bias correction, ``m_t = beta * m + (1 - beta) * loss; m_t / (1 - beta^t)``.

    NaN and infinity stay what they are from there on.
    """
    mean, values = 0.0, np.empty(len(losses))
    for step, loss in enumerate(losses):
        mean = beta * mean + (1 - beta) * float(loss)
        values[step] = mean / (1 - beta ** (step + 1))
    return values


def valley(lrs: Values, losses: Values) -> float | None:
    """The learning rate in the middle third of the longest fall; None where nothing falls.

    The longest fall is the longest decreasing subsequence, which skips what rises in between. As fastai's ``valley``.
    """
    lengths = np.ones(len(losses), dtype=np.int64)
    for i in range(1, len(losses)):
        above = lengths[:i][losses[:i] > losses[i]]
        lengths[i] = above.max() + 1 if len(above) else 1
    end = int(lengths.argmax())
    if lengths[end] < 2:
        return None
    third = lengths[end] / 3
    return float(lrs[end - lengths[end] + int(third) + int(third / 2)])


def steep(lrs: Values, losses: Values) -> float | None:
    """The learning rate from which the loss falls fastest on the axis of log LR; None where nothing falls."""
    slopes = np.diff(losses) / np.diff(np.log(lrs))
    place = int(slopes.argmin())
    return float(lrs[place]) if slopes[place] < 0 else None


def slide(lrs: Values, losses: Values) -> float | None:
    """fastai's interval slide rule: from the right end left, until two slopes 15 points apart are alike."""
    if len(losses) < SLIDE_POINTS + 2:
        return None
    slopes = np.gradient(losses)
    right = len(losses) - 1
    found = lrs[right - SLIDE_POINTS]
    while right >= SLIDE_POINTS and abs(slopes[right] - slopes[right - SLIDE_POINTS]) > SLIDE_THRESHOLD:
        found = lrs[right - SLIDE_POINTS]
        right -= 1
    return float(found)


def minimum(lrs: Values, losses: Values) -> float:
    """A tenth of the learning rate at the lowest loss."""
    return float(lrs[losses.argmin()]) / 10


def _checked(lrs: Sequence[float] | Values, losses: Sequence[float] | Values) -> tuple[Values, Values]:
    x, y = np.asarray(lrs, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"a curve needs as many losses as learning rates, got {y.shape} and {x.shape}")
    if len(x) and not (np.isfinite(x).all() and x[0] > 0 and (np.diff(x) > 0).all()):
        raise ValueError("the learning rates of a sweep must be finite and rise from above 0")
    return x, y


def _finite_part(lrs: Values, losses: Values) -> tuple[Values, Values, bool]:
    """The curve up to the first loss that is not finite, and whether there was one."""
    broken = np.flatnonzero(~np.isfinite(losses))
    end = int(broken[0]) if len(broken) else len(losses)
    return lrs[:end], losses[:end], bool(len(broken))


def _why_unfit(losses: Values, broke: bool) -> str:
    if len(losses) < FEWEST_POINTS:
        return DIVERGES if broke else TOO_SHORT
    level, lowest = _first_level(losses), int(losses.argmin())
    if level - losses[lowest] < SMALLEST_DROP * abs(level):
        return DIVERGES if _rises_early(losses, level) else FLAT
    if _is_noisy(losses):
        return DIVERGES if _rises_early(losses, level) else NOISY
    little = SMALLEST_DROP * (level - losses[lowest])
    at_edge = lowest >= len(losses) - 2 and losses[-1] - losses[lowest] < little and not broke  # else it broke there
    return EDGE if at_edge and losses[-1 - _window(losses)] - losses[lowest] > little else ""  # or has found its floor


def _rises_early(losses: Values, level: float) -> bool:
    """Whether the loss is beyond 1.5 times its first level in the first half, and stays there."""
    low = np.flatnonzero(losses <= 1.5 * abs(level))
    return len(low) == 0 or bool(low[-1] < len(losses) / 2)


def _window(losses: Values) -> int:
    return max(3, len(losses) // 10)


def _first_level(losses: Values) -> float:
    return float(np.median(losses[: _window(losses)]))


def _is_noisy(losses: Values) -> bool:
    """Whether the way down to the lowest part is within chance, or more up and down than down.

    Parts are windows of a tenth of the points. Chance: fewer than 5 standard errors, the noise of a loss estimated from
    the differences of neighbours.
    """
    window = _window(losses)
    means = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    lowest = int(means.argmin())
    drop = means[0] - means[lowest]
    neighbours = np.diff(losses[: max(lowest + window, len(losses) // 2)])
    spread = 1.4826 * float(np.median(np.abs(neighbours - np.median(neighbours)))) / math.sqrt(2)
    if drop <= 0 or drop < SUREST_DROP * spread * math.sqrt(2 / window):
        return True
    way = np.append(means[:lowest:window], means[lowest])
    return bool(drop < STRAIGHTEST_DROP * np.abs(np.diff(way)).sum())
