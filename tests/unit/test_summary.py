"""``summary.json``: the best and the last evaluation, and failures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tuning.tracking import summary
from tuning.tracking.run_folder import RunFolder
from tuning.tracking.summary import PACKAGES, better, evaluations, failure_noted, make_summary


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


def test_the_best_of_several_is_named(tmp_path: Path) -> None:
    """Of equals the earlier, and at one step the raw weights, as in the run."""
    folder = RunFolder(tmp_path)
    lines = [
        {"step": 5, "epoch": 1, "eval/loss": 0.9, "eval/top1": 0.5},
        {"step": 10, "epoch": 2, "eval/loss": 0.8, "eval/top1": 0.6, "eval_swa/loss": 0.7, "eval_swa/top1": 0.7},
        {"step": 15, "epoch": 3, "eval/loss": 0.7, "eval/top1": 0.7, "eval_swa/loss": 0.6, "eval_swa/top1": 0.7},
    ]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = make_summary(folder, ("eval", "eval_swa"), "top1", {})
    assert (made["best_of"], made["best"]["step"], made["final"]["step"]) == ("eval_swa", 10, 15)
    assert made["final"]["loss"] == 0.6
    made = make_summary(folder, ("eval", "eval_swa"), "loss", {})
    assert (made["best_of"], made["best"]["step"]) == ("eval_swa", 15)
    assert make_summary(folder, ("eval",), "loss", {})["best"]["loss"] == 0.7
    folder.metrics.write_text("")
    assert make_summary(folder, ("eval", "eval_swa"), "loss", {})["best_of"] == "eval"


@pytest.mark.parametrize(("best_by", "step"), [("top1", 10), ("balanced_accuracy", 5), ("loss", 10)])
def test_the_first_of_the_best_is_best(folder: RunFolder, best_by: str, step: int) -> None:
    made = make_summary(folder, ("eval",), best_by, {"world_size": 2})
    assert made["status"] == "done"
    assert made["best"]["step"] == step
    assert made["final"] == {"step": 15, "epoch": 3, "top1": 0.9, "balanced_accuracy": 0.7, "loss": 0.6}
    assert made["world_size"] == 2
    assert {"python", *PACKAGES} == set(made["versions"])
    folder.write_summary(made)
    assert json.loads((folder.path / "summary.json").read_text()) == made


def test_a_run_without_an_evaluation(folder: RunFolder) -> None:
    folder.metrics.write_text("")
    made = make_summary(folder, ("eval",), "top1", {})
    assert made["best"] is None
    assert made["final"] is None


@pytest.mark.parametrize(
    ("error", "noted"),
    [
        (ValueError("bad"), {"status": "failed", "error": "ValueError: bad"}),
        (KeyboardInterrupt(), {"status": "preempted", "reason": "Ctrl-C"}),
        (KeyboardInterrupt("SIGTERM"), {"status": "preempted", "reason": "SIGTERM"}),
    ],
)
def test_failures_are_noted_by_the_main_process(tmp_path: Path, error: BaseException, noted: dict[str, str]) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(type(error)), failure_noted(run, is_main=False):
        raise error
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(type(error)), failure_noted(run, is_main=True):
        raise error
    assert json.loads((tmp_path / "summary.json").read_text()) == noted


def test_a_full_disk_hides_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ValueError, match="the true reason"), failure_noted(RunFolder(tmp_path), is_main=True):
        raise ValueError("the true reason")
    said = capsys.readouterr().err
    assert "No space left" in said
    assert "the true reason" in said
    assert list(tmp_path.iterdir()) == []


def test_odd_records_are_summed_up(folder: RunFolder) -> None:
    good = folder.metrics.read_bytes().splitlines()
    folder.metrics.write_bytes(
        b'{"step": 1, "eval/loss": null, "eval/top1": "x"}\n'
        b'{"step": 2, "epoch": 1, "eval/loss": [1], "eval/top1": NaN}\n' + b"\n".join(good) + b'\n{"step": 20, "eval/lo'
    )
    made = make_summary(folder, ("eval",), "top1", {})
    assert made["best"]["step"] == 10
    assert made["final"]["step"] == 15
    assert evaluations(folder.metrics, "eval")[0] == {"step": 1, "epoch": None, "loss": None, "top1": None}
    folder.write_summary(made)
    folder.metrics.unlink()
    assert make_summary(folder, ("eval",), "top1", {})["best"] is None


def test_a_package_without_a_version_is_no_error(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "PACKAGES", ("of-this-name-there-is-none",))
    assert make_summary(folder, ("eval",), "top1", {})["versions"]["of-this-name-there-is-none"] is None


def test_success_writes_nothing(tmp_path: Path) -> None:
    with failure_noted(RunFolder(tmp_path), is_main=True):
        pass
    assert list(tmp_path.iterdir()) == []
