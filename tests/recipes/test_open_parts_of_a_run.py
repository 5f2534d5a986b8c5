"""Stages that open norms and biases through the real command line: the plan, resume; and what presets mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_runs import Run
from safetensors.torch import load_file

from tuning.cli.command_line import parse_command
from tuning.stages import Stage

PRESETS = Path(__file__).parents[2] / "recipes" / "presets"


def losses(run: Path) -> list[Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train/loss"], line["train/grad_norm"]) for line in lines if "train/loss" in line]


@pytest.mark.slow
def test_a_run_that_opens_norms_and_biases_resumed_within_an_epoch(photos: Path, finetune: Run, tmp_path: Path) -> None:
    """BatchNorm statistics move; drop-path and dropout are drawn anew at every step, not by what came before."""
    flags = ("--data", str(photos), "--model", "test_efficientnet", "--weights", "none", "--image-size", "32")
    flags += ("--batch-size", "8", "--micro-batch", "4", "--workers", "0", "--tracker", "none", "--drop-rate", "0.2")
    flags += ("--drop-path-rate", "0.3", "--freeze-epochs", "0", "--epochs", "2", "--unfreeze", "norms-biases")
    for argv in (("whole",), ("run", "--max-steps", "7"), ("run", "--resume", "auto")):
        done = finetune(*flags, "--output", *argv)
        assert done.returncode == 0, done.stderr
    assert "step 7," in done.stdout
    assert "norms-biases norms-biases 3," in " ".join(done.stdout.split()), "of 99,967 parameters"
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    last = "checkpoints/step-00000010/model.safetensors"
    one, other = load_file(tmp_path / "run" / last), load_file(tmp_path / "whole" / last)
    assert all(torch.equal(one[name], other[name]) for name in other)


def stages(name: str, *flags: str) -> tuple[Stage, ...]:
    return parse_command(["--data", "photos", "--preset", name, *flags], "recipes/finetune.py", "", PRESETS).stages


def test_what_the_presets_mean() -> None:
    growing = stages("progressive-resize", "--lr-scaling", "linear")
    assert [(s.open, s.image_size, s.batch_size, s.batch_scaling) for s in growing] == [
        ("all", size, 64, "area") for size in (128, 160, 224)
    ]
    train, last = stages("fixres")
    assert (train.open, last.open, last.augment, last.batch_norm) == ("all", "norms", "none", "frozen")
    assert train.image_size < last.image_size
    assert stages("fixres", "--batch-norm", "train")[1].batch_norm == "train"
    (whole,) = stages("lp-ft")
    assert (whole.open, whole.lr_ratio) == ("all", 0.1)
    command = parse_command(["--data", "photos", "--preset", "lp-ft"], "recipes/finetune.py", "", PRESETS)
    assert command.flags.model.head_init == "fitted"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["progressive-resize", "fixres", "lp-ft"])
def test_the_presets_run(photos: Path, finetune: Run, tmp_path: Path, name: str) -> None:
    flags = ("--data", str(photos), "--preset", name, "--model", "test_efficientnet", "--weights", "none")
    done = finetune(*flags, "--batch-size", "8", "--output", "run", "--tracker", "none", "--batch-norm", "train")
    assert done.returncode == 0, done.stderr
    size = {"progressive-resize": 224, "fixres": 224, "lp-ft": 160}[name]
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, size, size]
