"""When a run searches for its learning rate, and its stages with what was found on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from tuning.plan import StagePlan, at_micro_batch
from tuning.progress import Progress


def must_search(plan: Sequence[StagePlan], progress: Progress, when: Literal["start", "stages", "sizes"]) -> bool:
    """Whether the stage that begins now needs a search; a run that goes on within it has made its own."""
    planned, before = plan[progress.stage], progress.searched
    if not planned.stage.find_lr or progress.stage_step > 0 or before == progress.stage:
        return False
    if before is None or when == "stages":
        return True
    return when == "sizes" and plan[before].image_size != planned.image_size


def as_found(planned: StagePlan, progress: Progress) -> StagePlan:
    """The stage as the run trains it: at the learning rate that was found, if it takes one, in micro-batches that fit.

    All groups move by the same factor.
    """
    fitting = at_micro_batch(planned, progress.micro_batch)
    if not planned.stage.find_lr or progress.lr is None:
        return fitting
    factor = progress.lr / planned.stage.lr
    groups = tuple(dataclasses.replace(group, peak_lr=group.peak_lr * factor) for group in planned.groups)
    return dataclasses.replace(fitting, stage=dataclasses.replace(planned.stage, lr=progress.lr), groups=groups)
