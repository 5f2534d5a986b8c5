"""What a run takes on this hardware, in seconds: some steps of every stage and an evaluation, timed and put back."""

from __future__ import annotations

import hashlib
import io
import time
from dataclasses import replace
from itertools import islice

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from torch import nn

from tuning import session
from tuning.data.tables import spread, take
from tuning.engine import train_steps
from tuning.entering import enter_stage, leave_stage
from tuning.feeds import EVAL_BATCH, stage_feeds
from tuning.judging.evaluation import evaluate
from tuning.lr_search.no_trace import leaving_no_trace
from tuning.minutes import Costs
from tuning.models.head_fit import fit_seconds
from tuning.plan import StagePlan
from tuning.preflight.timing import judging_seconds
from tuning.preparing import Setup, objective
from tuning.progress import Progress
from tuning.safety.unreadable import UnreadablePictures

STEPS = 5  # of every stage, twice over on features; the first half warms up
COPIES = 5  # weights, two moments of Adam, an average, and the best so far in model/
CLOSING = 4.0  # seconds for the last checkpoint, pictures and report, on a CPU core of today


def run_costs(accelerator: Accelerator, setup: Setup) -> Costs:
    """Time some steps of every stage, an evaluation of some images and a piece of the fit; everything is put back.

    All processes take part, and take rank 0's clock.
    """
    flags, data, model = setup.command.flags, setup.data, setup.model
    workers = session.loader_workers(accelerator, flags.batch.workers)
    averaged = (flags.regularisation.ema_decay is not None) + bool(flags.averages.swa_epochs)
    looked = judging_seconds(accelerator, model, data, setup.stages[-1], setup.info, workers)
    fitted = fit_seconds(model, len(data.train)) if flags.model.head_init == "fitted" else 0.0
    costs = Costs(
        (),
        (),
        looked,
        fitted / len(data.train),
        len(data.eval) * (1 + averaged),
        before=0.0,
        after=CLOSING,
        saved=_saving_seconds(model) * COPIES,
        sets=1 + averaged,
    )
    return with_stages(accelerator, setup, costs)


def with_stages(accelerator: Accelerator, setup: Setup, costs: Costs) -> Costs:
    """*costs* with what the stages of *setup* take, timed, and what has passed until now. Rank 0's clock decides."""
    each = [_stage_seconds(accelerator, one, setup, costs.looked) for one in setup.stages]
    views = tuple(one.stage.feature_views if one.stage.cache_features else 0 for one in setup.stages)
    passed = time.time() - psutil.Process().create_time()
    trained, judging = zip(*each, strict=True)
    return session.same_everywhere(replace(costs, trained=trained, judging=judging, passes=views, before=passed))


def _saving_seconds(model: nn.Module) -> float:
    """Seconds to turn the weights into the bytes of a file and to take their digest, as a checkpoint does."""
    started, content = time.perf_counter(), io.BytesIO()
    torch.save(model.state_dict(), content)
    hashlib.sha256(content.getbuffer())
    return time.perf_counter() - started


def _stage_seconds(accelerator: Accelerator, one: StagePlan, setup: Setup, looked: float) -> tuple[float, float]:
    """Of a stage, by image: an optimizer step with its loading, and an evaluation; 0 = next to nothing.

    Args:
        looked: of an evaluation of the whole model.
    """
    if one.stage.judged_once:
        return 0.0, 0.0
    if not one.stage.cache_features:
        return _timed_steps(accelerator, one, setup)[0], looked
    data, images = setup.data, STEPS * one.batch.batch_size
    rows = spread(data.train, images), np.arange(min(len(data.eval), EVAL_BATCH * accelerator.num_processes))
    few = replace(data, train=take(data.train, rows[0]), eval=take(data.eval, rows[1]))
    return _timed_steps(accelerator, one, setup._replace(data=few))


def _timed_steps(accelerator: Accelerator, one: StagePlan, setup: Setup) -> tuple[float, float]:
    """Seconds of a step by image, the median of a few warm ones; and, on cached features, of an evaluation by image."""
    flags, data, model = setup.command.flags, setup.data, setup.model
    loss, clip, _ = objective(accelerator, flags, data)
    entered = enter_stage(accelerator, model, one)
    unreadable = UnreadablePictures(accelerator, None, data, 1.0, resumed=False)
    workers = session.loader_workers(accelerator, flags.batch.workers)
    flip, seed = flags.regularisation.flip, flags.run.seed
    feeds = stage_feeds(accelerator, entered, one, data, setup.info, unreadable, seed, flip, workers)
    times, images = [time.perf_counter()], list[int]()
    with leaving_no_trace(accelerator, entered):
        for _ in range(1 + one.stage.cache_features):
            for step in islice(train_steps(accelerator, entered, feeds.train, loss, clip, Progress(), seed), STEPS):
                float(step.loss)  # waits for the device
                times.append(time.perf_counter())
                images.append(step.images)
    judging = 0.0
    if one.stage.cache_features:
        started = time.perf_counter()
        evaluate(accelerator, feeds.judged, feeds.evaluation, len(data.eval), len(data.classes))
        judging = (time.perf_counter() - started) / len(data.eval)
    leave_stage(accelerator, entered)
    seconds = np.diff(times) / images
    return float(np.median(seconds[len(seconds) // 2 :])), judging
