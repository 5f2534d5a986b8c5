"""The study: what comes next, what an interruption leaves, which trials are cut short."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
import pytest

from tuning.errors import UserError
from tuning.searching import results
from tuning.searching.launching import Ended
from tuning.searching.spaces import Choice, Range, Space, Stopper
from tuning.searching.studies import Outcome, Study

PARAMETERS = {"lr": Range(1e-5, 0.1, log=True), "epochs": Range(1, 5), "augment": Choice(("none", "light", None))}
GRID = {"lr": Choice((0.1, 0.2)), "augment": Choice(("none", None)), "epochs": Choice((1,))}


def space(method: str = "random", metric: str = "eval/top1", **changes: Any) -> Space:
    return Space("space.yaml", method, metric, **{"parameters": GRID if method == "grid" else PARAMETERS, **changes})


def done(value: float | None) -> Ended:
    return Ended("done", value, 1.0)


def search(study: Study, limit: int | None) -> list[dict[str, Any]]:
    """Flags of the trials to come, each with a value of its own."""
    found = []
    while (trial := study.next(limit)) is not None:
        found.append(trial.params)
        study.record(trial, done(trial.params["lr"]))
    return found


@pytest.mark.parametrize(("method", "trials"), [("random", 5), ("bayes", 12)])
def test_a_search_that_goes_on_draws_what_it_would_have_drawn(method: str, trials: int, tmp_path: Path) -> None:
    whole = search(Study(space(method), 3, None), trials)
    assert len(whole) == len({str(values) for values in whole}) == trials
    assert all(1e-5 <= one["lr"] <= 0.1 and type(one["epochs"]) is int for one in whole)
    parts = search(Study(space(method), 3, tmp_path), 2) + search(Study(space(method), 3, tmp_path), trials)
    assert parts == whole
    assert search(Study(space(method), 4, None), 3) != whole[:3]


def test_an_interrupted_trial_goes_on_in_its_folder(tmp_path: Path) -> None:
    first = Study(space(), 0, tmp_path)
    assert len(search(first, 2)) == 2
    killed = first.next(5)
    assert killed is not None
    killed.report(0.5, 1)
    again = Study(space(), 0, tmp_path)
    assert [one.status for one in again.outcomes()] == ["done", "done", "stopped"]
    trial = again.next(5)
    assert trial is not None
    assert (trial.params, again.number(trial)) == (killed.params, 2)
    again = Study(space(), 0, tmp_path)  # killed once more
    assert [again.number(t) for t in iter(lambda: again.next(4), None) if again.record(t, done(0.1)) is None] == [2, 3]
    assert sorted(one.number for one in again.outcomes()) == [0, 1, 2, 3]
    assert {one.status for one in again.outcomes()} == {"done"}
    assert [trial.number for trial in again.settled().trials] == [0, 1, 2, 3]


def test_a_grid_is_searched_once_interruptions_included(tmp_path: Path) -> None:
    study = Study(space("grid"), 0, tmp_path)
    assert study.limit(None) == study.limit(9) == 4
    assert study.limit(3) == 3
    killed = study.next(None)
    assert killed is not None
    found = search(Study(space("grid"), 0, tmp_path), 3) + search(Study(space("grid"), 0, tmp_path), None)
    assert found == [{"lr": lr, "augment": augment} for lr in (0.1, 0.2) for augment in ("none", None)]
    assert Study(space("grid"), 0, tmp_path).next(None) is None


def test_the_number_of_trials() -> None:
    assert Study(space(), 0, None).limit(None) == 20
    assert Study(space(run_cap=7), 0, None).limit(None) == 7
    assert Study(space(run_cap=7), 0, None).limit(9) == 9


def test_a_search_stays_in_its_space(tmp_path: Path) -> None:
    Study(space(), 0, tmp_path)
    Study(space(run_cap=3), 0, tmp_path)
    with pytest.raises(UserError, match=r"epochs was 1 to 5, now 1 to 6; method was random, now bayes"):
        Study(space("bayes", parameters={**PARAMETERS, "epochs": Range(1, 6)}), 0, tmp_path)


@pytest.mark.parametrize(("metric", "best"), [("eval/top1", 0.9), ("eval/loss", 0.1)])
def test_outcomes_come_best_first(metric: str, best: float) -> None:
    study = Study(space(metric=metric), 0, None)
    cut = Ended("pruned", None, 3.0)
    ends = [(done(0.1), 0.1), (done(0.9), 0.1), (Ended("failed", None, 2.0, "why"), 0.1), (cut, math.nan), (cut, 0.3)]
    for end, last in ends:
        trial = study.next(None)
        assert trial is not None
        trial.report(last, 1)
        study.record(trial, end)
    told = study.outcomes()
    assert [one.status for one in told] == ["done", "done", "pruned", "pruned", "failed"]
    assert told[0].value == best
    assert ([one.value for one in told[2:]], told[4].reason, told[4].seconds) == ([0.3, None, None], "why", 2.0)
    assert results.best_of(told) == told[0]


def pruned(stopper: Stopper, curves: list[list[float]]) -> list[int | None]:
    """The evaluation at which each of the curves is cut, in turn; None if it isn't."""
    study, cut = Study(space(stopper=stopper), 0, None), []
    for curve in curves:
        trial = study.next(None)
        assert trial is not None
        at = None
        for evaluation, value in enumerate(curve, start=1):
            trial.report(value, evaluation)
            if trial.should_prune():
                at = evaluation
                break
        study.record(trial, Ended("pruned" if at else "done", None if at else curve[-1], 1.0))
        cut.append(at)
    return cut


