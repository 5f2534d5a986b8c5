"""When evaluations stop improving: the stage ends, or its learning rate drops. Imports no torch.

All that is counted is in `Progress`, so a run that goes on counts on; the values are the same on every process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from tuning.progress import Progress
from tuning.stages import Stage
from tuning.tracking.summary import better


def count(progress: Progress, stage: Stage, value: float, metric: str, steps_per_epoch: int) -> None:
    """Take note of an evaluation at the end of an epoch: is it the stage's best, and if not, what follows.

    The plateau is that of ``torch.optim.lr_scheduler.ReduceLROnPlateau(patience=plateau_patience - 1, threshold=0)``.

    Args:
        value: of *metric*; NaN is no improvement.
    """
    if not _counts(stage, progress.stage_step, steps_per_epoch):
        return
    if not math.isnan(value) and better(value, progress.stage_best, metric):
        progress.stage_best, progress.waiting, progress.plateau = value, 0, 0
        return
    progress.waiting += 1
    progress.plateau += 1
    if stage.schedule == "plateau" and progress.plateau >= stage.plateau_patience:
        progress.lr_factor, progress.plateau = max(progress.lr_factor * stage.step_gamma, stage.lr_floor), 0
    progress.stage_over = stage.patience is not None and progress.waiting >= stage.patience


def _counts(stage: Stage, stage_step: int, steps_per_epoch: int) -> bool:
    """Within an SGDR cycle the learning rate is high and evaluations say little: there only its end counts."""
    if stage.schedule != "sgdr" or stage.patience is None or stage.cycle_epochs is None:
        return True
    return stage_step in stage.cycle_ends(steps_per_epoch)


def curves_of(progress: Progress, stage: Stage) -> Mapping[str, float]:
    """What there is to see of it; nothing where the stage neither ends early nor drops."""
    values: dict[str, float] = {}
    if stage.patience is not None:
        values["stage/waiting"] = progress.waiting
    if stage.schedule == "plateau":
        values["stage/lr_factor"] = progress.lr_factor
    return values


def next_stage(progress: Progress) -> None:
    """Leave the stage: what is counted within one starts anew."""
    progress.stage, progress.stage_step, progress.micro_batch = progress.stage + 1, 0, None
    progress.stage_best, progress.waiting, progress.plateau = None, 0, 0
    progress.lr_factor, progress.stage_over = 1.0, False
