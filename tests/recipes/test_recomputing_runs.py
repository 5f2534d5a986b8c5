"""Runs with `--grad-checkpointing` through the real command line: those without, also where it changes half-way."""

from __future__ import annotations

from pathlib import Path

import yaml
from recipe_runs import Run

SMALL = ("--model", "test_vit", "--weights", "none", "--image-size", "32", "--batch-size", "8", "--tracker", "none")
STAGES = ("--freeze-epochs", "1", "--epochs", "1", "--drop-rate", "0.1", "--drop-path-rate", "0.2", "--workers", "0")


def test_a_run_that_goes_on_with_it_is_the_run_without(photos: Path, finetune: Run, tmp_path: Path) -> None:
    flags = ("--data", str(photos), *SMALL, *STAGES)
    cut = (*flags, "--output", "cut")
    for argv in (
        (*flags, "--output", "whole"),
        (*cut, "--max-steps", "1"),
        (*cut, "--resume", "auto", "--grad-checkpointing"),
    ):
        done = finetune(*argv)
        assert done.returncode == 0, done.stderr
    assert yaml.safe_load((tmp_path / "cut/config.yaml").read_text())["grad_checkpointing"] is True
    whole, resumed = (sorted((tmp_path / run / "checkpoints").glob("step-*"))[-1] for run in ("whole", "cut"))
    assert whole.name == resumed.name
    assert (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()


def test_it_is_refused_before_anything_is_spent(photos: Path, finetune: Run, tmp_path: Path) -> None:
    shared = ("--data", str(photos), "--grad-checkpointing", "--output", "run")
    statistics = finetune(*shared, *SMALL, "--model", "test_efficientnet", "--dry-run")
    masters = finetune(*shared, *SMALL, "--precision", "bf16-master", "--dry-run")
    assert (statistics.returncode, masters.returncode) == (2, 2)
    assert "--batch-norm train would move the running statistics of EfficientNet twice" in statistics.stderr
    assert "Use --precision bf16, or leave it out" in masters.stderr
