"""FSDP2 on two gloo processes: each holds half of the model, and they train what plain data parallelism trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from plain_stages import plain_stage
from ranks import run_ranks
from recipe_runs import ROOT, finetune_here, recipe_here
from safetensors.torch import load_file
from stage_runs import StageRun, largest_difference, run_stages, state_of
from torch import nn

from tuning import session, sharding
from tuning.clipping import clipping
from tuning.data.loader import FeatureFeed
from tuning.data.sampling import TrainOrder
from tuning.engine import train_steps
from tuning.entering import enter_stage
from tuning.errors import UserError
from tuning.losses import cross_entropy
from tuning.plan import make_plan
from tuning.progress import Progress
from tuning.safety.checkpoint import checkpoints, load
from tuning.safety.manifest import read
from tuning.safety.saving import Saver

VIT = ("--model", "test_vit", "--weights", "none", "--image-size", "32", "--batch-size", "8", "--micro-batch", "2")
STAGES = ("--freeze-epochs", "1", "--epochs", "2", "--unfreeze", "gradual", "--layer-decay", "0.7")
ROUNDING = 1e-6


def ask(**settings: str) -> None:
    """What `accelerate launch --config_file accelerate_configs/fsdp2.yaml` puts into the environment."""
    os.environ.update({sharding.ASKED: "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP", **settings})


def sharded_stages(settings: dict[str, str], *argv: str) -> StageRun:
    ask(**settings)
    return run_stages(*argv)


def same(a: StageRun, b: StageRun, within: float = ROUNDING) -> None:
    assert len(a.states) == len(b.states) > 2
    for one, other in zip(a.states, b.states, strict=True):
        assert largest_difference(one, other) < within
    assert a.losses == pytest.approx(b.losses, abs=within)
    assert a.lrs == b.lrs
    assert a.opened == b.opened


@pytest.mark.parametrize(
    "flags", [(), pytest.param(("--clip-value", "0.01"), marks=pytest.mark.slow)], ids=["norm", "value"]
)
def test_stages_under_sharding_equal_plain_data_parallelism(photos: Path, flags: tuple[str, ...]) -> None:
    """Four micro-batches a step, three stages, decay by depth; and one process gives the same."""
    argv = ("--data", str(photos), *VIT, *STAGES, "--optimizer", "sgd", "--lr", "0.05", *flags)
    first, second = run_ranks(2, sharded_stages, {}, *argv)
    same(first, run_ranks(2, run_stages, *argv)[0])
    same(first, run_ranks(1, run_stages, *argv)[0])
    for on_first, on_second in zip(first.states, second.states, strict=True):
        assert largest_difference(on_first, on_second) == 0
    assert first.metrics == second.metrics


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", sharding.OPTIMIZERS)
def test_every_optimizer_that_is_offered(photos: Path, optimizer: str) -> None:
    argv = ("--data", str(photos), *VIT, *STAGES, "--optimizer", optimizer, "--lr", "1e-3")
    same(run_ranks(2, sharded_stages, {}, *argv)[0], run_ranks(2, run_stages, *argv)[0], within=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["test_convnext", "test_resnet", "test_efficientnet", "regnetx_002"])
def test_other_families(photos: Path, model: str) -> None:
    """With running statistics, and without a repeated block."""
    argv = ("--data", str(photos), "--model", model, "--weights", "none", "--image-size", "64", "--batch-size", "8")
    argv += (*STAGES, "--optimizer", "sgd", "--lr", "0.01")
    same(run_ranks(2, sharded_stages, {}, *argv)[0], run_ranks(2, run_stages, *argv)[0], within=1e-5)


@pytest.mark.slow
def test_open_parts_and_several_sizes(photos: Path, tmp_path: Path) -> None:
    """Of every block a part is open; position embeddings are resampled from what is gathered."""
    preset = tmp_path / "parts.yaml"
    preset.write_text(
        "stages:\n- {open: norms, epochs: 1, image_size: 32}\n"
        "- {open: norms-biases, epochs: 1, image_size: 64, train_sizes: [32, 64]}\n"
        "- {open: all, epochs: 1, image_size: 48}\n"
    )
    argv = (
        "--data",
        str(photos),
        "--model",
        "test_vit3",
        "--weights",
        "none",
        "--batch-size",
        "8",
        "--micro-batch",
        "2",
    )
    argv += ("--micro-batch", "2", "--preset", str(preset), "--optimizer", "sgd", "--lr", "0.05")
    same(run_ranks(2, sharded_stages, {}, *argv)[0], run_ranks(2, run_stages, *argv)[0])


@pytest.mark.slow
def test_bf16_and_checkpointed_activations(photos: Path) -> None:
    """Blocks are gathered in bf16, gradients summed in float32: near the run in bf16 that is not split."""
    argv = ("--data", str(photos), *VIT, *STAGES, "--optimizer", "sgd", "--lr", "0.02", "--precision", "bf16")
    settings = {"FSDP_ACTIVATION_CHECKPOINTING": "true"}
    same(run_ranks(2, sharded_stages, settings, *argv)[0], run_ranks(2, run_stages, *argv)[0], within=0.02)


IMAGES, CLASSES = 22, 3
ADAMW = {"optimizer": "adamw", "lr": 1e-3}
SPLIT, ALONE = (2, True), (1, False)  # processes, and whether they share the model


def train(steps: int, run: Path | None = None, found: Path | None = None, split: bool = True) -> dict[str, object]:
    """Stage 2 of 2 of a ViT: a checkpoint into *run* after *steps* steps, or on from *found*; what this rank holds."""
    if split:
        ask()
    torch.manual_seed(0)
    accelerator = session.start("fp32", 1, shards=True)
    model: nn.Module = timm.create_model("test_vit", num_classes=CLASSES, img_size=32)
    total = sum(p.numel() for p in model.parameters())
    sharding.shard(accelerator, model)
    stages = [plain_stage(open="head", batch_size=8, **ADAMW), plain_stage(batch_size=8, epochs=4, **ADAMW)]
    plan = make_plan(
        stages,
        model,
        train_images=IMAGES,
        world_size=accelerator.num_processes,
        micro_batch="auto",
        image_size=32,
    )
    entered = enter_stage(accelerator, model, plan[0])
    entered = enter_stage(accelerator, model, plan[1], before=entered)
    progress = Progress(stage=1)
    if found is not None:
        checkpoint = read(found)
        progress = checkpoint.progress
        load(accelerator, checkpoint, entered)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 3, 32, 32, generator=generator)
    labels = torch.randint(0, CLASSES, (IMAGES,), generator=generator)
    feed = FeatureFeed(images, labels, TrainOrder(IMAGES, 0, plan[1].batch, accelerator.process_index))
    for step in train_steps(accelerator, entered, feed, cross_entropy(), clipping(1.0, None, None), progress, 0):
        if step.step == steps:
            break
    if run is not None:
        with Saver(accelerator, run, 1, {"config_sha256": ""}) as saver:
            saver.save(entered, progress)
    held = entered.optimizer.state.values()
    moments = sum(sharding.own(t).numel() for state in held for t in state.values() if isinstance(t, torch.Tensor))
    return {
        "share": sum(sharding.own(p).numel() for p in model.parameters()) / total,
        "moments": moments / total / 2,
        "state": {name: sharding.whole(t).clone() for name, t in state_of(model).items()},
    }


def test_each_process_holds_half() -> None:
    for held in run_ranks(2, train, 2):
        assert held["share"] == pytest.approx(0.5, abs=0.02)
        assert held["moments"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("before", "after"), [(SPLIT, SPLIT), (SPLIT, ALONE), pytest.param(ALONE, SPLIT, marks=pytest.mark.slow)]
)
def test_a_checkpoint_goes_on_split_or_whole(tmp_path: Path, before: tuple[int, bool], after: tuple[int, bool]) -> None:
    """Bit for bit where the processes stay as they were; else up to rounding. The moments go along: without them the
    next steps would be others."""
    (processes, split), (later, split_later) = before, after
    uninterrupted = run_ranks(processes, train, 7, None, None, split)[0]
    run_ranks(processes, train, 4, tmp_path, None, split)
    (found,) = checkpoints(tmp_path).iterdir()
    whole = load_file(found / "model.safetensors")
    assert {n: t.shape for n, t in whole.items()} == {n: t.shape for n, t in uninterrupted["state"].items()}
    resumed = run_ranks(later, train, 7, None, found, split_later)[0]
    apart = largest_difference(resumed["state"], uninterrupted["state"])
    assert apart == 0 if before == after else apart < 1e-5
    assert largest_difference(whole, uninterrupted["state"]) > 1e-4  # the three steps do something


def finetune_sharded(folder: Path, settings: dict[str, str], *flags: str) -> int:
    os.chdir(folder)
    ask(**settings)
    return finetune_here(*flags)


@pytest.mark.slow
def test_the_recipe_trains_stops_and_goes_on(photos: Path, tmp_path: Path) -> None:
    """With averaged weights, the report and the model of timm at the end; a stop in between changes nothing."""
    flags = ("--data", str(photos), *VIT, *STAGES, "--ema-decay", "0.9", "--tracker", "none", "--workers", "0")
    for argv in (("whole",), ("run", "--max-steps", "7"), ("run", "--resume", "auto")):
        assert run_ranks(2, finetune_sharded, tmp_path, {}, *flags, "--output", *argv) == [0, 0]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["world_size"]) == ("done", 2)
    assert (tmp_path / "run" / "report.html").exists()
    for path in ("checkpoints/step-00000015/model.safetensors", "checkpoints/step-00000015/ema.safetensors"):
        run, whole = (load_file(tmp_path / name / path) for name in ("run", "whole"))
        assert all(torch.equal(run[name], whole[name]) for name in whole)
    model = timm.create_model(f"local-dir:{tmp_path / 'run' / 'model'}", pretrained=True)
    assert largest_difference(model.state_dict(), load_file(tmp_path / "run" / "model" / "model.safetensors")) == 0
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    best = max(m["eval_ema/balanced_accuracy"] for m in metrics if "eval_ema/balanced_accuracy" in m)
    assert summary["best"]["balanced_accuracy"] == pytest.approx(best)
    assert summary["judged"]["balanced_accuracy"] == pytest.approx(best, abs=1e-6)


@pytest.mark.slow
def test_the_real_launcher_asks_for_it(photos: Path, tmp_path: Path) -> None:
    config = ROOT / "accelerate_configs" / "fsdp2.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += [
        "--num_processes",
        "2",
        "--mixed_precision",
        "no",
        str(ROOT / "recipes" / "finetune.py"),
        "--data",
        str(photos),
        *VIT,
        "--freeze-epochs",
        "0",
    ]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    command += ["--epochs", "1", "--output", "run", "--tracker", "none"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 x cpu, fp32" in done.stdout
    assert "one model split over all (FSDP2)" in done.stdout
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 2


def find_lr(folder: Path, split: bool, *flags: str) -> int | None:
    if split:
        ask()
    return recipe_here(folder, "find_lr", *flags).returncode


@pytest.mark.slow
def test_the_lr_finder_draws_the_same_curve(photos: Path, tmp_path: Path) -> None:
    """Its trials, too, leave no trace: each begins where the first did."""
    flags = ("--data", str(photos), *VIT, *STAGES, "--stage", "all", "--tracker", "none", "--workers", "0")
    flags += ("--finder-steps", "30", "--finder-sweeps", "2", "--finder-race", "10")
    curves = []
    for split in (True, False):
        run = tmp_path / f"split-{split}"
        assert run_ranks(2, find_lr, tmp_path, split, *flags, "--output", str(run)) == [0, 0]
        curves.append([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])
    losses = [[m["lr_finder/loss"] for m in curve if m.get("lr_finder/loss")] for curve in curves]
    assert len(losses[0]) > 40
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)  # at the end of a sweep rounding grows


def test_a_refusal_ends_the_recipe_with_2(photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ("--data", str(photos), *VIT, "--head-init", "fitted", "--tracker", "none", "--workers", "0")
    assert run_ranks(2, finetune_sharded, tmp_path, {}, *argv) == [2, 2]
    assert "--head-init fitted needs whole parameters" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("settings", "precision", "said"),
    [
        ({"FSDP_VERSION": "1"}, "fp32", "fsdp_version 1 is not supported: set fsdp_version: 2"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, "fp32", "fsdp_reshard_after_forward: false is not supported"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fp32", "fsdp_offload_params needs a GPU"),
        ({}, "fp16", "precision fp16 is not supported under FSDP"),
    ],
)
def test_settings_that_cannot_work(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], precision: str, said: str
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    ask(**settings)
    with pytest.raises(UserError, match=said):
        sharding.check_asked(True, precision, 2, torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "clip_agc", "said"),
    [
        ({"optimizer": "adamp"}, None, "--optimizer adamp is not known to work under FSDP"),
        ({"cache_features": True}, None, "--cache-features needs whole parameters"),
        ({}, 0.02, "--clip-agc needs whole parameters"),
    ],
)
def test_flags_that_cannot_work(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], clip_agc: float | None, said: str
) -> None:
    stages = [plain_stage(), plain_stage(**changes)]
    sharding.check_flags(stages, "default", clip_agc)
    monkeypatch.setenv(sharding.ASKED, "true")
    with pytest.raises(UserError, match=said):
        sharding.check_flags(stages, "default", clip_agc)


def refusal(world_size: int, shards: bool) -> str:
    ask()
    with pytest.raises(UserError) as refused:
        session.start("fp32", 1, shards=shards)
    return str(refused.value)


def test_one_process_and_other_recipes_are_refused() -> None:
    assert "there is one process: nothing to share" in run_ranks(1, refusal, 1, True)[0]
    assert "only finetune.py and find_lr.py can split a model" in run_ranks(2, refusal, 2, False)[0]


def scalars() -> str:
    ask()
    accelerator = session.start("fp32", 1, shards=True)
    with pytest.raises(UserError) as refused:
        sharding.shard(accelerator, timm.create_model("dm_nfnet_f0", num_classes=3))
    return str(refused.value)


def test_single_numbers_cannot_be_split() -> None:
    assert "NormFreeNet can't be sharded" in run_ranks(2, scalars)[0]
