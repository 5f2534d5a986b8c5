"""How long the run will take, from the trial of its stages."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import nn

from tuning.data.sources import Data
from tuning.data.tables import take
from tuning.evaluation import evaluate
from tuning.feeds import plain_feed
from tuning.models import ModelInfo
from tuning.plan import StagePlan
from tuning.preflight.trial import StageTrial

JUDGED_IMAGES = 32  # per process


def judging_seconds(
    accelerator: Accelerator, model: nn.Module, data: Data, planned: StagePlan, info: ModelInfo, workers: int
) -> float:
    """Wall-clock seconds of evaluation an image, over all processes, which all take part.

    Raises:
        UserError: none of the pictures tried can be read.
    """
    images = min(len(data.eval), JUDGED_IMAGES * accelerator.num_processes)
    few = take(data.eval, np.arange(images))
    seconds: list[float] = []
    for _ in range(2):  # the first warms up
        started = time.perf_counter()
        feed = plain_feed(accelerator, few, planned, info, workers)
        evaluate(accelerator, model, feed, images, len(data.classes))
        seconds.append(time.perf_counter() - started)
    return float(min(seconds) / images)


def expected_seconds(
    plan: Sequence[StagePlan],
    trials: Sequence[StageTrial],
    data: Data,
    judging: float,
    fitted: bool,
    max_steps: int | None,
) -> dict[str, Any]:
    """Steps and time of every stage and of the whole run, as `json` can write them; evaluations are included.

    Args:
        judging: seconds of evaluation an image.
        fitted: the head starts as a logistic regression on features of all images.
        max_steps: of the whole run; None = all.
    """
    train, judge = len(data.train), len(data.eval) * judging
    features = train * judging + judge
    stages, total, left = [], features if fitted else 0.0, max_steps or 2**63
    for planned, trial in zip(plan, trials, strict=True):
        made = max(0, min(planned.steps, left))
        left -= made
        epochs = made / planned.steps_per_epoch
        cached = planned.stage.cache_features  # its epochs cost next to nothing
        seconds = features * (made > 0) if cached else epochs * (train * trial.seconds_per_image + judge)
        total += seconds
        stages.append(
            {
                "stage": trial.stage,
                "steps": made,
                "seconds": round(seconds, 1),
                "images_per_second": round(1 / trial.seconds_per_image, 2),
                "losses": trial.losses,
                "first_lrs": trial.first_lrs,
                "peak_lrs": trial.peak_lrs,
            }
        )
    return {
        "steps": sum(stage["steps"] for stage in stages),
        "hours": round(total / 3600, 4),
        "first_loss": {"seen": trials[0].losses[0], "equal_probabilities": trials[0].expected_loss},
        "stages": stages,
    }
