"""A run after the LR finder is bit for bit the run without it, on one process and on two; both end a sweep together."""

from __future__ import annotations

import math
import random
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from stage_runs import PRESETS, largest_difference, state_of
from torch import Tensor

import tuning.feeds
from tuning import session
from tuning.clipping import clipping
from tuning.command_line import parse_command
from tuning.data.sources import open_data
from tuning.engine import train_steps
from tuning.entering import enter_stage
from tuning.feeds import some_evaluation, stage_feeds
from tuning.losses import Loss, cross_entropy
from tuning.lr_finder import find as search
from tuning.lr_trials import Search, Trials, judge_trial, sweep
from tuning.models import build
from tuning.plan import make_plan
from tuning.progress import Progress
from tuning.unreadable import UnreadablePictures

# BatchNorm in training mode, dropout, random crops, several micro-batches a step; 7 steps go round 37 images.
MODEL = ("--model", "test_efficientnet", "--weights", "none", "--image-size", "32", "--batch-norm", "train")
HOW = ("--drop-rate", "0.2", "--augment", "medium", "--batch-size", "8", "--micro-batch", "4", "--lr-ratio", "0.3")
SEARCH = Search(1e-5, 0.5, 7, 2, race=4)


@dataclass
class Trained:
    """What one process saw.

    Attributes:
        losses: of every step of training.
        states: of the model after every stage.
        optimizer: state tensors at the end.
        draws: of the global generators at the end.
        progress: at the end.
        unreadable: pictures counted.
        swept: losses of the sweeps.
        judged: losses of the evaluation images after every candidate of the race.
    """

    losses: list[float] = field(default_factory=list)
    states: list[dict[str, Tensor]] = field(default_factory=list)
    optimizer: list[Tensor] = field(default_factory=list)
    draws: list[float] = field(default_factory=list)
    progress: dict[str, Any] = field(default_factory=dict)
    unreadable: dict[str, int] = field(default_factory=dict)
    swept: list[float] = field(default_factory=list)
    judged: list[float] = field(default_factory=list)


def train(find: bool, *argv: str) -> Trained:
    """Every stage of the command line, with or without a search at its start."""
    command = parse_command([*argv, "--tracker", "none"], "test", "", PRESETS)
    flags = command.flags
    accelerator = session.start(flags.run.precision, 1)
    data = open_data(**vars(flags.data), seed=0)
    model, info = build(
        flags.model.model,
        classes=data.classes,
        weights=flags.model.weights,
        drop_rate=flags.model.drop_rate,
        image_size=flags.model.image_size,
        seed=0,
    )
    plan = make_plan(
        command.stages,
        model,
        train_images=len(data.train),
        world_size=accelerator.num_processes,
        micro_batch=flags.batch.micro_batch,
        image_size=info.input_size,
    )
    loss, clip, workers = cross_entropy(), clipping(1.0, None, None), int(flags.batch.workers)
    done, progress, entered = Trained(), Progress(), None
    unreadable = UnreadablePictures(accelerator, None, data, 1.0, resumed=False)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    for number, planned in enumerate(plan):
        entered = enter_stage(accelerator, model, planned, before=entered)
        feeds = stage_feeds(accelerator, entered, planned, data, info, unreadable, 0, "both", workers)
        if find:
            some = some_evaluation(accelerator, feeds, planned, data, info, 0, workers)
            judged = partial(judge_trial, accelerator, entered, feeds.judged, some, None, 3, "top1", iter)
            trials = Trials(accelerator, entered, feeds.train, loss, clip, 0, judged)
            found = search(trials, SEARCH, lambda values, step: None)
            done.swept += [value for swept in found.sweeps for value in swept.losses]
            done.judged += [value for candidate in found.race for value in candidate.judged]
            unreadable.check()
            assert unreadable.counts == done.unreadable or not number
            entered = enter_stage(accelerator, model, planned, before=entered)
        done.draws += [random.random(), float(np.random.rand()), float(torch.rand(()))]
        done.losses += [
            float(step.loss) for step in train_steps(accelerator, entered, feeds.train, loss, clip, progress, 0)
        ]
        unreadable.check()
        done.states.append(state_of(model))
        done.unreadable = unreadable.counts
        progress.stage, progress.stage_step = number + 1, 0
    done.optimizer = [
        value.clone()
        for group in entered.optimizer.param_groups  # type: ignore[union-attr]
        for parameter in group["params"]
        for value in entered.optimizer.state.get(parameter, {}).values()  # type: ignore[union-attr]
        if isinstance(value, Tensor)
    ]
    done.draws += [random.random(), float(np.random.rand()), float(torch.rand(()))]
    done.progress = progress.to_json()
    return done


