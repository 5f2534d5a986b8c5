"""Image sizes through the real command line: curves, resume, the plan, and the folder that a run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from recipe_runs import Run
from safetensors.torch import load_file

from tuning.data.sampling import drawn_size

STAGES = """
model: test_vit3
weights: none
workers: 0
batch_size: 8
micro_batch: 4
tracker: none
drop_rate: 0.2
drop_path_rate: 0.3
stages:
- {name: small, open: all, epochs: 1, image_size: 32}
- {name: drawn, open: all, epochs: 2, image_size: 64, train_sizes: [32, 48, 64], mixup: 0.4}
"""


def records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


@pytest.fixture
def preset(tmp_path: Path) -> str:
    (tmp_path / "sizes.yaml").write_text(STAGES)
    return "sizes.yaml"


def test_a_vit_of_growing_and_drawn_sizes_resumed_within_an_epoch(
    photos: Path, preset: str, finetune: Run, tmp_path: Path
) -> None:
    """With dropout and drop-path on; stopped after step 8, the third of the second stage."""
    flags = ("--data", str(photos), "--preset", preset)
    for argv in (("whole",), ("run", "--max-steps", "8"), ("run", "--resume", "auto")):
        done = finetune(*flags, "--output", *argv)
        assert done.returncode == 0, done.stderr
    assert "step 8," in done.stdout
    whole, resumed = records(tmp_path / "whole"), records(tmp_path / "run")
    assert [r for r in resumed if "train/loss" in r] == [r for r in whole if "train/loss" in r]
    drawn = {r["step"]: r["train/image_size"] for r in whole if "train/image_size" in r}
    assert drawn == {step: drawn_size((32, 48, 64), 0, step - 1) for step in range(6, 16)}
    assert len({*drawn.values()}) == 3
    last = "checkpoints/step-00000015/model.safetensors"
    one, other = load_file(tmp_path / "run" / last), load_file(tmp_path / "whole" / last)
    assert all(torch.equal(one[name], other[name]) for name in other)
    plan = " ".join(done.stdout.split())
    assert "32, 48, 64 pixels, evaluated at 64" in plan
    folder = tmp_path / "run" / "model"
    config = json.loads((folder / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 64]
    assert config["model_args"] == {"img_size": 64}
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    changed = finetune(*flags, "--output", "run", "--resume", "auto", "--drop-path-rate", "0.1")
    assert changed.returncode == 2
    assert "--drop-path-rate was 0.3, now 0.1" in changed.stderr


def test_a_batch_that_follows_is_shown_in_the_plan(photos: Path, finetune: Run) -> None:
    flags = ("--data", str(photos), "--model", "test_efficientnet", "--weights", "none", "--batch-size", "8")
    preset = Path(__file__).parents[2] / "recipes" / "presets" / "progressive-resize.yaml"
    done = finetune(*flags, "--preset", str(preset), "--output", "run", "--dry-run", "--lr-scaling", "linear")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    for batch, pixels, lr in (
        ("24 = 1 x 1 x 24", 128, "2.81e-05"),
        ("16 = 1 x 1 x 16", 160, ""),
        ("8 = 1 x 1 x 8", 224, ""),
    ):
        assert f"{batch} {pixels} {lr}" in said, said
    assert "evaluated at 224" in said


def test_what_a_model_cannot_take_is_refused_before_anything_is_spent(photos: Path, finetune: Run) -> None:
    flags = ("--data", str(photos), "--weights", "none", "--batch-size", "8", "--output", "run")
    done = finetune(*flags, "--model", "resmlp_12_224", "--multi-scale", "0.25")
    assert done.returncode == 2
    assert "works at the 224 pixels only" in done.stderr
    done = finetune(*flags, "--model", "test_vit", "--train-sizes", "64", "72")
    assert done.returncode == 2
    assert "--train-sizes 72 does not work with test_vit" in done.stderr
    assert "choose a multiple of 16" in done.stderr
