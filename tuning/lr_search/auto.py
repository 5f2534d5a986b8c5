"""When a run searches for its learning rate, and its stages before a search and with what was found."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from torch import nn

from tuning.lr_search.ranges import DEFAULT_LRS, Part, kind_of
from tuning.plan import StagePlan, at_micro_batch
from tuning.progress import Progress
from tuning.stages import Stage


def before_search(stage: Stage, model: nn.Module) -> Stage:
    """The stage at the learning rate that it keeps if its search has no confident answer (`DEFAULT_LRS`)."""
    if not stage.find_lr:
        return stage
    return dataclasses.replace(stage, lr=DEFAULT_LRS[kind_of(stage.optimizer)][part_of(stage, model)])


def must_search(plan: Sequence[StagePlan], progress: Progress, when: Literal["start", "stages", "sizes"]) -> bool:
    """Whether the stage that begins now needs a search; a run that goes on within it has made its own.

    Where the optimizer is of another kind than the one that was searched for, its rates say nothing (`kind_of`).
    """
    planned, before = plan[progress.stage], progress.searched
    if not planned.stage.find_lr or progress.stage_step > 0 or before == progress.stage:
        return False
    if before is None or when == "stages" or kind_of(plan[before].stage.optimizer) != kind_of(planned.stage.optimizer):
        return True
    return when == "sizes" and plan[before].image_size != planned.image_size


def searching_stages(plan: Sequence[StagePlan], when: Literal["start", "stages", "sizes"]) -> list[int]:
    """Numbers of the stages, from 0, at whose start a run through *plan* searches."""
    progress, searching = Progress(), []
    for progress.stage in range(len(plan)):
        if must_search(plan, progress, when):
            progress.searched = progress.stage
            searching.append(progress.stage)
    return searching


def as_found(planned: StagePlan, progress: Progress) -> StagePlan:
    """The stage as the run trains it: at the learning rate that was found, if it takes one, in micro-batches that fit,
    what is closed run as was chosen.

    All groups move by the same factor.
    """
    fitting = at_micro_batch(planned, progress.micro_batch)
    if planned.stage.open == "head":
        fitting = dataclasses.replace(fitting, forward=progress.frozen_forward)
    if not planned.stage.find_lr or progress.lr is None:
        return fitting
    factor = progress.lr / planned.stage.lr
    groups = tuple(dataclasses.replace(group, peak_lr=group.peak_lr * factor) for group in planned.groups)
    return dataclasses.replace(fitting, stage=dataclasses.replace(planned.stage, lr=progress.lr), groups=groups)


def part_of(stage: Stage, model: nn.Module) -> Part:
    """What a stage trains, for the learning rates that are known to work for it."""
    if stage.open == "head":
        return "head"
    return "transformer" if is_transformer(model) else "other"


def is_transformer(model: nn.Module) -> bool:
    """Whether most of its blocks attend to tokens: modules named ...Attention..., pooling left out."""
    names = [type(module).__name__.lower() for module in model.modules()]
    attends = sum("attention" in name and "pool" not in name for name in names)
    return attends > sum(name.startswith("conv2d") for name in names) / 4
