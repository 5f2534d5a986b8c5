"""Trial runs on the one training loop: a sweep of rising learning rates, and a race between a few. No trace is left."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from accelerate import Accelerator
from torch import nn

from tuning.clipping import Clip
from tuning.data.broken import Unreadable
from tuning.data.loader import Feed, TrainFeed
from tuning.engine import Step, train_steps
from tuning.entering import Entered
from tuning.heartbeat import beat
from tuning.losses import Loss
from tuning.lr_curve import Part, smoothed, smoothing, taken
from tuning.lr_race import Candidate, next_rung, rung_lr
from tuning.no_trace import leaving_no_trace
from tuning.progress import Progress
from tuning.schedules import cosine, exponential_rise, with_warmup

DIVERGED = 4.0  # times the best smoothed loss
EPOCHS_APART = 1_000_000  # trials see epochs that no run reaches: other images each, and none twice
RACE = 1_000  # its number among the trials: every candidate sees the same images
SMOOTHING_OF_RACE = 0.8
Watch = Callable[[Iterable[Step]], Iterable[Step]]
Ended = Literal["end", "diverged", "not finite"]


@dataclass(frozen=True)
class Search:
    """What is tried.

    Attributes:
        start, end: lowest and highest learning rate of the head.
        steps: optimizer steps of a sweep.
        sweeps: how many, each with other images.
        race: optimizer steps of every candidate around their answer; 0 = the sweeps alone decide.
    """

    start: float
    end: float
    steps: int
    sweeps: int
    race: int = 0


@dataclass(frozen=True)
class Sweep:
    """One sweep.

    Attributes:
        lrs: learning rate of the head at every step.
        losses: loss of every step over all its images and processes; the last one may be NaN or infinite.
        ended: ``end``, ``diverged`` or ``not finite``.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    ended: Ended


@dataclass(frozen=True)
class Trial:
    """Steps that are taken back.

    Attributes:
        factor: optimizer step -> factor of every group's peak LR.
        steps: at most so many.
        number: which images and random draws; those of no other number, nor of the run.
        smoothing: of the moving average that tells divergence.
        settled: step up to which divergence is chance.
    """

    factor: Callable[[int], float]
    steps: int
    number: int
    smoothing: float
    settled: int


def sweep(
    accelerator: Accelerator,
    entered: Entered,
    feed: Feed,
    loss: Loss,
    clip: Clip,
    seed: int,
    search: Search,
    number: int = 0,
    watch: Watch = iter,
) -> Sweep:
    """Train the stage while one factor on every group's peak LR rises; then put everything back as it was.

    Ends early when the smoothed loss is 4 times its best (past the first tenth of the steps, where it is chance), or
    when a loss is NaN or infinite. The loss of a step is one over all processes, the same on each, so all of them end
    at the same step.
    """
    peak, steps = entered.stage.lr, search.steps
    rise = exponential_rise(steps, search.start / peak, search.end / peak)
    lrs = [peak * rise(step) for step in range(steps)]
    trial = Trial(rise, steps, number + 1, smoothing(lrs), settled=steps // 10)
    losses, ended = try_out(accelerator, entered, feed, loss, clip, seed, trial, watch)
    return Sweep(tuple(lrs[: len(losses)]), losses, ended)


def race(
    accelerator: Accelerator,
    entered: Entered,
    feed: Feed,
    loss: Loss,
    clip: Clip,
    seed: int,
    centre: float,
    steps: int,
    watch: Watch = iter,
) -> tuple[Candidate, ...]:
    """Train every candidate around *centre* for *steps* steps from the same start on the same images; lowest LR first.

    Each gets a whole schedule, the stage's warm-up (at most a fifth of the steps) and a cosine down to 0, squeezed into
    its steps: what counts is where a learning rate ends, and a gentler start would be kind to rates too high. All
    processes take part; everything is put back as it was.
    """
    low, high = taken(entered.stage.optimizer, part_of(entered))
    ran: dict[int, Candidate] = {}
    warmup = min(steps // 5, round(entered.stage.warmup_epochs * feed.order.steps_per_epoch))
    shape = with_warmup(cosine(steps - warmup), warmup)
    while (rung := next_rung({rung: c.score for rung, c in ran.items()}, centre, low, high)) is not None:
        lr = rung_lr(centre, rung)
        scale = lr / entered.stage.lr

        def factor(step: int, scale: float = scale) -> float:
            return scale * shape(step)

        trial = Trial(factor, steps, RACE, SMOOTHING_OF_RACE, settled=steps // 3)
        losses, _ = try_out(accelerator, entered, feed, loss, clip, seed, trial, watch)
        ran[rung] = Candidate(lr, losses, steps)
    return tuple(ran[rung] for rung in sorted(ran))


def try_out(
    accelerator: Accelerator,
    entered: Entered,
    feed: Feed,
    loss: Loss,
    clip: Clip,
    seed: int,
    trial: Trial,
    watch: Watch = iter,
) -> tuple[tuple[float, ...], Ended]:
    """Losses of a trial and how it ended; everything is put back as it was."""
    epochs = math.ceil(trial.steps / feed.order.steps_per_epoch)
    rising = dataclasses.replace(entered, stage=dataclasses.replace(entered.stage, epochs=epochs), factor=trial.factor)
    progress, losses = Progress(epoch=EPOCHS_APART * trial.number), []
    ended: Ended = "end"
    with leaving_no_trace(accelerator, entered):
        for step in watch(train_steps(accelerator, rising, feed, loss, clip, progress, seed + trial.number)):
            beat(step.step)
            losses.append(float(step.loss))
            smooth = smoothed(losses, trial.smoothing)
            if not math.isfinite(losses[-1]):
                ended = "not finite"
            elif len(losses) > trial.settled and smooth[-1] > DIVERGED * smooth.min():
                ended = "diverged"
            if ended != "end" or len(losses) == trial.steps:
                break
    return tuple(losses), ended


def uncounted(feed: Feed) -> Feed:
    """The same batches; pictures that can't be read are replaced as always, but noted nowhere."""
    if not isinstance(feed, TrainFeed):
        return feed
    quiet = copy.copy(feed)
    quiet.unreadable = Unreadable(feed.unreadable.folder)
    return quiet


def part_of(entered: Entered) -> Part:
    """What a stage trains, for the range of learning rates that is known to work for it."""
    if entered.stage.open == "head":
        return "head"
    return "transformer" if is_transformer(entered.model) else "other"


def is_transformer(model: nn.Module) -> bool:
    """Whether most of its blocks attend to tokens: modules named ...Attention..., pooling left out."""
    names = [type(module).__name__.lower() for module in model.modules()]
    attends = sum("attention" in name and "pool" not in name for name in names)
    return attends > sum(name.startswith("conv2d") for name in names) / 4
