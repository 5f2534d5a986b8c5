"""A few real optimizer steps of every stage, watched closely: gradients, learning rates, statistics, loss and time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tuning.clipping import Clip
from tuning.data.loader import EvalFeed, Feed
from tuning.data.sources import Data
from tuning.data.tables import label_array, spread, take
from tuning.engine import train_steps
from tuning.entering import Entered
from tuning.feeds import plain_feed
from tuning.groups import Group, set_lr
from tuning.losses import Loss
from tuning.models.build import ModelInfo
from tuning.overfit.gradients import GradientWatch
from tuning.plan import StagePlan
from tuning.progress import Progress
from tuning.sizes import BatchPlan

CPU_BATCH = 16  # images: on a CPU larger batches take as long an image
PATIENCE = 20.0  # seconds a stage; a large model on a CPU is not tried longer than that
STATISTICS_IMAGES = 256


@dataclass(frozen=True)
class StageTrial:
    """What a few optimizer steps of a stage showed.

    Attributes:
        stage: its name.
        losses: of the steps, over all processes.
        expected_loss: of a model that gives every class the same probability, on the images of the first step.
        seconds_per_image: wall-clock time of training, over all processes.
        missing: open parameters without a gradient in any step.
        zero: open parameters whose gradient was 0 in every step.
        drifted: running statistics of closed or frozen norms that moved.
        first_lrs: learning rates of the first step, by group.
        peak_lrs: where the schedule is highest, by group.
        wrong_lrs: groups whose peak is not the plan's.
        grouped: parameters that are not in exactly one group of the optimizer, with the number of groups.
    """

    stage: str
    losses: tuple[float, ...]
    expected_loss: float
    seconds_per_image: float
    missing: tuple[str, ...]
    zero: tuple[str, ...]
    drifted: tuple[str, ...]
    first_lrs: dict[str, float]
    peak_lrs: dict[str, float]
    wrong_lrs: tuple[str, ...]
    grouped: dict[str, int]


def trial_plan(planned: StagePlan, train_images: int, on_cpu: bool) -> StagePlan:
    """The stage in steps of one forward pass; its schedule stays that of the whole run.

    Features are not cached: that would read all pictures.
    """
    world = planned.batch.world_size
    micro = min(planned.batch.micro_batch, CPU_BATCH) if on_cpu else planned.batch.micro_batch
    micro = max(1, min(micro, train_images // world))
    stage = planned.stage
    if stage.cache_features:
        stage = replace(stage, cache_features=False, mixup=0.0, cutmix=0.0, random_erasing=0.0)
        stage = replace(stage, train_sizes=(), multi_scale=0.0)
    return replace(planned, stage=stage, batch=BatchPlan(micro * world, micro, world))


def heaviest(plan: Sequence[StagePlan]) -> StagePlan:
    """The stage whose step takes most memory: the largest images, then the most open parameters."""
    return max(plan, key=lambda p: (not p.stage.cache_features, p.largest_size, p.open_parameters))


def try_stage(
    accelerator: Accelerator,
    entered: Entered,
    planned: StagePlan,
    feed: Feed,
    loss: Loss,
    clip: Clip,
    equal: Callable[[list[int]], float],
    seed: int,
    steps: int,
) -> StageTrial:
    """Train *steps* optimizer steps at the stage's own learning rates. All processes take part.

    Args:
        planned: from `trial_plan`; *entered* and *feed* belong to it.
        equal: the loss of equal probabilities on rows of the training data, from `uniform_loss`.
    """
    watch = GradientWatch(clip)
    before = {name: buffer.clone() for name, buffer in resting_statistics(entered).items()}
    losses: list[float] = []
    times = [time.perf_counter()]
    expected, first_lrs, images = math.nan, entered.lrs, 0
    for step in train_steps(accelerator, entered, feed, loss, watch, Progress(), seed):
        losses.append(float(step.loss))  # waits for the device
        times.append(time.perf_counter())
        if len(losses) == 1:
            expected, first_lrs, images = equal(step.rows), step.lrs, step.images
        if len(losses) >= steps or None in watch.largest(entered.model).values() or _is_slow(accelerator, times):
            break
    largest = watch.largest(entered.model)
    moved = [name for name, buffer in resting_statistics(entered).items() if not torch.equal(buffer, before[name])]
    set_peak(entered, planned)
    return StageTrial(
        planned.stage.name,
        tuple(losses),
        expected,
        float(np.median(np.diff(times)[1 if len(losses) > 1 else 0 :])) / images,
        tuple(name for name, size in largest.items() if size is None),
        tuple(name for name, size in largest.items() if size == 0),
        tuple(moved),
        first_lrs,
        entered.lrs,
        wrong_lrs(entered, planned),
        times_grouped(entered.model, entered.optimizer.param_groups),
    )


def _is_slow(accelerator: Accelerator, times: list[float]) -> bool:
    """Only one process may decide by its own clock."""
    return accelerator.num_processes == 1 and len(times) > 2 and times[-1] - times[0] > PATIENCE


def resting_statistics(entered: Entered) -> dict[str, Tensor]:
    """Running statistics that must stand still in this stage: those of closed layers, or all if they are frozen.

    Judged by what is closed, not by the mode of the modules: that is what is being checked.
    """
    frozen = entered.stage.batch_norm == "frozen"
    found: dict[str, Tensor] = {}

    def visit(prefix: str, module: nn.Module, closed: bool) -> None:
        parameters = list(module.parameters())
        closed = closed or (bool(parameters) and not any(p.requires_grad for p in parameters))
        for name, buffer in module.named_buffers(recurse=False):
            if name.startswith("running_") and (closed or frozen):
                found[f"{prefix}{name}"] = buffer
        for name, child in module.named_children():
            visit(f"{prefix}{name}.", child, closed)

    visit("", entered.model, False)
    return found


def set_peak(entered: Entered, planned: StagePlan) -> None:
    """Give the optimizer the learning rates of the step at which the stage's schedule is highest."""
    highest = max(range(planned.steps), key=entered.factor)
    set_lr(entered.optimizer.param_groups, entered.factor(highest))


