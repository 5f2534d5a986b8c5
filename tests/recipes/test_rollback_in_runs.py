"""A stage that made the model worse is undone before the next: whole runs, stopped and gone on, on two processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from recipe_runs import Run, finetune_here

# The second stage is as bad as they come; in the third the weights hardly move.
PRESET = """
best_by: loss
ema_decay: 0.5
best_of: any
stages:
  - {name: good, open: all, epochs: 2, lr: 1e-4}
  - {name: bad, open: all, epochs: 1, lr: 0.3, batch_norm: train}
  - {name: last, open: all, epochs: 1, lr: 1e-12, batch_norm: frozen}
"""
FLAGS = ("--preset", "undo.yaml", "--model", "test_efficientnet", "--image-size", "32", "--batch-size", "8")
FLAGS += ("--workers", "0", "--tracker", "none", "--output", "run")


@pytest.fixture
def flags(photos: Path, tmp_path: Path) -> tuple[str, ...]:
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("test_efficientnet", num_classes=7).state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "undo.yaml").write_text(PRESET)
    return (*FLAGS, "--weights", "weights.safetensors", "--data", str(photos))


def losses(run: Path, whose: str = "eval") -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[f"{whose}/loss"] for line in lines if f"{whose}/loss" in line]


def best_before(run: Path) -> float:
    """Of the first stage, over the weights and their average."""
    return min(*losses(run)[:2], *losses(run, "eval_ema")[:2])


def summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def test_a_stage_that_made_it_worse_is_undone(flags: tuple[str, ...], finetune: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = finetune(*flags, "--rollback")
    assert done.returncode == 0, done.stderr
    good, bad, last = best_before(run), losses(run)[2], losses(run)[3]
    assert bad > good + 0.1, "the test needs a bad stage"
    assert last == pytest.approx(good, abs=1e-5)
    assert losses(run, "eval_ema")[3] == pytest.approx(good, abs=1e-5)
    assert " bad  undone: the weights of step " in done.stdout
    assert "good  undone" not in done.stdout, "it did better the weights"


def test_without_the_flag_the_next_stage_goes_on(flags: tuple[str, ...], finetune: Run, tmp_path: Path) -> None:
    done = finetune(*flags)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run")[3] > best_before(tmp_path / "run") + 0.1
    assert "undone" not in done.stdout


@pytest.mark.parametrize("stop", ["15", "17"])
def test_a_run_that_goes_on_undoes_the_same(flags: tuple[str, ...], finetune: Run, tmp_path: Path, stop: str) -> None:
    """Stopped at the end of the bad stage, and in the stage after it."""
    whole, parts = tmp_path / "run", tmp_path / "parts"
    assert finetune(*flags, "--rollback").returncode == 0
    flags = (*flags, "--rollback", "--output", str(parts))
    first = finetune(*flags, "--max-steps", stop)
    assert first.returncode == 0, first.stderr
    again = finetune(*flags, "--resume", "auto")
    assert again.returncode == 0, again.stderr
    assert losses(parts)[-1] == losses(whole)[-1]
    assert summary(parts)["best"]["loss"] == summary(whole)["best"]["loss"]


def test_two_processes_undo_it_together(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_ranks(2, finetune_here, *flags, "--rollback") == [0, 0]
    assert summary(tmp_path / "run")["world_size"] == 2
    assert losses(tmp_path / "run")[3] == pytest.approx(best_before(tmp_path / "run"), abs=1e-5)


def test_one_stage_has_nothing_to_undo(finetune: Run, photos: Path) -> None:
    done = finetune("--data", str(photos), "--freeze-epochs", "0", "--rollback")
    assert done.returncode == 2
    assert "--rollback undoes a stage before the next one, and there is one stage" in done.stderr
