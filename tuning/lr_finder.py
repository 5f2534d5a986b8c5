"""The learning rate range test (Smith 2017, arXiv:1506.01186): sweeps on the one training loop that leave no trace."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from tuning.clipping import Clip
from tuning.data.broken import Unreadable
from tuning.data.loader import Feed, TrainFeed
from tuning.engine import Step, train_steps
from tuning.entering import Entered
from tuning.errors import UserError
from tuning.heartbeat import beat
from tuning.losses import Loss
from tuning.lr_curve import SWEPT, Band, affordable, band, clamped, kind_of, smoothed, smoothing
from tuning.plan import StagePlan
from tuning.progress import Progress
from tuning.schedules import exponential_rise
from tuning.stages import Stage, stage_number

DIVERGED = 4.0  # times the best smoothed loss
EPOCHS_APART = 1_000_000  # sweeps see epochs that no run reaches: other images each, and none twice
Watch = Callable[[Iterable[Step]], Iterable[Step]]
Write = Callable[[Mapping[str, float], int], None]


@dataclass(frozen=True)
class Search:
    """What is tried.

    Attributes:
        start, end: lowest and highest learning rate of the head.
        steps: optimizer steps of a sweep.
        sweeps: how many, each with other images.
    """

    start: float
    end: float
    steps: int
    sweeps: int


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
    ended: Literal["end", "diverged", "not finite"]


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        lr: peak learning rate of the head to train with; None without a confident answer.
        band: what the curves say, before it is brought into the range for the optimizer and the network.
        sweeps: the curves.
        seconds: what they took.
    """

    lr: float | None
    band: Band
    sweeps: tuple[Sweep, ...]
    seconds: float

    @property
    def steps(self) -> int:
        """Optimizer steps of all sweeps."""
        return sum(len(sweep.losses) for sweep in self.sweeps)

    def described(self) -> str:
        """The answer, what it rests on and what it cost, in one sentence or two."""
        cost = f"{len(self.sweeps)} sweeps, {self.steps} steps, {self.seconds:.0f} s"
        if self.lr is None:
            return f"no confident answer ({self.band.reason}); {cost}."
        asked = "" if self.lr == self.band.chosen else f", brought there from {self.band.chosen:.2e}"
        return f"{self.lr:.2e}{asked}; sweeps chose {self.band.low:.1e} to {self.band.high:.1e}; {cost}."


def search_for(
    stage: Stage,
    start: float | None,
    end: float | None,
    steps: int,
    sweeps: int,
    afford: tuple[int, float] | None = None,
) -> Search:
    """What to try for *stage*.

    Args:
        start, end: learning rates; None = what its kind of optimizer needs (`SWEPT`).
        afford: optimizer steps planned and the share of them that the search may cost; None = no bound.

    Raises:
        UserError: *start* is not below *end*.
    """
    lowest, highest = SWEPT[kind_of(stage.optimizer)]
    start, end = lowest if start is None else start, highest if end is None else end
    if start >= end:
        raise UserError(f"--finder-start {start:g} must be below --finder-end {end:g}, for example 1e-6 and 1.")
    if afford is not None:
        steps, sweeps = affordable(afford[0], steps, sweeps, afford[1])
    return Search(start, end, steps, sweeps)


def chosen_stage(plan: Sequence[StagePlan], stage: str | None) -> int:
    """Index of the stage that *stage* names or numbers from 1; None = the first of those with most parameters open.

    Raises:
        UserError: there is no such stage.
    """
    if stage is None:
        return max(range(len(plan)), key=lambda index: plan[index].open_parameters)
    return stage_number([planned.stage for planned in plan], stage, "--stage")


def sweep_stage(
    accelerator: Accelerator,
    entered: Entered,
    feed: Feed,
    loss: Loss,
    clip: Clip,
    seed: int,
    search: Search,
    write: Write,
    watch: Watch = iter,
) -> Found:
    """Sweep, write ``lr_finder/...`` and answer. All processes take part; parameters, optimizer and all else stay.

    The wrapper of *entered* has been used: `enter_stage` makes a new one before training, with the rate that was found.

    Args:
        feed: of the stage; the sweeps take images from epochs that training doesn't reach.
        write: takes ``lr_finder/lr``, ``lr_finder/log10_lr``, ``lr_finder/loss``, ``lr_finder/sweep`` and the number
            of the step, 1 the first; at the end ``lr_finder/chosen``, if there is one, and the last number.
        watch: what the sweeps' steps go through; may end the search by an exception, on all processes at once.
    """
    began, quiet, sweeps, done = time.monotonic(), _uncounted(feed), [], 0
    for number in range(search.sweeps):
        swept = sweep(accelerator, entered, quiet, loss, clip, seed, search, number, watch)
        for lr, value in zip(swept.lrs, swept.losses, strict=True):
            done += 1
            place = {"lr_finder/lr": lr, "lr_finder/log10_lr": math.log10(lr), "lr_finder/sweep": float(number + 1)}
            write({**place, "lr_finder/loss": value}, done)
        sweeps.append(swept)
    said = band([(swept.lrs, swept.losses) for swept in sweeps])
    chosen = None if said.chosen is None else clamped(said.chosen, entered.stage.optimizer, part_of(entered))
    if chosen is not None:
        write({"lr_finder/chosen": chosen}, done)
    return Found(chosen, said, tuple(sweeps), time.monotonic() - began)


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
    peak = entered.stage.lr
    rise = exponential_rise(search.steps, search.start / peak, search.end / peak)
    epochs = math.ceil(search.steps / feed.order.steps_per_epoch)
    rising = dataclasses.replace(entered, stage=dataclasses.replace(entered.stage, epochs=epochs), factor=rise)
    beta = smoothing([peak * rise(step) for step in range(search.steps)])
    progress = Progress(epoch=EPOCHS_APART * (number + 1))
    lrs, losses = [], []
    ended: Literal["end", "diverged", "not finite"] = "end"
    with leaving_no_trace(accelerator, entered):
        for step in watch(train_steps(accelerator, rising, feed, loss, clip, progress, seed + number + 1)):
            beat(step.step)
            lrs.append(peak * rise(step.step - 1))
            losses.append(float(step.loss))
            smooth = smoothed(losses, beta)
            if not math.isfinite(losses[-1]):
                ended = "not finite"
            elif len(losses) > search.steps // 10 and smooth[-1] > DIVERGED * smooth.min():
                ended = "diverged"
            if ended != "end" or len(losses) == search.steps:
                break
    return Sweep(tuple(lrs), tuple(losses), ended)


