"""The LR finder: a range test (Smith 2017, arXiv:1506.01186), then a race between the learning rates around its answer.

Both run on the one training loop and are taken back.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tuning.errors import UserError
from tuning.flags import FinderFlags
from tuning.lr_auto import part_of
from tuning.lr_curve import Band, band
from tuning.lr_race import FEWEST_STEPS, PART, WHOLE, Candidate, affordable, winner
from tuning.lr_ranges import SWEPT, clamped, kind_of
from tuning.lr_trials import Search, Sweep, Trials, judged_untrained, race, sweep, uncounted
from tuning.plan import StagePlan
from tuning.stages import stage_number

Write = Callable[[Mapping[str, float], int], None]


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        lr: peak learning rate of the head to train with; None without a confident answer.
        reason: why there is none; empty with one.
        band: what the curves say, before it is brought into the range for the optimizer and the network.
        sweeps: the curves.
        race: the candidates around the answer of the curves, lowest learning rate first; empty without a race.
        seconds: what all took.
        whole: every candidate trained the stage to its end.
    """

    lr: float | None
    reason: str
    band: Band
    sweeps: tuple[Sweep, ...]
    race: tuple[Candidate, ...]
    seconds: float
    whole: bool = False

    @property
    def steps(self) -> int:
        """Optimizer steps of all sweeps and candidates."""
        return sum(len(sweep.losses) for sweep in self.sweeps) + sum(ran.steps for ran in self.race)

    def answer(self) -> dict[str, float]:
        """``lr_finder/chosen``, if there is one, and the band as ``lr_finder/low`` and ``lr_finder/high``."""
        values = {"chosen": self.lr, "low": self.band.low, "high": self.band.high}
        return {f"lr_finder/{name}": value for name, value in values.items() if value is not None}

    def described(self) -> str:
        """The answer, what it rests on and what it cost, in a few clauses."""
        rests = [f"no confident answer ({self.reason})" if self.lr is None else f"{self.lr:.2e}"]
        if self.race and self.lr is not None:
            whole = ", the whole stage" if self.whole else ""
            rests.append(f"it won a race of {len(self.race)} over {max(c.steps for c in self.race)} steps{whole}")
        elif self.lr is not None and self.lr != self.band.chosen:
            rests[0] += f", brought there from {self.band.chosen:.2e}"
        if self.band.low is not None:
            rests.append(f"sweeps chose {self.band.low:.1e} to {self.band.high:.1e}")
        return "; ".join([*rests, f"{len(self.sweeps)} sweeps, {self.steps} steps, {self.seconds:.0f} s"]) + "."


def search_for(planned: StagePlan, finder: FinderFlags, planned_steps: int | None = None) -> Search:
    """What to try for a stage. One with no more steps than a candidate gets is raced whole, whatever it costs.

    Args:
        finder: the flags; learning rates that are None = what the kind of optimizer needs (`SWEPT`).
        planned_steps: optimizer steps of the run that pays for the search, of which it may cost a share
            (`affordable`); None = no bound.

    Raises:
        UserError: the lowest learning rate is not below the highest.
    """
    lowest, highest = SWEPT[kind_of(planned.stage.optimizer)]
    start = lowest if finder.finder_start is None else finder.finder_start
    end = highest if finder.finder_end is None else finder.finder_end
    if start >= end:
        raise UserError(f"--finder-start {start:g} must be below --finder-end {end:g}, for example 1e-6 and 1.")
    steps, sweeps, raced = finder.finder_steps, finder.finder_sweeps, finder.finder_race
    if raced is None:
        raced = WHOLE if planned.steps <= WHOLE else PART
    if planned.steps <= raced:
        if planned_steps is not None:
            steps, sweeps = min(steps, FEWEST_STEPS), 1
        return Search(start, end, steps, sweeps, planned.steps, whole=True)
    if planned_steps is not None:
        steps, sweeps, raced = affordable(planned_steps, finder.finder_share, steps, sweeps, raced)
    return Search(start, end, steps, sweeps, raced)


def chosen_stage(plan: Sequence[StagePlan], stage: str | None) -> int:
    """Index of the stage that *stage* names or numbers from 1; None = the first of those with most parameters open.

    Raises:
        UserError: there is no such stage.
    """
    if stage is None:
        return max(range(len(plan)), key=lambda index: plan[index].open_parameters)
    return stage_number([planned.stage for planned in plan], stage, "--stage")


def find(trials: Trials, search: Search, write: Write) -> Found:
    """Sweep, race, write ``lr_finder/...`` and answer. All processes take part; everything is put back as it was.

    Args:
        write: takes ``lr_finder/lr``, ``lr_finder/log10_lr``, ``lr_finder/loss``, ``lr_finder/sweep`` and the number
            of the record, 1 the first; then ``lr_finder/race_lr`` and ``lr_finder/race_loss``; at the end the answer.
    """
    began, stage = time.monotonic(), trials.entered.stage
    trials, written = dataclasses.replace(trials, feed=uncounted(trials.feed)), itertools.count(1)
    sweeps = []
    for number in range(search.sweeps):
        sweeps.append(sweep(trials, search, number))
        for record in sweeps[-1].records(number):
            write(record, next(written))
    said = band([(swept.lrs, swept.losses) for swept in sweeps])
    centre = clamped(said.chosen or stage.lr, stage.optimizer, part_of(stage, trials.entered.model))
    chosen, reason, ran = None if said.chosen is None else centre, said.reason, tuple[Candidate, ...]()
    if search.race:
        ran = race(trials, centre, search)
        for candidate in ran:
            write(candidate.record(), next(written))
        chosen, reason = winner(ran, judged_untrained(trials), search.whole)
    found = Found(chosen, reason, said, tuple(sweeps), ran, time.monotonic() - began, search.whole)
    write(found.answer(), next(written))
    return found
