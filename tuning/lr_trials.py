"""Trial runs on the one training loop: a sweep of rising learning rates, and a race between a few. No trace is left."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from accelerate import Accelerator
from torch import Tensor, nn

from tuning.clipping import Clip
from tuning.data.broken import Unreadable
from tuning.data.loader import EvalFeed, Feed, Micro, TrainFeed
from tuning.engine import Step, train_steps
from tuning.entering import Entered
from tuning.evaluation import calibrated_losses
from tuning.features import CachedEval
from tuning.heartbeat import beat
from tuning.losses import Loss
from tuning.lr_auto import part_of
from tuning.lr_curve import smoothed, smoothing
from tuning.lr_race import USUAL, Candidate, next_rung, rung_lr
from tuning.lr_ranges import taken
from tuning.no_trace import leaving_no_trace
from tuning.progress import Progress
from tuning.schedules import cosine, exponential_rise, with_warmup

DIVERGED = 4.0  # times the best smoothed loss
EPOCHS_APART = 1_000_000  # trials see epochs that no run reaches: other images each, and none twice
RACE = 1_000  # its number among the trials: every candidate sees the same images
SMOOTHING_OF_RACE = 0.8
Ended = Literal["end", "diverged", "not finite"]


@dataclass(frozen=True)
class Trials:
    """What trial runs need; every process has its own.

    Attributes:
        entered: the stage; its wrapper is used up, `enter_stage` makes a new one before training.
        feed: of the stage; trials take images from epochs that training doesn't reach.
        judge: loss of every evaluation image with the weights as they are, ``(N,)``, the same on every process.
        watch: what the steps go through; may end the search by an exception, on all processes at once.
    """

    accelerator: Accelerator
    entered: Entered
    feed: Feed
    loss: Loss
    clip: Clip
    seed: int
    judge: Callable[[], Tensor]
    watch: Callable[[Iterable[Step]], Iterable[Step]] = iter


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


class Outcome(NamedTuple):
    """Losses of the steps of a trial, how it ended, and the loss of every evaluation image after it, if asked for."""

    losses: tuple[float, ...]
    ended: Ended
    judged: tuple[float, ...]


def sweep(trials: Trials, search: Search, number: int = 0) -> Sweep:
    """Train the stage while one factor on every group's peak LR rises; then put everything back as it was.

    Ends early when the smoothed loss is 4 times its best (past the first tenth of the steps, where it is chance), or
    when a loss is NaN or infinite. The loss of a step is one over all processes, the same on each, so all of them end
    at the same step.
    """
    peak, steps = trials.entered.stage.lr, search.steps
    rise = exponential_rise(steps, search.start / peak, search.end / peak)
    lrs = [peak * rise(step) for step in range(steps)]
    done = try_out(trials, Trial(rise, steps, number + 1, smoothing(lrs), settled=steps // 10))
    return Sweep(tuple(lrs[: len(done.losses)]), done.losses, done.ended)


def race(trials: Trials, centre: float, steps: int) -> tuple[Candidate, ...]:
    """Train every candidate around *centre* for *steps* steps from the same start on the same images; lowest LR first.

    Each gets a whole schedule, the stage's warm-up (at most a fifth of the steps) and a cosine down to 0, squeezed into
    its steps: what counts is where a learning rate ends, and a gentler start would be kind to rates too high. Then the
    evaluation images judge it. All processes take part; everything is put back as it was.
    """
    stage = trials.entered.stage
    low, high = taken(stage.optimizer, part_of(stage, trials.entered.model))
    ran: dict[int, Candidate] = {}
    warmup = min(steps // 5, stage.warmup_steps(trials.feed.order.steps_per_epoch))
    shape = with_warmup(cosine(steps - warmup), warmup)
    while (rung := next_rung({rung: c.score for rung, c in ran.items()}, centre, low, high)) is not None:
        lr = rung_lr(centre, rung)
        scale = lr / stage.lr

        def factor(step: int, scale: float = scale) -> float:
            return scale * shape(step)

        trial = Trial(factor, steps, RACE, SMOOTHING_OF_RACE, settled=steps // 3)
        done = try_out(trials, trial, judged=True)
        ran[rung] = Candidate(lr, len(done.losses), done.judged)
    return tuple(ran[rung] for rung in sorted(ran))


def try_out(trials: Trials, trial: Trial, judged: bool = False) -> Outcome:
    """Train as *trial* says and, if it did not end early and is to be *judged*, judge; put everything back."""
    epochs = math.ceil(trial.steps / trials.feed.order.steps_per_epoch)
    longer = dataclasses.replace(trials.entered.stage, epochs=epochs)
    tried = dataclasses.replace(trials.entered, stage=longer, factor=trial.factor)
    progress, losses = Progress(epoch=EPOCHS_APART * trial.number), list[float]()
    how = trials.accelerator, tried, trials.feed, trials.loss, trials.clip, progress, trials.seed + trial.number
    ended: Ended = "end"
    with leaving_no_trace(trials.accelerator, trials.entered):
        for step in trials.watch(train_steps(*how)):
            beat(step.step)
            losses.append(float(step.loss))
            ended = _end(losses, trial)
            if ended != "end" or len(losses) == trial.steps:
                break
        reached = tuple(trials.judge().tolist()) if judged and ended == "end" else ()
    return Outcome(tuple(losses), ended, reached)


def _end(losses: list[float], trial: Trial) -> Ended:
    if not math.isfinite(losses[-1]):
        return "not finite"
    smooth = smoothed(losses, trial.smoothing)
    return "diverged" if len(losses) > trial.settled and smooth[-1] > DIVERGED * smooth.min() else "end"


def trial_losses(
    accelerator: Accelerator,
    entered: Entered,
    judged: nn.Module,
    feed: EvalFeed | CachedEval,
    class_weights: Tensor | None,
    watch: Callable[[EvalFeed | CachedEval], Iterable[Micro]],
) -> Tensor:
    """How trials are judged: `calibrated_losses` of *judged* on all images of *feed*.

    Args:
        watch: what the batches go through; may end the search by an exception, on all processes at once.
    """
    images, statistics = feed.order.images, entered.statistics.values()
    return calibrated_losses(accelerator, judged, watch(feed), images, class_weights, statistics)


def judged_untrained(trials: Trials) -> tuple[float, ...]:
    """Loss of every evaluation image before any trial; everything is put back as it was."""
    with leaving_no_trace(trials.accelerator, trials.entered):
        return tuple(trials.judge().tolist())


def uncounted(feed: Feed) -> Feed:
    """The same batches; pictures that can't be read are replaced as always, but noted nowhere."""
    if not isinstance(feed, TrainFeed):
        return feed
    quiet = copy.copy(feed)
    quiet.unreadable = Unreadable(feed.unreadable.folder)
    return quiet
