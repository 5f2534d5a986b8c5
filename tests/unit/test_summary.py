"""``summary.json``: the best and the last evaluation, and failures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tuning.run_folder import RunFolder
from tuning.summary import PACKAGES, better, failure_noted, make_summary


@pytest.mark.parametrize(
    ("value", "best", "metric", "expected"),
    [
        (0.5, None, "top1", True),
        (0.6, 0.5, "top1", True),
        (0.5, 0.5, "top1", False),
        (0.4, 0.5, "balanced_accuracy", False),
        (0.4, 0.5, "loss", True),
        (0.6, 0.5, "loss", False),
        (math.nan, 0.5, "loss", False),
        (0.5, math.nan, "loss", True),
        (math.nan, math.nan, "loss", False),
        (math.nan, None, "loss", True),
    ],
)
def test_better(value: float, best: float | None, metric: str, expected: bool) -> None:
    assert better(value, best, metric) is expected


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path)
    lines = [
        {"step": 0, "epoch": 0, "stage": 0, "stage/name": "head"},
        {"step": 5, "epoch": 1, "stage": 0, "train/loss": 0.1},
        {"step": 5, "epoch": 1, "stage": 0, "eval/top1": 0.8, "eval/balanced_accuracy": 0.7, "eval/loss": 0.5},
        {"step": 10, "epoch": 2, "stage": 0, "eval/top1": 0.9, "eval/balanced_accuracy": 0.6, "eval/loss": 0.4},
        {"step": 15, "epoch": 3, "stage": 1, "eval/top1": 0.9, "eval/balanced_accuracy": 0.7, "eval/loss": 0.6},
    ]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.mark.parametrize(("best_by", "step"), [("top1", 10), ("balanced_accuracy", 5), ("loss", 10)])
def test_the_first_of_the_best_is_best(folder: RunFolder, best_by: str, step: int) -> None:
    summary = make_summary(folder, best_by, {"world_size": 2})
    assert summary["status"] == "done"
    assert summary["best"]["step"] == step
    assert summary["final"] == {"step": 15, "epoch": 3, "top1": 0.9, "balanced_accuracy": 0.7, "loss": 0.6}
    assert summary["world_size"] == 2
    assert {"python", *PACKAGES} == set(summary["versions"])
    folder.write_summary(summary)
    assert json.loads((folder.path / "summary.json").read_text()) == summary


def test_a_run_without_an_evaluation(folder: RunFolder) -> None:
    folder.metrics.write_text("")
    summary = make_summary(folder, "top1", {})
    assert summary["best"] is None
    assert summary["final"] is None


@pytest.mark.parametrize(("error", "status"), [(ValueError("bad"), "failed"), (KeyboardInterrupt(), "preempted")])
def test_failures_are_noted_by_the_main_process(tmp_path: Path, error: BaseException, status: str) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(type(error)), failure_noted(run, is_main=False):
        raise error
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(type(error)), failure_noted(run, is_main=True):
        raise error
    noted = json.loads((tmp_path / "summary.json").read_text())
    assert noted["status"] == status
    assert type(error).__name__ in noted["error"]


def test_success_writes_nothing(tmp_path: Path) -> None:
    with failure_noted(RunFolder(tmp_path), is_main=True):
        pass
    assert list(tmp_path.iterdir()) == []
