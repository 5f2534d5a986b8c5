"""AdamW first, SGD last: what a run does at the change, on one process and two, stopped in its warm-up and gone on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from recipe_runs import Run
from safetensors.torch import load_file
from stage_runs import largest_difference, run_stages

PRESET = """
model: test_vit
weights: none
image_size: 32
workers: 0
batch_size: 8
lr_ratio: 0.5
tracker: none
schedule: constant
stages:
- {open: all, epochs: 1}
- {name: last, open: all, epochs: 6, optimizer: sgd}
"""


def steps(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in lines if "train/loss" in r]


@pytest.fixture
def preset(tmp_path: Path) -> str:
    (tmp_path / "two.yaml").write_text(PRESET)
    return str(tmp_path / "two.yaml")


def test_a_run_stopped_in_the_warm_up_goes_on_as_it_would_have(
    photos: Path, finetune: Run, tmp_path: Path, preset: str
) -> None:
    flags = ("--data", str(photos), "--preset", preset)
    for argv in (("whole",), ("run", "--max-steps", "7"), ("run", "--resume", "auto")):
        done = finetune(*flags, "--output", *argv)
        assert done.returncode == 0, done.stderr
        assert "note: stage 'last' starts a new optimizer, sgd, its learning rate rises over 3 steps" in done.stdout
    assert "step 7," in done.stdout
    trained = steps(tmp_path / "whole")
    head = max(key for key in trained[0] if key.startswith("lr/"))
    expected = [3e-4] * 5 + [2.5e-3, 5e-3, 7.5e-3] + [1e-2] * 27
    assert [record[head] for record in trained] == pytest.approx(expected, rel=1e-12)
    assert steps(tmp_path / "run") == trained
    last = "checkpoints/step-00000035/model.safetensors"
    resumed, whole = load_file(tmp_path / "run" / last), load_file(tmp_path / "whole" / last)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_two_processes_change_as_one(photos: Path, preset: str) -> None:
    argv = ("--data", str(photos), "--preset", preset)
    (alone,), (first, second) = run_ranks(1, run_stages, *argv), run_ranks(2, run_stages, *argv)
    assert alone.lrs == first.lrs == second.lrs
    for after_one, on_first, on_second in zip(alone.states, first.states, second.states, strict=True):
        assert largest_difference(on_first, on_second) == 0
        assert largest_difference(on_first, after_one) < 1e-5


def test_the_first_update_after_the_change_is_small(photos: Path, finetune: Run, tmp_path: Path, preset: str) -> None:
    """A quarter of what it is without the warm-up: in its first step SGD moves by learning rate x gradient."""
    moved = []
    for name, flags in (("warm", ()), ("cold", ("--warmup-epochs", "0"))):
        argv = ("--data", str(photos), "--preset", preset, "--output", name, "--max-steps", "6")
        assert finetune(*argv, *flags).returncode == 0  # saved at the end of the epoch, step 5, and at its own
        before, after = (load_file(tmp_path / name / f"checkpoints/step-0000000{n}/model.safetensors") for n in (5, 6))
        moved.append(torch.cat([(after[key] - before[key]).flatten() for key in before]))
    assert torch.allclose(moved[0], moved[1] / 4, atol=1e-7)
    assert float(moved[1].norm()) > 1e-4