def wrong_lrs(entered: Entered, planned: StagePlan) -> tuple[str, ...]:
    """Open groups that the optimizer runs at another peak than the plan says, or at 0; after `set_peak`."""
    highest = max(map(planned.stage.factor(planned.steps_per_epoch), range(planned.steps)))
    groups = zip(entered.optimizer.param_groups, planned.groups, strict=True)
    wrong = (
        wanted.name
        for group, wanted in groups
        if wanted.open_parameters and not (group["lr"] > 0 and math.isclose(group["lr"], wanted.peak_lr * highest))
    )
    return tuple(dict.fromkeys(wrong))


def times_grouped(model: nn.Module, groups: Iterable[Group]) -> dict[str, int]:
    """Parameters that are not in exactly one group, with the number of groups they are in."""
    held = [id(parameter) for group in groups for parameter in group["params"]]
    return {name: held.count(id(p)) for name, p in model.named_parameters() if held.count(id(p)) != 1}


def uniform_loss(data: Data, loss: Loss) -> Callable[[list[int]], float]:
    """Rows of the training data -> their mean *loss* where all logits are 0: ``ln K`` for plain cross-entropy.

    Mixing moves it only as far as class weights differ, and then by chance.
    """
    labels, classes = label_array(data.train), len(data.classes)
    heights = loss(torch.zeros(classes, classes), torch.arange(classes)).double().numpy()
    return lambda rows: float(heights[labels[rows]].mean())


def some_pictures(accelerator: Accelerator, data: Data, planned: StagePlan, info: ModelInfo, workers: int) -> EvalFeed:
    """Up to `STATISTICS_IMAGES` training pictures, evenly spread, as evaluation would see them."""
    chosen = spread(data.train, STATISTICS_IMAGES)
    return plain_feed(accelerator, take(data.train, chosen), planned, info, workers)


def channel_statistics(accelerator: Accelerator, feed: EvalFeed) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of the model's input, ideally 0 and 1. All processes take part."""
    sums = torch.zeros(3, 3, dtype=torch.float64)
    for micro in feed:
        inputs = micro.inputs[micro.weights > 0].double().cpu()
        powers = (torch.ones_like(inputs), inputs, inputs.square())
        sums += torch.stack([power.sum((0, 2, 3)) for power in powers])
    count, first, second = accelerator.reduce(sums.float().to(accelerator.device), reduction="sum").cpu().double()
    mean = first / count.clamp(min=1)
    spread = (second / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
    return mean.tolist(), spread.tolist()
