"""Faults of a model, planted in real stages, are seen by a few steps of the engine; a sound model has none."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from pictures import noise
from torch import nn

from tuning import entering, session
from tuning.cli.command_line import parse_command
from tuning.clipping import clipping
from tuning.data.sources import Data, open_data
from tuning.entering import Entered, enter_stage
from tuning.feeds import stage_feeds
from tuning.losses import Loss, balanced_weights, binary_cross_entropy, cross_entropy, focal
from tuning.lr_search.trials import Search
from tuning.models.build import ModelInfo, build
from tuning.overfit.gradients import GradientWatch
from tuning.plan import StagePlan, make_plan
from tuning.preflight import trial, verdict
from tuning.preflight.findings import Finding
from tuning.preflight.memory import (
    Memory,
    counted_activations,
    estimate,
    fitting_micro_batch,
    largest_that_fits,
)
from tuning.preflight.timing import expected_seconds
from tuning.preflight.trial import StageTrial, channel_statistics, some_pictures, trial_plan, try_stage
from tuning.safety.unreadable import UnreadablePictures

FLAGS = ("--batch-size", "8", "--weights", "none", "--image-size", "32", "--lr-ratio", "0.1")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """24 and 8 different pictures of two classes."""
    root, seed = tmp_path_factory.mktemp("photos"), 0
    for split, count in (("train", 12), ("val", 4)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                noise(32, 32, seed).save(root / split / name / f"{number}.png")
                seed += 1
    columns = {"image_column": None, "label_column": None, "train_split": None, "eval_split": None}
    return open_data(str(root), **columns, val_fraction=0.25, seed=0, limit_train=None, limit_eval=None)


@pytest.fixture(scope="session")
def accelerator() -> Accelerator:
    return session.start("fp32", 1)


Plant = Callable[[nn.Module], Any]
Parts = tuple[nn.Module, ModelInfo, tuple[StagePlan, ...]]


def parts(data: Data, *flags: str, model: str = "test_vit", plant: Plant = lambda model: None) -> Parts:
    """A model with its fault, and the plan of its stages."""
    command = parse_command(["--data", "x", *FLAGS, *flags], "test", "", Path())
    raw, info = build(model, classes=data.classes, weights="none", image_size=32)
    plant(raw)
    plan = make_plan(command.stages, raw, train_images=24, world_size=1, micro_batch="auto", image_size=32)
    return raw, info, plan


def tried(
    accelerator: Accelerator,
    data: Data,
    made: Parts,
    stage: int = -1,
    spoil: Callable[[Entered], Any] = lambda e: None,
    chosen: Loss | None = None,
) -> StageTrial:
    """Three steps of one stage."""
    model, info, plan = made
    short = trial_plan(plan[stage], len(data.train), on_cpu=True)
    entered = enter_stage(accelerator, model, short)
    unreadable = UnreadablePictures(accelerator, None, data, 1.0, resumed=False)
    feed = stage_feeds(accelerator, entered, short, data, info, unreadable, 0, "none", 0).train
    spoil(entered)
    loss, clip = chosen or cross_entropy(), clipping(1.0, None, None)
    return try_stage(accelerator, entered, short, feed, loss, clip, trial.uniform_loss(data, loss), 0, 3)


def judged(one: StageTrial, world_size: int = 1) -> list[tuple[str, str]]:
    return [(f.severity, f.kind) for f in verdict.trial_findings([one], world_size, fitted=False)]


@pytest.mark.parametrize(
    ("model", "stage"), [("test_vit", 0), ("test_vit", 1), ("test_efficientnet", 1), ("resnet18", 1)]
)
def test_a_sound_model_has_no_fault(accelerator: Accelerator, data: Data, model: str, stage: int) -> None:
    one = tried(accelerator, data, parts(data, model=model), stage)
    assert (one.missing, one.zero, one.drifted, one.wrong_lrs, one.grouped) == ((), (), (), (), {})
    assert len(one.losses) == 3
    assert one.expected_loss == pytest.approx(math.log(2))
    assert one.seconds_per_image > 0
    assert {kind for severity, kind in judged(one) if severity != "note"} == set()


def test_learning_rates_are_those_of_the_run(accelerator: Accelerator, data: Data) -> None:
    made = parts(data, "--warmup-epochs", "2", "--lr", "0.01", "--epochs", "6")
    one = tried(accelerator, data, made)
    planned = {group.name: group.peak_lr for group in made[2][-1].groups}
    assert one.peak_lrs == pytest.approx(planned)
    assert one.peak_lrs["layer0"] == pytest.approx(0.001)
    assert one.peak_lrs["layer7"] == pytest.approx(0.01)
    assert one.first_lrs == pytest.approx({name: rate / 7 for name, rate in planned.items()})  # 2 x 3 steps up


def test_wrong_learning_rates_are_named(accelerator: Accelerator, data: Data) -> None:
    def spoil(entered: Entered) -> None:
        group = next(g for g in entered.optimizer.param_groups if g["name"] == "layer3")
        group["peak_lr"] *= 2

    one = tried(accelerator, data, parts(data), spoil=spoil)
    assert one.wrong_lrs == ("layer3",)
    assert ("error", "learning_rate") in judged(one)


def test_a_parameter_outside_the_output_is_named(accelerator: Accelerator, data: Data) -> None:
    def plant(model: nn.Module) -> None:
        model.register_parameter("idle", nn.Parameter(torch.zeros(3)))

    one = tried(accelerator, data, parts(data, plant=plant))
    assert one.missing == ("idle",)
    assert ("warning", "no_gradient") in judged(one)
    assert ("error", "no_gradient") in judged(one, world_size=2)


def test_a_dead_layer_is_named(accelerator: Accelerator, data: Data) -> None:
    def plant(model: nn.Module) -> None:
        model.blocks[2].attn.qkv.weight.register_hook(torch.zeros_like)  # type: ignore[index,union-attr]

    one = tried(accelerator, data, parts(data, plant=plant))
    assert one.zero == ("blocks.2.attn.qkv.weight",)
    assert ("warning", "no_gradient") in judged(one)


def test_a_gradient_that_is_zero_only_at_first_is_no_fault() -> None:
    model = nn.Linear(2, 1)
    watch = GradientWatch(lambda m: torch.zeros(()))
    for value in (0.0, 1.0):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        watch(model)
        assert watch.largest(model) == {"weight": value, "bias": value}


def test_statistics_of_closed_layers_that_move_are_named(
    accelerator: Accelerator, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entering, "closed_eval", lambda model: None)
    one = tried(accelerator, data, parts(data, model="test_efficientnet"), stage=0)
    assert one.drifted
    assert all("running_" in name for name in one.drifted)
    assert ("error", "batch_norm_drift") in judged(one)


def test_statistics_that_should_be_frozen_are_named(
    accelerator: Accelerator, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = parts(data, model="test_efficientnet")
    frozen = tuple(replace(p, stage=replace(p.stage, batch_norm="frozen")) for p in made[2])
    assert tried(accelerator, data, (*made[:2], frozen)).drifted == ()
    monkeypatch.setattr(entering, "freeze_batch_norm", lambda model: None)
    assert tried(accelerator, data, (*made[:2], frozen)).drifted


def test_parameters_in_no_group_or_in_two(accelerator: Accelerator, data: Data) -> None:
    def spoil(entered: Entered) -> None:
        groups = entered.optimizer.param_groups
        groups[0]["params"] = groups[0]["params"][1:]
        groups[1]["params"] = [*groups[1]["params"], groups[2]["params"][0]]

    one = tried(accelerator, data, parts(data), spoil=spoil)
    assert sorted(one.grouped.values()) == [0, 2]
    assert ("error", "grouping") in judged(one)


def test_a_head_that_starts_far_off(accelerator: Accelerator, data: Data) -> None:
    def plant(model: nn.Module) -> None:
        nn.init.normal_(model.get_classifier().weight, std=30.0)  # type: ignore[operator]

    one = tried(accelerator, data, parts(data, plant=plant))
    assert ("warning", "initial_loss") in judged(one)
    assert list(verdict.trial_findings([one], 1, fitted=True)) == []


def test_a_loss_that_is_not_finite(accelerator: Accelerator, data: Data) -> None:
    def plant(model: nn.Module) -> None:
        nn.init.constant_(model.get_classifier().weight, math.nan)  # type: ignore[operator]

    assert ("error", "initial_loss") in judged(tried(accelerator, data, parts(data, plant=plant)))


def test_the_loss_of_equal_probabilities_counts_class_weights(data: Data) -> None:
    weights = balanced_weights(torch.tensor([0, 0, 0, 1]).numpy(), 2)
    equal = trial.uniform_loss(data, cross_entropy(0.0, weights))
    assert equal([0, 1]) == pytest.approx(math.log(2) * 2 / 3)
    assert equal([0, 23]) == pytest.approx(math.log(2) * (2 / 3 + 2) / 2)
    assert trial.uniform_loss(data, cross_entropy(0.1))([0, 23]) == pytest.approx(math.log(2))
    assert trial.uniform_loss(data, binary_cross_entropy(0.1))([0, 23]) == pytest.approx(math.log(2))
    assert trial.uniform_loss(data, focal(2.0))([0, 23]) == pytest.approx(math.log(2) / 4)
    assert trial.uniform_loss(data, focal(2.0, weights))([0, 1]) == pytest.approx(math.log(2) / 4 * 2 / 3)


def test_mixed_pictures_start_at_the_loss_of_equal_probabilities_too(accelerator: Accelerator, data: Data) -> None:
    for chosen in (cross_entropy(), binary_cross_entropy(), focal()):
        one = tried(accelerator, data, parts(data, "--mixup", "0.4", "--cutmix", "1"), chosen=chosen)
        assert one.losses[0] == pytest.approx(one.expected_loss, rel=0.2)
        assert {kind for _, kind in judged(one)} & {"initial_loss"} == set()


@pytest.mark.parametrize(
    ("mean", "std", "severity"),
    [(0.5, 0.25, None), (0.1, 0.25, "note"), (127.5, 60.0, "warning"), (0.5, 0.01, "warning")],
)
def test_channel_statistics(
    accelerator: Accelerator, data: Data, mean: float, std: float, severity: str | None
) -> None:
    """The pictures of the fixture have mean 0.5 and standard deviation 0.2 as fractions."""
    _, info, plan = parts(data)
    info = replace(info, mean=(mean,) * 3, std=(std,) * 3)
    means, spreads = channel_statistics(accelerator, some_pictures(accelerator, data, plan[0], info, 0))
    assert means == pytest.approx([(0.5 - mean) / std] * 3, abs=0.05 / std)
    assert spreads == pytest.approx([0.2 / std] * 3, rel=0.3)
    found = list(verdict.statistics_findings(means, spreads))
    assert [f.severity for f in found] == ([severity] if severity else [])


def test_the_trial_runs_short_steps_of_the_whole_schedule(data: Data) -> None:
    _, _, plan = parts(data, "--cache-features", "--mixup", "0.2")
    short = trial_plan(plan[0], 24, on_cpu=True)
    assert not short.stage.mixes, "the run trains on cached features there"
    assert trial_plan(plan[1], 24, on_cpu=True).stage.mixes
    assert (short.batch.batch_size, short.steps, short.stage.cache_features) == (8, plan[0].steps, False)
    large = replace(plan[0], batch=replace(plan[0].batch, batch_size=64, micro_batch=64))
    assert trial_plan(large, 1000, on_cpu=True).batch.micro_batch == 16
    assert trial_plan(large, 1000, on_cpu=False).batch.micro_batch == 64


def test_expected_time_adds_up(data: Data) -> None:
    _, _, plan = parts(data, "--cache-features", "--freeze-epochs", "5", "--epochs", "4")
    one = StageTrial("x", (1.0,), 1.0, 0.5, (), (), (), {}, {}, (), {})
    told = expected_seconds(plan, [one, one], data, judging=0.1, fitted=False, max_steps=None, searches={})
    features, epoch = 24 * 0.1 + 8 * 0.1, 24 * 0.5 + 8 * 0.1
    assert [stage["seconds"] for stage in told["stages"]] == [round(features, 1), round(4 * epoch, 1)]
    assert told["hours"] == pytest.approx((features + 4 * epoch) / 3600, abs=1e-4)
    assert told["steps"] == 9 * 3
    cut = expected_seconds(plan, [one, one], data, judging=0.1, fitted=True, max_steps=18, searches={})
    assert [stage["steps"] for stage in cut["stages"]] == [15, 3]
    assert cut["hours"] == pytest.approx((2 * features + epoch) / 3600, abs=1e-4)
    search = Search(1e-6, 1.0, steps=30, sweeps=2, race=40)
    longer = expected_seconds(plan, [one, one], data, judging=0.1, fitted=False, max_steps=None, searches={1: search})
    added = (60 + 6 * 40) * 8 * 0.5 + 7 * 8 * 0.1  # steps of 8 images; seven times the 8 evaluation images
    assert longer["stages"][1]["seconds"] == round(4 * epoch + added, 1)
    assert [stage["search_steps"] for stage in longer["stages"]] == [0, 300]
    assert longer["hours"] == pytest.approx((features + 4 * epoch + added) / 3600, abs=1e-4)
    unreached = expected_seconds(plan, [one, one], data, judging=0.1, fitted=False, max_steps=9, searches={1: search})
    assert [stage["search_steps"] for stage in unreached["stages"]] == [0, 0]


@pytest.mark.parametrize("limit", [1, 2, 3, 31, 32, 33, 10**9])
def test_the_largest_micro_batch_is_found_at_the_edge_of_memory(limit: int) -> None:
    tried: list[int] = []

    def attempt(images: int) -> None:
        tried.append(images)
        if images > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    found = largest_that_fits(attempt, most=64)
    assert found == {1: 0, 2: 2, 3: 2, 31: 16, 32: 32, 33: 32}.get(limit, 64)
    assert sum(images > limit for images in tried) <= 1, "one attempt too many is enough"


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def attempt(images: int) -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        largest_that_fits(attempt)


def test_an_estimate_counts_what_a_step_takes() -> None:
    found = estimate(per_image=1e6, fixed=50_000_000, free=200_000_000, planned=32)
    assert (found.largest, found.measured) == (64, False)
    assert found.needed == pytest.approx(50e6 + 32 * 1.35e6)
    assert estimate(1e6, 50_000_000, 10_000_000, 32).largest == 0


def test_activations_are_counted_once_and_grow_with_the_images() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.Sigmoid(), nn.Sigmoid(), nn.Linear(20, 5))
    entered = Entered.__new__(Entered)
    entered.model = model

    def saved(images: int) -> int:
        with counted_activations(entered) as bytes_saved:
            kept = model(torch.randn(images, 10))  # alive, or its memory would be used again
            assert kept.requires_grad
            return bytes_saved()

    assert saved(3) == 3 * (10 + 20 + 20) * 4
    assert saved(6) == 2 * saved(3)


def test_the_estimate_of_a_real_stage_trains_nothing_it_keeps(accelerator: Accelerator, data: Data) -> None:
    model, _, plan = parts(data)
    entered = enter_stage(accelerator, model, plan[-1])
    loss, clip = cross_entropy(), clipping(1.0, None, None)
    memory = fitting_micro_batch(accelerator, entered, plan[-1], 2, loss, clip)
    assert memory.largest == 1024
    assert memory.needed is not None
    assert 1e6 < memory.needed < 1e8
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("memory", "severity"),
    [
        (Memory(64, 1, 10, measured=True), None),
        (Memory(32, 8, 10, measured=True), None),
        (Memory(32, 11, 10, measured=True), "note"),
        (Memory(16, None, 10, measured=True), "note"),
        (Memory(16, 11, 10, measured=False), "warning"),
        (Memory(0, None, 10, measured=True), "error"),
    ],
)
def test_a_micro_batch_that_does_not_fit(data: Data, memory: Memory, severity: str | None) -> None:
    planned = parts(data)[2][0]
    planned = replace(planned, batch=replace(planned.batch, batch_size=48, micro_batch=48))
    found: list[Finding] = list(verdict.memory_findings(memory, planned))
    assert [f.severity for f in found] == ([severity] if severity else [])
    assert all("48" in f.message and f"--micro-batch {max(1, memory.largest)}" in f.message for f in found)


def test_a_cut_cycle_is_noted(data: Data) -> None:
    sgdr = ("--schedule", "sgdr", "--cycle-epochs", "2", "--freeze-epochs", "0", "--epochs")
    assert [f.kind for f in verdict.schedule_findings(parts(data, *sgdr, "5")[2])] == ["schedule"]
    assert list(verdict.schedule_findings(parts(data, *sgdr, "6")[2])) == []
