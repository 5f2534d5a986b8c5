"""Which trial comes next, and what came of the others: an optuna study in SQLite. Imports no torch."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from tuning.errors import UserError
from tuning.searching.launching import Ended
from tuning.searching.spaces import Choice, Parameter, Space
from tuning.tracking.summary import HIGHER_IS_BETTER

DATABASE, NAME = "study.db", "sweep"
SPACE, FOLDER, REASON, SECONDS = "space", "folder", "reason", "seconds"  # of study and trials, in the database
STATUS = {
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "stopped",
}
ORDER = tuple(STATUS.values())
DEFAULT_TRIALS = 20


@dataclass(frozen=True)
class Outcome:
    """What came of one trial.

    Attributes:
        number: of its folder; a trial that was interrupted and went on has one.
        status: ``done``, ``pruned``, ``failed``, or ``stopped`` (it goes on when the search does).
        value: of the metric: the best evaluation, or the last one of a pruned trial.
        reason: why it failed.
    """

    number: int
    status: str
    value: float | None
    values: dict[str, Any]
    seconds: float | None
    reason: str | None


class Study:
    """The search in one folder, by one process at a time.

    A trial that is still marked as running when the search starts again was interrupted. It gets a new row in the
    database with the same flags and the same folder, where its run goes on; the old row counts as failed to optuna and
    is shown nowhere.

    Args:
        folder: holds the database; None = in memory, for a look at the first trial.

    Raises:
        UserError: the search in *folder* was started in another space.
    """

    def __init__(self, space: Space, seed: int, folder: Path | None) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self._space, self._seed = space, seed
        self._searched = {name: _distribution(parameter) for name, parameter in space.searched.items()}
        self.optuna = optuna.create_study(
            storage=None if folder is None else f"sqlite:///{(folder / DATABASE).resolve()}",
            study_name=NAME,
            direction="maximize" if HIGHER_IS_BETTER[space.best_by] else "minimize",
            load_if_exists=True,
        )
        self.optuna.pruner = _pruner(space)
        self._refuse_other_space()
        for left in self.optuna.get_trials(states=(TrialState.RUNNING,)):
            values = {**left.system_attrs.get("fixed_params", {}), **left.params}
            self.optuna.enqueue_trial(values, user_attrs=left.user_attrs)  # first: a kill in between loses nothing
            self.optuna.tell(left.number, state=TrialState.FAIL)

    def _refuse_other_space(self) -> None:
        old, new = self.optuna.user_attrs.get(SPACE), self._space.described()
        if old is None:
            self.optuna.set_user_attr(SPACE, new)
            return
        changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        if changed:
            told = "; ".join(f"{key} was {old.get(key)}, now {new.get(key)}" for key in changed)
            raise UserError(f"--resume: the search was started in another space: {told}. Give a new --output.")

    def outcomes(self) -> list[Outcome]:
        """Of every trial so far, best first."""
        sign = -1 if HIGHER_IS_BETTER[self._space.best_by] else 1

        def rank(one: Outcome) -> tuple[int, float]:
            return ORDER.index(one.status), math.inf if one.value is None else sign * one.value

        return sorted(map(_outcome, self._latest()), key=rank)

    def _latest(self) -> list[FrozenTrial]:
        """The last row of every trial, in the order of their numbers."""
        rows = {t.user_attrs[FOLDER]: t for t in self.optuna.get_trials(deepcopy=False) if FOLDER in t.user_attrs}
        return [rows[folder] for folder in sorted(rows)]

    def settled(self) -> optuna.Study:
        """A copy in memory with one row a trial, under the trial's own number."""
        copy = optuna.create_study(direction=self.optuna.direction)
        copy.add_trials(self._latest())
        return copy

    def next(self, limit: int | None) -> Trial | None:
        """The next trial; None when *limit* trials, or the grid, are done. One that was interrupted goes first.

        Every draw is a function of --seed and of the trials before: a search that was interrupted goes on as if not.
        """
        count = len(self._latest())
        if not self.optuna.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            if count >= self.limit(limit):
                return None
            if self._space.method == "grid":
                self.optuna.enqueue_trial(_grid(self._space)[count])
        self.optuna.sampler = _sampler(self._space.method, (self._seed * 1_000_003 + count) % 2**32)
        trial = self.optuna.ask(self._searched)
        if FOLDER not in trial.user_attrs:
            trial.set_user_attr(FOLDER, f"{count:04d}")
        return trial

    def limit(self, asked: int | None) -> int:
        """Trials after which the search ends: *asked*, else the file's word, else a number; a grid is never larger."""
        limit = asked or self._space.run_cap
        if self._space.method == "grid":
            size = math.prod(len(parameter.edges) for parameter in self._space.searched.values())
            return min(limit or size, size)
        return limit or DEFAULT_TRIALS

    def number(self, trial: Trial) -> int:
        """Of the trial's folder, and for the user."""
        return int(trial.user_attrs[FOLDER])

    def record(self, trial: Trial, ended: Ended) -> None:
        """Keep how a trial ended."""
        trial.set_user_attr(SECONDS, ended.seconds)
        if ended.reason is not None:
            trial.set_user_attr(REASON, ended.reason)
        state = next(state for state, status in STATUS.items() if status == ended.status)
        self.optuna.tell(trial, ended.value if ended.status == "done" else None, state)


def _outcome(trial: FrozenTrial) -> Outcome:
    value = trial.value if trial.state == TrialState.COMPLETE else None
    if trial.state == TrialState.PRUNED and trial.last_step is not None:
        value = trial.intermediate_values[trial.last_step]
    attributes = trial.user_attrs
    value = None if value is None or math.isnan(value) else value
    status = STATUS.get(trial.state, "stopped")
    return Outcome(
        int(attributes[FOLDER]), status, value, trial.params, attributes.get(SECONDS), attributes.get(REASON)
    )


def _distribution(parameter: Parameter) -> BaseDistribution:
    if isinstance(parameter, Choice):
        return CategoricalDistribution(parameter.values)
    if isinstance(parameter.low, int) and isinstance(parameter.high, int):
        return IntDistribution(parameter.low, parameter.high)
    return FloatDistribution(parameter.low, parameter.high, log=parameter.log, step=parameter.step)


def _grid(space: Space) -> list[dict[str, Any]]:
    values = itertools.product(*(parameter.edges for parameter in space.searched.values()))
    return [dict(zip(space.searched, one, strict=True)) for one in values]


def _sampler(method: str, seed: int) -> optuna.samplers.BaseSampler:
    if method == "bayes":
        return optuna.samplers.TPESampler(seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)


def _pruner(space: Space) -> optuna.pruners.BasePruner:
    """W&B's hyperband judges every run at the same evaluations: optuna calls that successive halving."""
    stopper = space.stopper
    if stopper is None:
        return optuna.pruners.NopPruner()
    if stopper.kind == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=stopper.first)
    return optuna.pruners.SuccessiveHalvingPruner(min_resource=stopper.first, reduction_factor=stopper.eta)
