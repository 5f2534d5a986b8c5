"""Stages that evaluations end, and learning rates that they drop: whole runs, stopped and gone on, on two processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from recipe_runs import Run, finetune_here
from safetensors.torch import load_file

# At such a rate the weights hardly move: evaluations stay as they are.
FLAGS = ("--model", "test_vit", "--weights", "none", "--image-size", "32", "--batch-size", "8", "--workers", "0")
FLAGS += ("--lr", "1e-9", "--freeze-lr", "1e-9", "--freeze-epochs", "4", "--epochs", "5", "--tracker", "none")
FLAGS += ("--schedule", "plateau", "--plateau-patience", "1", "--patience", "2", "--best-by", "top1")


def records(run: Path, key: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in lines if key in r]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints/step-00000030/model.safetensors")


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    from recipe_runs import run_forked

    folder = tmp_path_factory.mktemp("whole")
    done = run_forked(folder, "--data", str(photos), *FLAGS, "--output", "run")
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout


def test_both_stages_end_after_three_of_their_epochs(whole: tuple[Path, str]) -> None:
    run, said = whole
    assert "ends after 3 of 4 epochs: 2 evaluations in a row without a better top1." in said
    assert "ends after 3 of 5 epochs" in said
    trained = records(run, "train/loss")
    assert [record["step"] for record in trained] == list(range(1, 31))
    assert [record["stage"] for record in trained] == [0] * 15 + [1] * 15
    head = max(key for key in trained[0] if key.startswith("lr/"))
    drops = [1e-9] * 10 + [1e-10] * 5
    assert [record[head] for record in trained] == pytest.approx(drops * 2, rel=1e-12)
    judged = records(run, "eval/top1")
    assert [record["stage/waiting"] for record in judged] == [0, 1, 2] * 2
    assert [record["stage/lr_factor"] for record in judged] == pytest.approx([1, 0.1, 0.01] * 2)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["ended_early_at"], summary["final"]["step"]) == ("done", 30, 30)


def test_a_run_that_ended_early_has_nothing_left_to_do(whole: tuple[Path, str], photos: Path, finetune: Run) -> None:
    done = finetune("--data", str(photos), *FLAGS, "--output", str(whole[0]), "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert "Nothing left to do" in done.stdout


@pytest.mark.parametrize(
    "stop", [pytest.param("12", marks=pytest.mark.slow), "15", pytest.param("27", marks=pytest.mark.slow)]
)
def test_a_run_stopped_in_its_patience_goes_on_as_it_would_have(
    whole: tuple[Path, str], photos: Path, finetune: Run, tmp_path: Path, stop: str
) -> None:
    """Between two evaluations; at the one that ends the stage; in the stage after one that ended early."""
    first = finetune("--data", str(photos), *FLAGS, "--output", "run", "--max-steps", stop)
    assert first.returncode == 0, first.stderr
    again = finetune("--data", str(photos), *FLAGS, "--output", "run", "--resume", "auto")
    assert again.returncode == 0, again.stderr
    for key in ("train/loss", "eval/top1"):
        assert records(tmp_path / "run", key) == records(whole[0], key)
    resumed, uninterrupted = weights(tmp_path / "run"), weights(whole[0])
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)


def test_two_processes_end_their_stages_together(photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_ranks(2, finetune_here, "--data", str(photos), *FLAGS, "--output", str(run)) == [0, 0]
    assert json.loads((run / "summary.json").read_text())["world_size"] == 2
    assert [record["stage/waiting"] for record in records(run, "eval/top1")] == [0, 1, 2] * 2
    assert [record["stage"] for record in records(run, "train/loss")] == [0] * 15 + [1] * 15