@contextmanager
def leaving_no_trace(accelerator: Accelerator, entered: Entered) -> Iterator[None]:
    """Put back, bit for bit, what training in the body changes: model, optimizer, scaler, modes, random generators.

    Costs a copy of the model on the host, and one of the optimizer's state where it is. The wrapper stays the same one;
    DDP arranges its exchange anew after its first step, so make another before training (`enter_stage`).
    """
    tensors = [*entered.model.parameters(), *entered.model.buffers()]
    copies = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
    modes = [(module, module.training) for module in (*entered.wrapped.modules(), *entered.model.modules())]
    optimizer = entered.optimizer.optimizer
    state, groups, generators = _optimizer_state(optimizer)
    scaler = accelerator.scaler
    scale = None if scaler is None else copy.deepcopy(scaler.state_dict())
    python, numpy = random.getstate(), np.random.get_state()
    cuda = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, before in zip(tensors, copies, strict=True):
                    tensor.copy_(before)
            entered.model.zero_grad()
            _restore_optimizer(optimizer, state, groups, generators)
            if scaler is not None:
                scaler.load_state_dict(scale)
            for module, training in modes:
                module.training = training
            random.setstate(python)
            np.random.set_state(numpy)


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[Any, Any], list[dict[str, Any]], dict[str, Any]]:
    """Copies of the state, the groups without their parameters, and the generators that some optimizers hold."""
    itself = {id(p): p for group in optimizer.param_groups for p in group["params"]}  # keys stay what they are
    state = copy.deepcopy(dict(optimizer.state), dict(itself))
    groups = [copy.deepcopy({k: v for k, v in g.items() if k != "params"}) for g in optimizer.param_groups]
    generators: dict[str, Any] = {}
    for name, value in vars(optimizer).items():
        if isinstance(value, random.Random):
            generators[name] = value.getstate()
        elif isinstance(value, torch.Generator):
            generators[name] = value.get_state()
    return state, groups, generators


def _restore_optimizer(
    optimizer: torch.optim.Optimizer,
    state: dict[Any, Any],
    groups: Sequence[dict[str, Any]],
    generators: dict[str, Any],
) -> None:
    optimizer.state.clear()
    optimizer.state.update(state)
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        for name in group.keys() - before.keys() - {"params"}:
            del group[name]
        group.update(before)
    for name, before in generators.items():
        generator = getattr(optimizer, name)
        restore = generator.setstate if isinstance(generator, random.Random) else generator.set_state
        restore(before)


def _uncounted(feed: Feed) -> Feed:
    """The same batches; pictures that can't be read are replaced as always, but noted nowhere."""
    if not isinstance(feed, TrainFeed):
        return feed
    quiet = copy.copy(feed)
    quiet.unreadable = Unreadable(feed.unreadable.folder)
    return quiet


def part_of(entered: Entered) -> Literal["head", "transformer", "other"]:
    """What a stage trains, for the range of learning rates that is known to work for it."""
    if entered.stage.open == "head":
        return "head"
    return "transformer" if is_transformer(entered.model) else "other"


def is_transformer(model: nn.Module) -> bool:
    """Whether most of its blocks attend to tokens: modules named ...Attention..., pooling left out."""
    names = [type(module).__name__.lower() for module in model.modules()]
    attends = sum("attention" in name and "pool" not in name for name in names)
    return attends > sum(name.startswith("conv2d") for name in names) / 4


def with_lr(planned: StagePlan, lr: float) -> StagePlan:
    """The same stage at another peak learning rate of the head; all groups move by the same factor."""
    factor = lr / planned.stage.lr
    groups = tuple(dataclasses.replace(group, peak_lr=group.peak_lr * factor) for group in planned.groups)
    return dataclasses.replace(planned, stage=dataclasses.replace(planned.stage, lr=lr), groups=groups)
