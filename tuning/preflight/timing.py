"""How long the run will take, from the trial of its stages."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import nn

from tuning.data.sources import Data
from tuning.data.tables import take
from tuning.feeds import JUDGED, plain_feed
from tuning.judging.evaluation import evaluate
from tuning.lr_search.race import USUAL
from tuning.lr_search.trials import Search
from tuning.models.build import ModelInfo
from tuning.plan import StagePlan
from tuning.preflight.trial import StageTrial
from tuning.session import same_everywhere

WARMING, TIMED = 32, 128  # evaluation images per process: what a few take is mostly the start
SLOW = 1.0  # seconds of the first after which as few are timed


def judging_seconds(
    accelerator: Accelerator, model: nn.Module, data: Data, planned: StagePlan, info: ModelInfo, workers: int
) -> float:
    """Wall-clock seconds of evaluation an image, over all processes, which all take part.

    Raises:
        UserError: none of the pictures tried can be read.
    """

    def timed(each: int) -> tuple[float, int]:
        images = min(len(data.eval), each * accelerator.num_processes)
        started = time.perf_counter()
        feed = plain_feed(accelerator, take(data.eval, np.arange(images)), planned, info, workers)
        evaluate(accelerator, model, feed, images, len(data.classes))
        return same_everywhere(time.perf_counter() - started), images

    quick = timed(WARMING)[0] < SLOW
    if quick:
        timed(TIMED)  # until then it gets faster
    seconds, images = timed(TIMED if quick else WARMING)
    return seconds / images


def expected_seconds(
    plan: Sequence[StagePlan],
    trials: Sequence[StageTrial],
    data: Data,
    judging: float,
    fitted: bool,
    max_steps: int | None,
    searches: Mapping[int, Search],
) -> dict[str, Any]:
    """Steps and time of every stage and of the whole run, as `json` can write them.

    Evaluations and searches for a learning rate are included in the time, not in the steps.

    Args:
        judging: seconds of evaluation an image.
        fitted: the head starts as a logistic regression on features of all images.
        max_steps: of the whole run; None = all.
        searches: for a learning rate, by number of the stage at whose start they are.
    """
    train, judge = len(data.train), len(data.eval) * judging
    features = train * judging + judge
    stages, total, left = [], features if fitted else 0.0, max_steps or 2**63
    for number, (planned, trial) in enumerate(zip(plan, trials, strict=True)):
        made = max(0, min(planned.steps, left))
        left -= made
        epochs = made / planned.steps_per_epoch
        once = features + train * judging * (planned.stage.feature_views - 1)
        seconds = once * (made > 0) if planned.stage.cache_features else 0.0
        if not planned.stage.judged_once:  # else epochs cost next to nothing; the upper part on features at most this
            seconds += epochs * (train * trial.seconds_per_image + judge)
        if made and number in searches:
            seconds += _searching(searches[number], planned.batch.batch_size * trial.seconds_per_image, data, judging)
        total += seconds
        stages.append(
            {
                "stage": trial.stage,
                "steps": made,
                "search_steps": searches[number].usual_steps if made and number in searches else 0,
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


def _searching(search: Search, step: float, data: Data, judging: float) -> float:
    """Seconds of a search: its optimizer steps, and what judges every candidate and the start."""
    judged = (USUAL + 1) * min(JUDGED, len(data.eval)) if search.race else 0
    return search.usual_steps * step + judged * judging
