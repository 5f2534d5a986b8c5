"""`recipes/find_lr.py` through its real command line: an answer, no answer, and what is left behind."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import run_ranks
from recipe_runs import ROOT

from tuning.cli.command_line import run_recipe

SMALL = ("--model", "test_vit", "--weights", "none", "--image-size", "32", "--batch-size", "24", "--threads", "1")
SHORT = ("--finder-steps", "40", "--finder-race", "0", "--lr-ratio", "1", "--workers", "0")


def find_lr_here(folder: Path, *flags: str) -> tuple[int, str]:
    """The recipe in this process; its exit status and what it said."""
    import find_lr as recipe

    os.chdir(folder)
    log = folder / f"log{os.environ.get('RANK', '0')}"
    sys.argv = ["find_lr.py", *flags]
    with log.open("w") as sys.stdout:
        sys.stderr = sys.stdout
        try:
            run_recipe(recipe.find_lr, "recipes/find_lr.py", presets=ROOT / "recipes" / "presets")
        except SystemExit as end:
            sys.stdout.flush()
            return int(end.code or 0), log.read_text()


def find(folder: Path, *flags: str, world_size: int = 1) -> tuple[int, str]:
    return run_ranks(world_size, find_lr_here, folder, *flags)[0]  # type: ignore[no-any-return]


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_an_answer_is_said_drawn_and_written(coloured: Path, tmp_path: Path) -> None:
    code, said = find(tmp_path, "--data", str(coloured), *SMALL, *SHORT, "--output", "run")
    assert code == 0, said
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["status"], summary["reason"], summary["stage"], summary["world_size"]) == ("done", "", 1, 1)
    chosen = summary["chosen"]
    assert 1e-4 < chosen < 3e-2
    assert summary["band"][0] <= summary["band"][1]
    assert "Sweeping stage 2 (all): 3 x 40 steps, head LR from 1e-06 to 1." in said
    assert f"--lr: {chosen:.2e}" in said
    written = records(tmp_path / "run")
    swept = [r for r in written if "lr_finder/loss" in r]
    assert [r["step"] for r in swept] == list(range(1, summary["steps"] + 1))
    first = [r["lr_finder/lr"] for r in swept if r["lr_finder/sweep"] == 1]
    assert first == pytest.approx(np.geomspace(1e-6, 1, 40)[: len(first)])
    assert [r["lr_finder/chosen"] for r in written if "lr_finder/chosen" in r] == [chosen]
    for path in ("config.yaml", "plots/lr_finder.png", "wandb"):
        assert (tmp_path / "run" / path).exists(), path
    assert not (tmp_path / "run/model").exists()


@pytest.mark.slow
def test_two_processes_write_one_run(coloured: Path, tmp_path: Path) -> None:
    flags = ("--data", str(coloured), *SMALL, *SHORT, "--tracker", "none", "--stage", "head", "--optimizer", "sgd")
    assert find(tmp_path, *flags, "--output", "two", world_size=2)[0] == 0
    assert find(tmp_path, *flags, "--output", "one")[0] == 0
    one, two = records(tmp_path / "one"), records(tmp_path / "two")
    assert len(one) == len(two)
    assert {r["stage"] for r in two} == {0}
    losses = [[r.get("lr_finder/loss") or 0.0 for r in run] for run in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3, abs=1e-3)
    assert json.loads((tmp_path / "two/summary.json").read_text())["world_size"] == 2


@pytest.mark.slow
def test_no_confident_answer_is_said_and_is_no_failure(coloured: Path, tmp_path: Path) -> None:
    """Learning rates at which nothing moves."""
    flags = ("--data", str(coloured), *SMALL, *SHORT, "--tracker", "none", "--output", "run")
    code, said = find(tmp_path, *flags, "--finder-start", "1e-9", "--finder-end", "1e-7")
    assert code == 0, said
    assert "no confident answer (" in said
    assert "The learning rate stays what it was: 0.0003." in said
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["status"], summary["chosen"]) == ("done", None)
    assert summary["reason"].startswith(("flat", "noisy"))
    assert not any("lr_finder/chosen" in r for r in records(tmp_path / "run"))
    assert (tmp_path / "run/plots/lr_finder.png").exists()


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (("--stage", "7"), "--stage '7' is not a stage: 1 = head, 2 = all."),
        (("--resume", "auto", "--output", "run"), "--resume auto: an LR finder has nothing to go on with."),
        (("--finder-start", "3"), "--finder-start 3 must be below --finder-end 1,"),
        (("--finder-steps", "9"), "--finder-steps is 9; give a whole number from 10."),
        (("--finder-sweeps", "0"), "--finder-sweeps is 0; give a whole number from 1."),
        (("--finder-end", "inf"), "--finder-end is inf; give a learning rate above 0"),
    ],
)
def test_what_can_t_work_is_refused(coloured: Path, tmp_path: Path, typed: tuple[str, ...], message: str) -> None:
    code, said = find(tmp_path, "--data", str(coloured), *SMALL, "--tracker", "none", *typed)
    assert code == 2
    assert message in " ".join(said.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log0"]


def test_a_search_for_a_pretrained_model_does_not_begin_with_a_fitted_head(coloured: Path, tmp_path: Path) -> None:
    """A run without these flags does; from such a head a search sees little."""
    flags = ("--model", "tf_efficientnet_lite0", "--image-size", "32", "--batch-size", "24", "--workers", "0")
    code, said = find(tmp_path, "--data", str(coloured), *flags, "--dry-run", "--output", "run")
    assert code == 0, said
    assert "Sweeping stage 2 (all)" in said
    assert "fitted" not in said
