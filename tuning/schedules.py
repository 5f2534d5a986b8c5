"""Learning rate schedules: pure functions from the optimizer step to a factor of the peak learning rate.

Every constructor checks its arguments and returns ``schedule(step) -> factor``; ``step`` counts optimizer steps from
0 and the factor lies in [0, 1]. Nothing holds state, so a resumed run needs the step and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def constant() -> Schedule:
    """The peak learning rate at every step: ``factor = 1``."""
    return lambda step: 1.0


def cosine(steps: int, floor: float = 0.0) -> Schedule:
    """Half a cosine from the peak at step 0 to *floor* at step *steps*, and *floor* from there on.

    ``factor = floor + (1 - floor) * (1 + cos(pi * step / steps)) / 2``

    Args: *steps* in optimizer steps; *floor* as a fraction of the peak. Raises ValueError on a bad value.
    """
    _check_count("steps", steps)
    _check_fraction("floor", floor)
    return lambda step: _anneal(1.0, floor, min(step / steps, 1.0))


def sgdr(first_cycle: int, mult: int = 1, floor: float = 0.0, peak_decay: float = 1.0) -> Schedule:
    """Cosine annealing with warm restarts; cycle k lasts ``first_cycle * mult**k`` steps.

    ``factor = floor + (peak_decay**k - floor) * (1 + cos(pi * t / T_k)) / 2``, t steps into cycle k of length T_k.

    Args: *first_cycle* in optimizer steps; *floor* as a fraction of the peak; *peak_decay* multiplies the peak of
    every restart (it never falls below the floor). Raises ValueError on a bad value. Loshchilov and Hutter 2017,
    arXiv:1608.03983.
    """
    _check_count("first_cycle", first_cycle)
    _check_count("mult", mult)
    _check_fraction("floor", floor)
    _check_fraction("peak_decay", peak_decay)

    def factor(step: int) -> float:
        cycle, start, length = _cycle_of(step, first_cycle, mult)
        return _anneal(max(peak_decay**cycle, floor), floor, (step - start) / length)

    return factor


def restarts(first_cycle: int, mult: int, steps: int) -> list[int]:
    """The steps in ``(0, steps)`` at which ``sgdr(first_cycle, mult)`` jumps back to its peak."""
    _check_count("first_cycle", first_cycle)
    _check_count("mult", mult)
    found, length = [], first_cycle
    step = first_cycle
    while step < steps:
        found.append(step)
        length *= mult
        step += length
    return found


def one_cycle(steps: int, warm_fraction: float = 0.3, start: float = 1 / 25, floor: float = 4e-6) -> Schedule:
    """Cosine rise from *start* to the peak over *warm_fraction* of the steps, then cosine fall to *floor* at the last.

    The defaults equal ``torch.optim.lr_scheduler.OneCycleLR`` (``div_factor=25, final_div_factor=1e4``). The floor
    stays after the end.

    Args: *steps* in optimizer steps; *start* and *floor* as fractions of the peak. Raises ValueError on a bad value.
    Smith and Topin 2018, arXiv:1708.07120.
    """
    _check_count("steps", steps)
    for name, value in (("warm_fraction", warm_fraction), ("start", start), ("floor", floor)):
        _check_fraction(name, value)
    peak_step = warm_fraction * steps - 1
    last = steps - 1

    def factor(step: int) -> float:
        if step < peak_step:
            return _anneal(start, 1.0, step / peak_step)
        if step >= last > peak_step:
            return floor
        return _anneal(1.0, floor, (step - peak_step) / (last - peak_step)) if step < last else 1.0

    return factor


def step_decay(every: int, gamma: float = 0.1) -> Schedule:
    """A staircase: ``factor = gamma ** (step // every)``.

    Args: *every* in optimizer steps; *gamma* in [0, 1]. Raises ValueError on a bad value.
    """
    _check_count("every", every)
    _check_fraction("gamma", gamma)
    return lambda step: float(gamma ** (step // every))


def triangular(half_cycle: int, floor: float = 0.0) -> Schedule:
    """Straight up from *floor* to the peak in *half_cycle* steps, straight down in as many, and again.

    ``factor = floor + (1 - floor) * (1 - |(step mod 2h) / h - 1|)`` with h = *half_cycle*.

    Args: *half_cycle* in optimizer steps; *floor* as a fraction of the peak. Raises ValueError on a bad value. Smith
    2017, arXiv:1506.01186.
    """
    _check_count("half_cycle", half_cycle)
    _check_fraction("floor", floor)
    return lambda step: floor + (1 - floor) * (1 - abs(step % (2 * half_cycle) / half_cycle - 1))


def exponential_rise(steps: int, start: float, end: float) -> Schedule:
    """The sweep of a learning rate range test: ``start * (end / start) ** (step / (steps - 1))``, *end* from there on.

    Args: *steps* in optimizer steps, at least 2; 0 < *start* < *end*, both as factors of the peak (or learning rates
    over a peak of 1). Raises ValueError on a bad value. Smith 2017, arXiv:1506.01186.
    """
    _check_count("steps", steps, least=2)
    if not 0 < start < end < math.inf:
        raise ValueError(f"an exponential rise needs 0 < start < end, got start={start!r} and end={end!r}")
    return lambda step: start * (end / start) ** (min(step, steps - 1) / (steps - 1))


def with_warmup(schedule: Schedule, steps: int) -> Schedule:
    """A straight rise to the first value of *schedule* over *steps* steps, then *schedule* from its own step 0.

    ``factor = (step + 1) / (steps + 1) * schedule(0)`` while ``step < steps``: no step is wasted at zero.

    Args: *steps* in optimizer steps; 0 returns *schedule* itself. Raises ValueError on a bad value. Goyal et al.
    2017, arXiv:1706.02677.
    """
    _check_count("steps", steps, least=0)
    if steps == 0:
        return schedule
    return lambda step: (step + 1) / (steps + 1) * schedule(0) if step < steps else schedule(step - steps)


def then_constant(schedule: Schedule, steps: int, factor: float) -> Schedule:
    """*schedule* for *steps* steps, and *factor* from then on: the constant rate of SWA.

    Args: *steps* in optimizer steps; *factor* as a fraction of the peak. Raises ValueError on a bad value. Izmailov et
    al. 2018, arXiv:1803.05407.
    """
    _check_count("steps", steps, least=0)
    _check_fraction("factor", factor)
    return lambda step: schedule(step) if step < steps else factor


def _anneal(begin: float, end: float, progress: float) -> float:
    """Half a cosine from *begin* at progress 0 to *end* at progress 1."""
    return end + (begin - end) * (1 + math.cos(math.pi * progress)) / 2


def _cycle_of(step: int, first_cycle: int, mult: int) -> tuple[int, int, int]:
    """(index, first step, length) of the SGDR cycle that holds *step*; integers, so no restart is off by one."""
    if mult == 1:
        cycle = step // first_cycle
        return cycle, cycle * first_cycle, first_cycle
    cycle, start, length = 0, 0, first_cycle
    while step >= start + length:
        cycle, start, length = cycle + 1, start + length, length * mult
    return cycle, start, length


def _check_count(name: str, value: int, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value!r}")
