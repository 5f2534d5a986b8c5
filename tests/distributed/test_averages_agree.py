"""Averages and statistics taken anew on two processes: those of one, and training goes on as if nobody had looked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from ranks import run_ranks
from recipe_runs import finetune_here
from safetensors.torch import load_file
from torch import Tensor

from tuning.averaging.norm_statistics import NormStatistics
from tuning.data.sources import open_data
from tuning.flags import DataFlags
from tuning.models.build import ModelInfo
from tuning.sharding import ASKED

COMMON = ("--weights", "none", "--image-size", "32", "--batch-size", "8", "--workers", "0", "--tracker", "none")
COMMON += ("--freeze-epochs", "0", "--epochs", "3", "--swa-epochs", "2", "--ema-decay", "0.8", "--keep", "1")
LAST = "checkpoints/step-00000015"


def finetune(world_size: int, *flags: str) -> None:
    codes = run_ranks(world_size, finetune_here, *flags)
    assert codes == [0] * world_size


def evaluations(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "eval/loss" in record]


@pytest.mark.slow
def test_averages_of_two_processes_are_those_of_one(photos: Path, tmp_path: Path) -> None:
    flags = ("--data", str(photos), "--model", "test_vit", *COMMON, "--swa-lr", "0.5")
    finetune(1, *flags, "--output", str(tmp_path / "one"))
    finetune(2, *flags, "--output", str(tmp_path / "two"))
    assert json.loads((tmp_path / "two/summary.json").read_text())["world_size"] == 2
    for name in ("ema", "swa"):
        one, two = (load_file(tmp_path / run / LAST / f"{name}.safetensors") for run in ("one", "two"))
        assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-5
        assert any(
            not torch.equal(one[key], load_file(tmp_path / "one" / LAST / "model.safetensors")[key]) for key in one
        )
    for one, two in zip(*(evaluations(tmp_path / run) for run in ("one", "two")), strict=True):
        assert one.keys() == two.keys()
        assert [two[f"eval{average}/loss"] for average in ("", "_ema")] == pytest.approx(
            [one[f"eval{average}/loss"] for average in ("", "_ema")], abs=1e-4
        )
    assert ["eval_swa/loss" in one for one in evaluations(tmp_path / "two")] == [False, True, True]


@pytest.mark.slow
def test_statistics_of_averages_are_of_all_processes_and_looking_changes_nothing(photos: Path, tmp_path: Path) -> None:
    """The saved EMA has the mean of both; with others for evaluation, training is the same bit for bit."""
    flags = ("--data", str(photos), "--model", "test_efficientnet", "--batch-norm", "train", *COMMON)
    finetune(2, *flags, "--output", str(tmp_path / "plain"))
    finetune(2, *flags, "--batch-norm-images", "20", "--output", str(tmp_path / "anew"))
    state = torch.load(tmp_path / "plain" / LAST / "optimizer.pt", weights_only=True)["statistics"]
    saved = load_file(tmp_path / "plain" / LAST / "ema.safetensors")
    of_ema = {name.removeprefix("ema/"): both for name, both in state.items() if name.startswith("ema/")}
    assert len(of_ema) > 10
    for name, both in of_ema.items():
        assert both.shape[0] == 2
        assert torch.equal(saved[name], both.mean(0)), name
    assert any(not torch.equal(both[0], both[1]) for both in of_ema.values()), "the processes saw the same images"
    for file in ("model.safetensors", "ema.safetensors"):
        plain, anew = (load_file(tmp_path / run / LAST / file) for run in ("plain", "anew"))
        assert all(torch.equal(plain[name], anew[name]) for name in plain), file
    before, after = (evaluations(tmp_path / run)[-1] for run in ("plain", "anew"))
    assert before["eval/loss"] != after["eval/loss"]
    assert before["eval_ema/loss"] != after["eval_ema/loss"]


def taken_anew(photos: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", pretrained=False, num_classes=3).train()
    flags = DataFlags(data=photos)
    data = open_data(**vars(flags), seed=0)
    info = ModelInfo("test", "test", "", 32, (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0)
    anew = NormStatistics(Accelerator(cpu=True), data, info, 0, 0, 37)
    names = [name for name, _ in model.named_buffers() if "running" in name]
    from tuning.averaging import norm_statistics

    norm_statistics.BATCH = 8  # five batches for two processes: one of them has filler
    with anew.estimated(model, names, 32):
        return {name: buffer.clone() for name, buffer in model.named_buffers()}


def test_statistics_taken_anew_are_the_same_to_the_bit(photos: Path) -> None:
    (alone,) = run_ranks(1, taken_anew, str(photos))
    for other in run_ranks(2, taken_anew, str(photos)):
        assert all(torch.equal(other[name], alone[name]) for name in alone)


def finetune_sharded(*flags: str) -> int:
    """As `accelerate_configs/fsdp2.yaml` asks for it."""
    os.environ.update({ASKED: "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"})
    return finetune_here(*flags)


@pytest.mark.slow
def test_all_of_it_on_a_model_that_is_split(photos: Path, tmp_path: Path) -> None:
    """Synchronised BatchNorm, EMA, SWA at ends of cycles, snapshots, statistics taken anew; stopped in the middle."""
    flags = ("--data", str(photos), "--model", "test_efficientnet", *COMMON, "--batch-norm", "sync")
    flags += ("--schedule", "sgdr", "--cycle-epochs", "1", "--cycle-mult", "1", "--snapshots")
    flags += ("--batch-norm-images", "20", "--optimizer", "sgd", "--lr", "0.02")
    finetune(2, *flags, "--output", str(tmp_path / "whole"))
    split = (*flags, "--output", str(tmp_path / "split"))
    assert run_ranks(2, finetune_sharded, *split, "--max-steps", "12") == [0, 0]
    assert run_ranks(2, finetune_sharded, *split, "--resume", "auto") == [0, 0]
    files = [f"{LAST}/{name}.safetensors" for name in ("model", "ema", "swa")]
    files += [f"snapshots/{name}/model.safetensors" for name in ("01", "02", "03", "averaged")]
    for file in files:
        one, other = (load_file(tmp_path / run / file) for run in ("whole", "split"))
        assert one.keys() == other.keys()
        assert max(float((one[name].double() - other[name].double()).abs().max()) for name in one) < 1e-4, file
    one, other = (json.loads((tmp_path / run / "summary.json").read_text()) for run in ("whole", "split"))
    assert one["snapshots"]["ensemble"]["loss"] == pytest.approx(other["snapshots"]["ensemble"]["loss"], abs=1e-4)
