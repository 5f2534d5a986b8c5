"""The CPU's allocator really fails on one process, and the recipe goes on, also when it is resumed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from plain_stages import plain_stage
from ranks import run_ranks
from recipe_runs import finetune_here
from safetensors.torch import load_file
from short_memory import ShortMemory, limit_memory
from stage_runs import largest_difference, state_of
from torch import Tensor

from tuning import session
from tuning.clipping import clipping
from tuning.data.loader import FeatureFeed
from tuning.data.sampling import TrainOrder
from tuning.engine import train_steps
from tuning.entering import enter_stage
from tuning.losses import cross_entropy
from tuning.plan import make_plan
from tuning.progress import Progress
from tuning.safety import heartbeat
from tuning.safety.checkpoint import find
from tuning.sizes import BatchPlan

SIDE, SHARE = 160, 64
MODEL = ("--model", "test_vit", "--weights", "none", "--image-size", "32", "--augment", "medium")
STAGES = ("--freeze-epochs", "1", "--epochs", "2", "--lr-ratio", "0.2", "--workers", "0", "--tracker", "none")
HOW = (*MODEL, *STAGES, "--batch-size", "16", "--save-every", "1", "--log-every", "1")


def really(micro: int, megabytes: int | None) -> tuple[list[int], list[float], dict[str, Tensor]]:
    """Three steps; the last rank may take only so much more memory. Micro-batch and loss of each, and the weights.

    A small step before them starts the threads of the exchange, each of which takes memory of its own.
    """
    accelerator = session.start("fp32", 1)
    rank, world = accelerator.process_index, accelerator.num_processes
    images = 3 * SHARE * world
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3, img_size=SIDE)
    pictures = torch.randn(images, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    stage = plain_stage(batch_size=SHARE * world, lr=0.02)
    (planned,) = make_plan([stage], model, train_images=images, world_size=world, micro_batch=micro, image_size=SIDE)
    entered = enter_stage(accelerator, model, planned)
    labels = torch.arange(images) % 3
    feed = FeatureFeed(pictures, labels, TrainOrder(images, 0, planned.batch, rank))
    few = TrainOrder(2 * world, 0, BatchPlan(2 * world, 2, world), rank)
    loss, clip = cross_entropy(), clipping(1.0, None, None)
    next(train_steps(accelerator, entered, FeatureFeed(pictures, labels, few), loss, clip, Progress(), 0))
    if megabytes is not None and rank == world - 1:
        limit_memory(megabytes)
    sizes, losses = [], []
    for step in train_steps(accelerator, entered, feed, loss, clip, Progress(), 0):
        sizes.append(step.order.batch.micro_batch)
        losses.append(float(step.loss))
    return sizes, losses, state_of(model)


@pytest.mark.slow  # and alone: a process that has trained before has memory to spare, which no limit takes away
@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does it")
@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_the_allocator_fails(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "keep_freed_memory", lambda: None)  # it takes more at once than is limited here
    ranks = run_ranks(world, really, SHARE, 90)
    fitting = ranks[0][0][-1]
    assert 1 <= fitting < SHARE, "memory did not run out"
    (_, losses, state), *_ = run_ranks(world, really, fitting, None)
    for sizes, ours, ended in ranks:
        assert sizes[-1] == fitting
        assert ours == pytest.approx(losses, abs=1e-5)
        assert largest_difference(ended, state) < 1e-5


def recipe(short: ShortMemory | None, end_at: int | None, *flags: str) -> int:
    """The recipe; its last rank runs out of memory as *short* says, and all end in the middle of step *end_at*."""
    if short and int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        short.watch_all("Block")
    if end_at is not None:
        heartbeat.beat = lambda step: sys.exit(9) if step == end_at else None
    return finetune_here(*flags)


def lines(run: Path) -> list[dict[str, Any]]:
    """What ``metrics.jsonl`` says about training."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "train/loss" in record]


def without(prefix: str, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if not key.startswith(prefix)} for record in records]


def sizes(run: Path) -> list[int]:
    return [record["perf/micro_batch"] for record in lines(run)]


def test_the_recipe_at_two_processes(photos: Path, tmp_path: Path) -> None:
    """37 pictures: three steps an epoch, one stage of the head and one of all; memory runs out in the second."""
    flags, small, run = ("--data", str(photos), *HOW), tmp_path / "small", tmp_path / "run"
    assert run_ranks(2, recipe, None, None, *flags, "--micro-batch", "2", "--output", str(small)) == [0, 0]
    short = ShortMemory("backward", fits=2, first=40)  # two blocks' passes a step count for each of its micro-batches
    assert run_ranks(2, recipe, short, None, *flags, "--output", str(run)) == [0, 0]
    assert json.loads((run / "summary.json").read_text())["world_size"] == 2
    assert sizes(small) == [2] * 9
    assert sizes(run)[:3] == [8] * 3
    assert sizes(run)[-3:] == [2] * 3
    ours, theirs = lines(run), lines(small)
    rates = [without("train/", without("perf/", records)) for records in (ours, theirs)]
    assert rates[0] == rates[1]
    assert [a["train/loss"] for a in ours] == pytest.approx([b["train/loss"] for b in theirs], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_that_ends_anywhere_goes_on_with_what_fitted(photos: Path, tmp_path: Path, world: int) -> None:
    """Bit for bit, without running out of memory again; with dropout, which depends on the micro-batches."""
    flags, whole, broken = ("--data", str(photos), *HOW, "--drop-rate", "0.2"), tmp_path / "whole", tmp_path / "broken"
    short = ShortMemory("backward", fits=4, first=40)
    assert run_ranks(world, recipe, short, None, *flags, "--output", str(whole)) == [0] * world
    assert run_ranks(world, recipe, short, 8, *flags, "--output", str(broken)) == [9] * world
    found, damaged = find(broken, "auto")
    assert found is not None
    assert (found.progress.micro_batch, damaged) == (4, [])
    assert run_ranks(world, recipe, None, None, *flags, "--output", str(broken), "--resume", "auto") == [0] * world
    assert sizes(broken) == sizes(whole)
    assert sizes(whole)[-1] == 4 < sizes(whole)[0]
    assert without("perf/", lines(broken)) == without("perf/", lines(whole))
    ends = [find(run, "auto")[0] for run in (whole, broken)]
    first, second = (load_file(end.folder / "model.safetensors") for end in ends if end)
    assert largest_difference(first, second) == 0