def test_hyperband_looks_from_the_first_rung_on() -> None:
    good, bad, late = [0.5, 0.7, 0.8, 0.9], [0.9, 0.1, 0.1, 0.1], [0.5, 0.8, 0.8, 0.1]
    assert pruned(Stopper("hyperband", 2, 2), [good, bad, late]) == [None, 2, 4]
    assert pruned(Stopper("hyperband", 2, 2), [good, [0.5, math.nan, 1.0]]) == [None, 2]


def test_median_waits_for_three_trials() -> None:
    good, bad = [0.5, 0.7, 0.8], [0.1, 0.1, 0.1]
    assert pruned(Stopper("median", 2), [good, bad, good, bad, good]) == [None, None, None, 2, None]


def test_optuna_prunes_nothing_without_early_terminate() -> None:
    assert isinstance(Study(space(), 0, None).optuna.pruner, optuna.pruners.NopPruner)


def outcome(number: int, status: str, value: float | None = None, reason: str | None = None) -> Outcome:
    return Outcome(number, status, value, {"lr": 0.1 * number, "augment": "[none]"}, 12.3, reason)


def test_when_a_search_has_no_hope() -> None:
    failed = Ended("failed", None, 1.0, "no such folder", mistake=True)
    crashed = Ended("failed", None, 1.0, "exit status 1")
    with pytest.raises(UserError, match="the trial failed, and so would all: no such folder"):
        results.refuse_hopeless([outcome(0, "failed")], failed)
    results.refuse_hopeless([outcome(0, "done", 0.5), outcome(1, "failed")], failed)
    results.refuse_hopeless([outcome(0, "pruned", 0.5), outcome(1, "failed")], failed)
    results.refuse_hopeless([outcome(n, "failed") for n in range(2)], crashed)
    with pytest.raises(UserError, match=r"all of 3 trials failed\. The last one: exit status 1"):
        results.refuse_hopeless([outcome(n, "failed") for n in range(3)], crashed)


def test_what_is_written(tmp_path: Path) -> None:
    run = results.trial_folder(tmp_path, 3)
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("lr: 0.3\n")
    told = [outcome(3, "done", 0.75), outcome(1, "failed", reason='a "quoted", reason')]
    results.write(tmp_path, told, "top1")
    assert (tmp_path / "trials.csv").read_text().splitlines() == [
        "trial,top1,lr,augment,seconds,status,reason",
        "3,0.75,0.30000000000000004,[none],12.3,done,",
        '1,,0.1,[none],12.3,failed,"a ""quoted"", reason"',
    ]
    assert (tmp_path / "best.yaml").read_text().splitlines()[1:] == ["lr: 0.3"]
    facts = results.facts(tmp_path, told)
    assert (facts["best"]["trial"], facts["best"]["value"], facts["best"]["run"]) == (3, 0.75, str(run))
    assert facts["trials"] == {"done": 1, "failed": 1}
    assert results.facts(tmp_path, told[1:])["best"] is None
