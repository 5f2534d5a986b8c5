"""Trial runs on the one training loop: a sweep of rising learning rates, and a race between a few. No trace is left."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from accelerate import Accelerator
from torch import Tensor, nn

from tuning.clipping import Clip
from tuning.data.broken import Unreadable
from tuning.data.loader import EvalFeed, Feed, Micro, TrainFeed
from tuning.engine import Step, train_steps
from tuning.entering import Entered
from tuning.evaluation import evaluate_calibrated
from tuning.features import CachedEval
from tuning.groups import set_peak_lrs
from tuning.heartbeat import beat
from tuning.losses import Loss
from tuning.lr_auto import part_of
from tuning.lr_curve import smoothed, smoothing
from tuning.lr_race import USUAL, Candidate, next_rung, rung_lr
from tuning.lr_ranges import taken
from tuning.no_trace import leaving_no_trace
from tuning.progress import Progress
from tuning.schedules import cosine, exponential_rise, with_warmup
from tuning.stages import Stage

DIVERGED = 4.0  # times the best smoothed loss
EPOCHS_APART = 1_000_000  # trials see epochs that no run reaches: other images each, and none twice
RACE = 1_000  # its number among the trials: every candidate sees the same images
AS_THE_RUN = 0  # number of a trial with the images and the draws of the run itself
SMOOTHING_OF_RACE = 0.8
Ended = Literal["end", "diverged", "not finite"]


class Judged(NamedTuple):
    """What the evaluation images say of the weights.

    Attributes:
        losses: of every image, ``(N,)``.
        reached: the metric that chooses ``model/``, higher is better.
    """

    losses: tuple[float, ...]
    reached: float


DIVERGED_BEFORE = Judged((), -math.inf)


@dataclass(frozen=True)
class Trials:
    """What trial runs need; every process has its own.

    Attributes:
        entered: the stage; its wrapper is used up, `enter_stage` makes a new one before training.
        feed: of the stage; trials take images from epochs that training doesn't reach.
        judge: takes the weights as they are; the same answer on every process.
        at: where the run stands.
        watch: what the steps go through; may end the search by an exception, on all processes at once.
    """

    accelerator: Accelerator
    entered: Entered
    feed: Feed
    loss: Loss
    clip: Clip
    seed: int
    judge: Callable[[], Judged]
    watch: Callable[[Iterable[Step]], Iterable[Step]] = iter
    at: Progress = field(default_factory=Progress)


@dataclass(frozen=True)
class Search:
    """What is tried.

    Attributes:
        start, end: lowest and highest learning rate of the head.
        steps: optimizer steps of a sweep.
        sweeps: how many, each with other images.
        race: optimizer steps of every candidate around their answer; 0 = the sweeps alone decide.
        whole: these are all steps of the stage: every candidate is the run itself, with its images and its schedule.
    """

    start: float
    end: float
    steps: int
    sweeps: int
    race: int = 0
    whole: bool = False

    @property
    def usual_steps(self) -> int:
        """Optimizer steps in all, if no sweep ends early and the race needs as many candidates as it mostly does."""
        return self.sweeps * self.steps + USUAL * self.race


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

    def records(self, number: int) -> Iterator[dict[str, float]]:
        """One record a step, for ``metrics.jsonl``; *number* of the sweep, from 0."""
        for lr, loss in zip(self.lrs, self.losses, strict=True):
            place = {"lr_finder/lr": lr, "lr_finder/log10_lr": math.log10(lr), "lr_finder/sweep": float(number + 1)}
            yield {**place, "lr_finder/loss": loss}


@dataclass(frozen=True)
class Trial:
    """Steps that are taken back.

    Attributes:
        lr: peak learning rate of the head; the other groups' follow as in the stage.
        factor: optimizer step -> factor of every group's peak LR.
        steps: at most so many.
        number: which images and random draws; those of no other number, and of the run only if `AS_THE_RUN`.
        smoothing: of the moving average that tells divergence.
        settled: step up to which divergence is chance.
    """

    lr: float
    factor: Callable[[int], float]
    steps: int
    number: int
    smoothing: float
    settled: int


class Outcome(NamedTuple):
    """Losses of the steps of a trial, how it ended, and what the evaluation images then said, if they were asked."""

    losses: tuple[float, ...]
    ended: Ended
    judged: Judged


def sweep(trials: Trials, search: Search, number: int = 0) -> Sweep:
    """Train the stage while one factor on every group's peak LR rises; then put everything back as it was.

    Ends early when the smoothed loss is 4 times its best (past the first tenth of the steps, where it is chance), or
    when a loss is NaN or infinite. The loss of a step is one over all processes, the same on each, so all of them end
    at the same step.
    """
    peak, steps = trials.entered.stage.lr, search.steps
    rise = exponential_rise(steps, search.start / peak, search.end / peak)
    lrs = [peak * rise(step) for step in range(steps)]
    done = try_out(trials, Trial(peak, rise, steps, number + 1, smoothing(lrs), settled=steps // 10))
    return Sweep(tuple(lrs[: len(done.losses)]), done.losses, done.ended)


def race(trials: Trials, centre: float, search: Search) -> tuple[Candidate, ...]:
    """Train every candidate around *centre* from the same start on the same images; lowest LR first.

    Each gets a whole schedule (`_squeezed`, or the stage's own in a whole race): what counts is where a learning rate
    ends. Then the evaluation images judge it. All processes take part; everything is put back as it was.
    """
    stage = trials.entered.stage
    low, high = taken(stage.optimizer, part_of(stage, trials.entered.model))
    ran: dict[int, Candidate] = {}
    shape = trials.entered.factor if search.whole else _squeezed(stage, trials.feed.order.steps_per_epoch, search.race)
    number = AS_THE_RUN if search.whole else RACE
    while (rung := next_rung({rung: c.score for rung, c in ran.items()}, centre, low, high)) is not None:
        lr = rung_lr(centre, rung)
        trial = Trial(lr, shape, search.race, number, SMOOTHING_OF_RACE, settled=search.race // 3)
        done = try_out(trials, trial, judged=True)
        ran[rung] = Candidate(lr, len(done.losses), *done.judged)
    return tuple(ran[rung] for rung in sorted(ran))


def _squeezed(stage: Stage, steps_per_epoch: int, steps: int) -> Callable[[int], float]:
    """The stage's warm-up (at most a fifth of the steps), then a cosine down to 0: a gentler start would be kind to
    rates that are too high."""
    warmup = min(steps // 5, stage.warmup_steps(steps_per_epoch))
    return with_warmup(cosine(steps - warmup), warmup)


def try_out(trials: Trials, trial: Trial, judged: bool = False) -> Outcome:
    """Train as *trial* says and, if it did not end early and is to be *judged*, judge; put everything back."""
    epochs = math.ceil(trial.steps / trials.feed.order.steps_per_epoch)
    longer = dataclasses.replace(trials.entered.stage, epochs=epochs)
    tried = dataclasses.replace(trials.entered, stage=longer, factor=trial.factor)
    epoch, first = EPOCHS_APART * trial.number, 0
    if trial.number == AS_THE_RUN:
        epoch, first = trials.at.epoch, trials.at.step
    progress, losses = Progress(epoch=epoch, step=first), list[float]()
    how = trials.accelerator, tried, trials.feed, trials.loss, trials.clip, progress, trials.seed + trial.number
    ended: Ended = "end"
    with leaving_no_trace(trials.accelerator, trials.entered):
        set_peak_lrs(tried.optimizer.param_groups, trial.lr, tried.layer_decay)
        for step in trials.watch(train_steps(*how)):
            beat(step.step)
            losses.append(float(step.loss))
            ended = _end(losses, trial)
            if ended != "end" or len(losses) == trial.steps:
                break
        said = trials.judge() if judged and ended == "end" else DIVERGED_BEFORE
    return Outcome(tuple(losses), ended, said)


def _end(losses: list[float], trial: Trial) -> Ended:
    if not math.isfinite(losses[-1]):
        return "not finite"
    smooth = smoothed(losses, trial.smoothing)
    return "diverged" if len(losses) > trial.settled and smooth[-1] > DIVERGED * smooth.min() else "end"


def judge_trial(
    accelerator: Accelerator,
    entered: Entered,
    judged: nn.Module,
    feed: EvalFeed | CachedEval,
    class_weights: Tensor | None,
    classes: int,
    best_by: str,
    watch: Callable[[EvalFeed | CachedEval], Iterable[Micro]],
) -> Judged:
    """How trials are judged: `evaluate_calibrated` of *judged* on all images of *feed*.

    Args:
        best_by: metric that chooses ``model/``.
        watch: what the batches go through; may end the search by an exception, on all processes at once.
    """
    images, statistics = feed.order.images, entered.statistics.values()
    metrics, losses = evaluate_calibrated(accelerator, judged, watch(feed), images, classes, class_weights, statistics)
    return Judged(tuple(losses.tolist()), -metrics["loss"] if best_by == "loss" else metrics[best_by])


def judged_untrained(trials: Trials) -> tuple[float, ...]:
    """Loss of every evaluation image before any trial; everything is put back as it was."""
    with leaving_no_trace(trials.accelerator, trials.entered):
        return trials.judge().losses


def uncounted(feed: Feed) -> Feed:
    """The same batches; pictures that can't be read are replaced as always, but noted nowhere."""
    if not isinstance(feed, TrainFeed):
        return feed
    quiet = copy.copy(feed)
    quiet.unreadable = Unreadable(feed.unreadable.folder)
    return quiet
