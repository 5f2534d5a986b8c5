"""`--max-minutes`: the run in as many epochs as fit, from a few timed steps of the run itself."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from torch import nn

from tuning import session, sharding
from tuning.cli.command_line import Command
from tuning.cli.lengths import Lengths, lengths_in, with_lengths
from tuning.data.sources import Data, open_data
from tuning.engine import train_steps
from tuning.entering import enter_stage, leave_stage
from tuning.errors import UserError
from tuning.feeds import stage_feeds
from tuning.lr_search.no_trace import leaving_no_trace
from tuning.minutes import Costs, epochs_that_fit, images_that_fit
from tuning.models.build import ModelInfo
from tuning.models.head_fit import fit_seconds
from tuning.plan import StagePlan
from tuning.preflight.timing import judging_seconds
from tuning.preparing import objective, plan_stages
from tuning.progress import Progress
from tuning.safety import resuming
from tuning.safety.unreadable import UnreadablePictures

STEPS = 6  # timed of every stage; the first warms up
MARGIN = 0.08  # of the minutes, for what the timing did not see
COPIES = 5  # weights, two moments of Adam, an average, and the best so far in model/
CLOSING = 6.0  # seconds for the last checkpoint, pictures and report, on a CPU core of today


def within_minutes(
    accelerator: Accelerator, command: Command, data: Data, model: nn.Module, info: ModelInfo, plan: Sequence[StagePlan]
) -> tuple[Command, Data, tuple[StagePlan, ...]]:
    """The run with stages as long as ``--max-minutes`` allows; as it is without. All processes take part.

    The minutes count from the start of the process. A run that goes on keeps the lengths that it began with. What was
    chosen stands in ``config.yaml`` as if it had been typed, so `--config` repeats the run without timing anything.

    Args:
        model: trained for some steps and put back, bit for bit.
        plan: of the stages as described.

    Raises:
        UserError: not even an optimizer step of every stage fits; or the model is to be split (FSDP2).
    """
    if command.flags.run.max_minutes is None:
        return command, data, tuple(plan)
    config, note = resuming.earlier_config(command.flags.run), "--max-minutes: the run keeps the epochs it began with."
    if config is None:
        lengths, note = _timed(accelerator, command, data, model, info, plan)
    else:
        lengths = lengths_in(config, command)
    asked, command = command.flags.data, with_lengths(command, lengths)
    if command.flags.data != asked:
        data = open_data(**vars(command.flags.data), seed=command.flags.run.seed)
    data = replace(data, notes=(*data.notes, note))
    return command, data, plan_stages(accelerator, command, data, model, info)


def _timed(
    accelerator: Accelerator, command: Command, data: Data, model: nn.Module, info: ModelInfo, plan: Sequence[StagePlan]
) -> tuple[Lengths, str]:
    """What fits by rank 0's clock, and a sentence about it."""
    if sharding.asked():
        raise UserError("--max-minutes times a model that is whole on every device; under FSDP2 give --epochs.")
    minutes = command.flags.run.max_minutes or 0.0
    seconds, images = 60 * minutes * (1 - MARGIN), len(data.train)
    costs = session.same_everywhere(_costs(accelerator, command, data, model, info, plan))
    outline = [planned.stage.epochs for planned in plan]
    epochs, kept = epochs_that_fit(outline, costs, images, seconds), images
    if costs.seconds(epochs, images) > seconds:
        kept = images_that_fit(epochs, costs, images, seconds)
        _refuse_few(kept, plan, data, costs, epochs, minutes)
    limit = kept if kept < images else command.flags.data.limit_train
    return Lengths.of(command, epochs, limit), _said(command, plan, epochs, (kept, images), costs)


