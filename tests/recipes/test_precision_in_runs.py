"""Runs with weights in bf16, alone or beside float32: stages, averages, checkpoints, two processes, resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from ranks import run_ranks
from recipe_runs import Run
from safetensors.torch import load_file
from stage_runs import largest_difference, run_stages

FLAGS = ("--model", "test_efficientnet", "--weights", "none", "--image-size", "32", "--batch-size", "8")
FLAGS += ("--workers", "0", "--freeze-epochs", "1", "--epochs", "1", "--tracker", "none", "--lr-ratio", "0.5")
LEVELS = [("bf16-master", torch.float32), ("bf16-pure", torch.bfloat16)]


def records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if not k.startswith("perf/")} for record in lines]


@pytest.mark.parametrize(("level", "kept"), LEVELS)
def test_a_resumed_run_is_the_same_run(
    photos: Path, finetune: Run, tmp_path: Path, level: str, kept: torch.dtype
) -> None:
    """Stopped inside the second stage; BatchNorm trains, averages are kept, gradients are clipped."""
    flags = ("--data", str(photos), *FLAGS, "--precision", level, "--ema-decay", "0.9")
    for argv in (("whole",), ("run", "--max-steps", "7"), ("run", "--resume", "auto")):
        done = finetune(*flags, "--output", *argv)
        assert done.returncode == 0, done.stderr
    trained, told = [[r for r in records(tmp_path / n) if "train/loss" in r] for n in ("run", "whole")]
    assert trained == told
    for file in ("model.safetensors", "ema.safetensors"):
        last = f"checkpoints/step-00000010/{file}"
        resumed, whole = load_file(tmp_path / "run" / last), load_file(tmp_path / "whole" / last)
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)
        types = {tensor.dtype for tensor in whole.values() if tensor.is_floating_point()}
        assert types == {torch.float32 if file == "ema.safetensors" else kept}, "averages are always in float32"
    model = load_file(tmp_path / "whole/model/model.safetensors")
    assert {t.dtype for t in model.values() if t.is_floating_point()} == {torch.float32}, "it holds the average"
    made = timm.create_model(f"local-dir:{tmp_path / 'whole/model'}", pretrained=True)
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    summary = json.loads((tmp_path / "whole/summary.json").read_text())
    assert (summary["status"], summary["precision"]) == ("done", level)


@pytest.mark.parametrize("level", ["bf16-master", "bf16-pure"])
def test_two_processes_train_as_one(photos: Path, level: str) -> None:
    """Up to the rounding of bf16: sums in another order; ranks hold the same to the bit."""
    argv = ("--data", str(photos), *FLAGS, "--model", "test_vit", "--precision", level)
    argv += ("--optimizer", "sgd", "--lr", "0.05", "--freeze-lr", "0.05")
    (alone,), (first, second) = run_ranks(1, run_stages, *argv), run_ranks(2, run_stages, *argv)
    for after_one, on_first, on_second in zip(alone.states, first.states, second.states, strict=True):
        assert largest_difference(on_first, on_second) == 0
        assert largest_difference(on_first, after_one) < 0.01
    assert first.metrics == second.metrics
    assert first.losses == pytest.approx(alone.losses, abs=0.02)


@pytest.mark.parametrize("level", ["bf16-master", "bf16-pure"])
def test_cached_features_and_a_fitted_head(photos: Path, finetune: Run, tmp_path: Path, level: str) -> None:
    flags = ("--data", str(photos), *FLAGS, "--cache-features", "--head-init", "fitted", "--precision", level)
    done = finetune(*flags, "--output", "run")
    assert done.returncode == 0, done.stderr
    assert "fitted head" in done.stdout