def equal(a: Trained, b: Trained) -> None:
    assert a.losses == b.losses
    assert [largest_difference(x, y) for x, y in zip(a.states, b.states, strict=True)] == [0] * len(b.states)
    assert len(a.optimizer) == len(b.optimizer) > 0
    assert all(torch.equal(x, y) for x, y in zip(a.optimizer, b.optimizer, strict=True))
    assert (a.draws, a.progress, a.unreadable) == (b.draws, b.progress, b.unreadable)


@pytest.fixture(scope="module")
def damaged(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures, one of them cut short: it is replaced, and counted once, by training alone."""
    root = tmp_path_factory.mktemp("damaged") / "photos"
    shutil.copytree(photos, root)
    path = root / "train/dog/003.png"
    path.write_bytes(path.read_bytes()[:60])
    return root


@pytest.mark.parametrize(
    ("world_size", "optimizer"), [(1, "adamw"), (2, "adamw"), pytest.param(2, "sgd", marks=pytest.mark.slow)]
)
def test_training_after_the_finder_is_bit_identical(damaged: Path, world_size: int, optimizer: str) -> None:
    stages = ("--freeze-epochs", "1", "--epochs", "1")
    argv = ("--data", str(damaged), *MODEL, *HOW, *stages, "--optimizer", optimizer, "--workers", "0")
    plain = run_ranks(world_size, train, False, *argv)
    after = run_ranks(world_size, train, True, *argv)
    for without, found in zip(plain, after, strict=True):
        equal(found, without)
        assert found.unreadable == {"train": 1, "eval": 0}
        assert len(found.swept) >= 8
    assert len({tuple(found.swept) for found in after}) == 1, "the processes saw different losses"
    assert len({tuple(found.judged) for found in after}) == 1, "the processes judged differently"
    assert len(after[0].judged) >= 2 * 3 * 11, "two stages, three candidates, every evaluation image"


def test_with_loader_processes_and_cached_features(photos: Path) -> None:
    """A sweep leaves its epoch in the middle; the loader's processes live on. The head's stage has no pictures."""
    stages = ("--freeze-epochs", "3", "--cache-features", "--epochs", "1")
    argv = ("--data", str(photos), *MODEL, *HOW, *stages, "--workers", "2")
    (without,) = run_ranks(1, train, False, *argv)
    (found,) = run_ranks(1, train, True, *argv)
    equal(found, without)


def ends(rank_at_fault: int, value: float, photos: str) -> tuple[str, list[float]]:
    """A sweep in which one process's loss becomes *value* in its fourth step."""
    command = parse_command(["--data", photos, *MODEL, *HOW, "--freeze-epochs", "0"], "test", "", PRESETS)
    accelerator = session.start(None, 1)
    data = open_data(**vars(command.flags.data), seed=0)
    model, info = build("test_efficientnet", classes=data.classes, weights="none", image_size=32, seed=0)
    world = accelerator.num_processes
    options: dict[str, Any] = {"train_images": len(data.train), "world_size": world, "micro_batch": 2}
    (planned,) = make_plan(command.stages, model, **options, image_size=32)
    entered = enter_stage(accelerator, model, planned)
    unreadable = UnreadablePictures(accelerator, None, data, 1.0, resumed=False)
    feeds = stage_feeds(accelerator, entered, planned, data, info, unreadable, 0, "both", 0)
    calls = iter(range(10**6))
    at_fault, each = accelerator.process_index == rank_at_fault, planned.batch.accumulation

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        factor = value if next(calls) // each == 3 and at_fault else 1.0
        return cross_entropy()(logits * 0.01, labels) * factor  # no divergence of its own

    faulty: Loss = loss
    trials = Trials(accelerator, entered, feeds.train, faulty, clipping(1.0, None, None), 0, torch.empty)
    swept = sweep(trials, SEARCH)
    accelerator.wait_for_everyone()
    return swept.ended, [-1.0 if math.isnan(x) else x for x in swept.losses]


@pytest.mark.parametrize(
    ("value", "how"),
    [(math.nan, "not finite"), (math.inf, "not finite"), (1e4, "diverged")],
)
def test_all_processes_end_a_sweep_at_the_same_step(photos: Path, value: float, how: str) -> None:
    first, second = run_ranks(2, ends, 1, value, str(photos))
    assert first == second
    assert first[0] == how
    assert len(first[1]) == 4


def test_one_process_or_two_draw_the_same_curve(photos: Path) -> None:
    """Without BatchNorm and dropout: their draws belong to a process."""
    model = ("--model", "test_vit", "--weights", "none", "--image-size", "32", "--batch-size", "8")
    argv = ("--data", str(photos), *model, "--freeze-epochs", "0", "--epochs", "1", "--workers", "0")
    (alone,) = run_ranks(1, train, True, *argv)
    first, _ = run_ranks(2, train, True, *argv)
    assert first.swept == pytest.approx(alone.swept, abs=1e-3, rel=1e-3)
    assert first.judged == pytest.approx(alone.judged, abs=1e-2, rel=1e-2)


def few_judged(photos: str) -> tuple[int, list[int], dict[str, int]]:
    """Where there are more evaluation images than a trial is judged by: how many, labels, what was noted of them."""
    tuning.feeds.JUDGED = 6  # in this process alone
    command = parse_command(["--data", photos, *MODEL, *HOW, "--freeze-epochs", "0"], "test", "", PRESETS)
    accelerator = session.start(None, 1)
    data = open_data(**vars(command.flags.data), seed=0)
    model, info = build("test_efficientnet", classes=data.classes, weights="none", image_size=32, seed=0)
    options: dict[str, Any] = {"train_images": len(data.train), "world_size": accelerator.num_processes}
    (planned,) = make_plan(command.stages, model, **options, micro_batch=2, image_size=32)
    entered = enter_stage(accelerator, model, planned)
    unreadable = UnreadablePictures(accelerator, None, data, 1.0, resumed=False)
    whole = stage_feeds(accelerator, entered, planned, data, info, unreadable, 0, "both", 0)
    some = some_evaluation(accelerator, whole, planned, data, info, 0, 0)
    labels = [int(label) for micro in some for label, weight in zip(micro.labels, micro.weights, strict=True) if weight]
    losses, reached = judge_trial(accelerator, entered, model, some, None, 3, "top1", iter)
    assert all(math.isfinite(loss) for loss in losses)
    assert 0 <= reached <= 1
    unreadable.check()
    return len(losses), labels, unreadable.counts


def test_a_trial_is_judged_by_a_bounded_number_of_images_of_every_class(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    for path in (tmp_path / "photos/val/cat").glob("00[0-3].png"):
        path.write_bytes(path.read_bytes()[:60])
    ranks = run_ranks(2, few_judged, str(tmp_path / "photos"))
    judged = sorted(label for _, labels, _ in ranks for label in labels)
    assert {label for label in judged if label} == {1, 2}
    assert len(judged) < 6, "some of the damaged are among the six"
    assert [count for count, _, _ in ranks] == [len(judged)] * 2
    assert all(counts == {"train": 0, "eval": 0} for _, _, counts in ranks), "noted by the run, not by a trial"