def _said(
    command: Command, plan: Sequence[StagePlan], epochs: Sequence[int], images: tuple[int, int], costs: Costs
) -> str:
    """What was chosen, in a sentence or two; *images* that are trained on, of how many."""
    kept, every = images
    passes = " + ".join(f"{n} of {planned.stage.name}" for n, planned in zip(epochs, plan, strict=True))
    some = f"{kept:,} of the {every:,} images, as more don't fit into one epoch" if kept < every else "all images"
    rates = ", ".join(f"{1 / each:.0f}" for each in costs.trained if each) or "none"
    total, minutes = costs.seconds(epochs, kept), command.flags.run.max_minutes
    note = f"--max-minutes {minutes:g}: epochs {passes} over {some}, about {total:.0f} s; timed {rates} images/s."
    return note + (f" What no flag says is from {Path(command.where).name}." if command.where else "")


def _refuse_few(
    kept: int, plan: Sequence[StagePlan], data: Data, costs: Costs, epochs: Sequence[int], minutes: float
) -> None:
    """Fewer images than a batch or than classes make no run."""
    least = max(len(data.classes), *(planned.batch.batch_size for planned in plan))
    if kept < least:
        needed = costs.seconds(epochs, least) / (1 - MARGIN) / 60
        raise UserError(
            f"--max-minutes {minutes:g} is too short: one epoch a stage over {least:,} images, and the evaluations of "
            f"{len(data.eval):,}, take about {needed:.1f} minutes here, {costs.before / 60:.1f} of them until now. "
            "Raise it, or lower --limit-eval."
        )


def _costs(
    accelerator: Accelerator, command: Command, data: Data, model: nn.Module, info: ModelInfo, plan: Sequence[StagePlan]
) -> Costs:
    """Time some steps of every stage, an evaluation of some images and a piece of the fit; everything is put back."""
    flags = command.flags
    workers = session.loader_workers(accelerator, flags.batch.workers)
    about = accelerator, command, data, model, info, workers
    trained = tuple(0.0 if planned.stage.cache_features else _step_seconds(planned, *about) for planned in plan)
    averaged = (flags.regularisation.ema_decay is not None) + bool(flags.averages.swa_epochs)
    looked = judging_seconds(accelerator, model, data, plan[-1], info, workers)
    fitted = fit_seconds(model, len(data.train)) if flags.model.head_init == "fitted" else 0.0
    return Costs(
        trained,
        tuple(planned.stage.feature_views if planned.stage.cache_features else 0 for planned in plan),
        looked,
        fitted / len(data.train),
        len(data.eval) * (1 + averaged),
        before=time.time() - psutil.Process().create_time(),
        after=CLOSING,
        saved=_saving_seconds(model) * COPIES,
    )


def _saving_seconds(model: nn.Module) -> float:
    """Seconds to turn the weights into the bytes of a file and to take their digest, as a checkpoint does."""
    started, content = time.perf_counter(), io.BytesIO()
    torch.save(model.state_dict(), content)
    hashlib.sha256(content.getbuffer())
    return time.perf_counter() - started


def _step_seconds(
    planned: StagePlan,
    accelerator: Accelerator,
    command: Command,
    data: Data,
    model: nn.Module,
    info: ModelInfo,
    workers: int,
) -> float:
    """Seconds of an optimizer step an image, with its loading: the median of a few."""
    flags = command.flags
    loss, clip, _ = objective(accelerator, flags, data)
    entered = enter_stage(accelerator, model, planned)
    unreadable = UnreadablePictures(accelerator, None, data, 1.0, resumed=False)
    feeds = stage_feeds(
        accelerator, entered, planned, data, info, unreadable, flags.run.seed, flags.regularisation.flip, workers
    )
    times, images = [time.perf_counter()], list[int]()
    with leaving_no_trace(accelerator, entered):
        steps = train_steps(accelerator, entered, feeds.train, loss, clip, Progress(), flags.run.seed)
        for step in islice(steps, STEPS):
            float(step.loss)  # waits for the device
            times.append(time.perf_counter())
            images.append(step.images)
    leave_stage(accelerator, entered)
    each = np.diff(times) / images
    return float(np.median(each[1:] if len(each) > 1 else each))
