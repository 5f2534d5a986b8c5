"""``--lr auto``: at which stages a run searches for its learning rate, and the stage at the one that was found."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from tuning.plan import StagePlan
from tuning.progress import Progress


def must_search(plan: Sequence[StagePlan], progress: Progress, when: Literal["start", "stages", "sizes"]) -> bool:
    """Whether the stage that begins now needs a search; a run that goes on within it has made its own."""
    planned, before = plan[progress.stage], progress.searched
    if not planned.stage.find_lr or progress.stage_step > 0 or before == progress.stage:
        return False
    if before is None or when == "stages":
        return True
    return when == "sizes" and plan[before].image_size != planned.image_size


def with_found(planned: StagePlan, progress: Progress) -> StagePlan:
    """The stage at the learning rate that was found, if it takes one; all groups move by the same factor."""
    if not planned.stage.find_lr or progress.lr is None:
        return planned
    factor = progress.lr / planned.stage.lr
    groups = tuple(dataclasses.replace(group, peak_lr=group.peak_lr * factor) for group in planned.groups)
    return dataclasses.replace(planned, stage=dataclasses.replace(planned.stage, lr=progress.lr), groups=groups)
