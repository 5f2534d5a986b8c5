"""A run is a list of stages: which depth is open, for how long, at which rate, with which optimizer and schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from tuning import schedules
from tuning.cli.coerce import NO_NUMBERS
from tuning.flags.names import AugmentName, ColorName, SamplingName, ScheduleName

PARTS = ("norms", "norms-biases")  # kinds of parameters, at any depth, that are open beside the head
STRONG_ERASING = 0.25  # probability with --augment strong


@dataclass(frozen=True)
class Stage:
    """One stage. Every field but `name` and `open` defaults to the flag of the same name.

    Attributes:
        name: shown in the plan and marked in the curves.
        open: ``head``; ``all``; a whole number n = the head and the n layers below it; a fraction f in (0, 1] = the
            head and that part of the depth; ``norms`` = the head and all normalisation layers; ``norms-biases``.
        epochs: passes over the data.
        lr: peak learning rate of the head, after --lr-scaling.
        lr_ratio: stem LR / head LR (None when `layer_decay` is given).
        layer_decay: LR factor per layer (None when `lr_ratio` is given).
        batch_size: images per optimizer step over all processes.
        image_size: side of the input in pixels (None = the model's).
        cache_features: compute what enters the lowest open layer once, for every image.
        find_lr: `lr` is kept only if the LR finder has no confident answer (``lr: auto``).
        mixup, cutmix: alpha, 0 = off; pictures alone are mixed, no cached features.
        sampling: how often an epoch takes the images of a class.
        random_erasing: probability; None = that of the strength, `erases`.
        color: auto is settled by the pictures before the plan is made.
        swa_epochs, swa_lr: of the last stage, by their flags.
        patience: evaluations in a row without a better one after which the stage ends; None = it runs to its end.
        plateau_patience: those after which the plateau schedule drops.
        new_optimizer: not `keeps_optimizer_of` the stage before: this one starts without state.
        train_sizes: sides of the training input, of which every optimizer step draws one; none = `image_size`.
        multi_scale: the same as a fraction of `image_size` on either side, 0 = off.
        feature_views: passes over the images that are cached; 1 = without augmentation.
        batch_scaling: ``area`` = `batch_size` is that of the last stage's size, and larger where pictures are smaller.
    """

    name: str
    open: str | int | float
    epochs: int
    lr: float
    lr_ratio: float | None
    layer_decay: float | None
    optimizer: str
    momentum: float
    weight_decay: float
    schedule: ScheduleName
    warmup_epochs: float
    cycle_epochs: float | None
    cycle_mult: int
    cycle_decay: float
    step_epochs: float | None
    step_gamma: float
    lr_floor: float
    batch_size: int
    image_size: int | None
    batch_norm: Literal["frozen", "train", "sync"]
    augment: AugmentName
    cache_features: bool
    find_lr: bool = False
    mixup: float = 0.0
    cutmix: float = 0.0
    sampling: SamplingName = "shuffle"
    random_erasing: float | None = None
    color: ColorName = "auto"
    swa_epochs: int = 0
    swa_lr: float | None = None
    patience: int | None = None
    plateau_patience: int = 2
    new_optimizer: bool = False
    train_sizes: tuple[int, ...] = NO_NUMBERS
    multi_scale: float = 0.0
    batch_scaling: Literal["none", "area"] = "none"
    feature_views: int = 1

    @property
    def mixes(self) -> bool:
        """Pictures are mixed with others."""
        return bool(self.mixup or self.cutmix) and not self.cache_features

    @property
    def erases(self) -> float:
        """Probability that a box of a picture is erased."""
        if self.cache_features and self.feature_views == 1:
            return 0.0
        usual = STRONG_ERASING if self.augment == "strong" else 0.0
        return usual if self.random_erasing is None else self.random_erasing

    @property
    def judged_once(self) -> bool:
        """Evaluated at its end alone: an epoch of the head on cached features is shorter than an evaluation."""
        return self.cache_features and self.open == "head"

    @property
    def may_end_early(self) -> bool:
        """Evaluations may end the stage before its last epoch."""
        return self.patience is not None and not self.judged_once and self.epochs > self.patience + 1

    @property
    def varies(self) -> bool:
        """Optimizer steps draw the size of their pictures."""
        return bool(self.train_sizes or self.multi_scale) and not self.cache_features

    @property
    def drawn_by(self) -> str:
        """The flag that says which sizes those are."""
        return "--train-sizes" if self.train_sizes else "--multi-scale"

    def keeps_optimizer_of(self, before: Stage) -> bool:
        """Whether the optimizer of the stage *before* goes on, with its state."""
        same_name = self.optimizer.lower() == before.optimizer.lower()
        return same_name and (self.momentum, self.weight_decay) == (before.momentum, before.weight_decay)

    def steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole stage."""
        return self.epochs * steps_per_epoch

    def warmup_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the linear warm-up; at least one of those that a new optimizer is given."""
        steps = round(self.warmup_epochs * steps_per_epoch)
        return max(1, steps) if self.new_optimizer and self.warmup_epochs else steps

    def factor(self, steps_per_epoch: int) -> Callable[[int], float]:
        """The schedule: optimizer step within the stage -> factor of the peak LR."""
        total = self.steps(steps_per_epoch)
        if self.swa_lr is not None:
            total -= self.swa_epochs * steps_per_epoch
        warmup = self.warmup_steps(steps_per_epoch)
        rest = max(1, total - warmup)
        shape = schedules.with_warmup(self._shape(rest, steps_per_epoch), warmup)
        return shape if self.swa_lr is None else schedules.then_constant(shape, total, self.swa_lr)

    def _shape(self, steps: int, steps_per_epoch: int) -> Callable[[int], float]:
        def in_steps(epochs: float | None, default: float) -> int:
            return max(1, round(default if epochs is None else epochs * steps_per_epoch))

        match self.schedule:
            case "constant" | "plateau":  # what a plateau does is `Progress.lr_factor`
                return schedules.constant()
            case "cosine":
                return schedules.cosine(steps, self.lr_floor)
            case "one-cycle":
                return schedules.one_cycle(steps)
            case "sgdr":
                first = in_steps(self.cycle_epochs, steps)
                return schedules.sgdr(first, self.cycle_mult, self.lr_floor, self.cycle_decay)
            case "step":
                return schedules.step_decay(in_steps(self.step_epochs, steps / 3), self.step_gamma)
            case "triangular":
                return schedules.triangular(max(1, in_steps(self.cycle_epochs, steps) // 2), self.lr_floor)

    def cycle_ends(self, steps_per_epoch: int) -> list[int]:
        """Steps of the stage after which an SGDR cycle is complete, ascending."""
        if self.schedule != "sgdr":
            return []
        warmup = self.warmup_steps(steps_per_epoch)
        steps = self.steps(steps_per_epoch) - warmup
        if steps < 1:
            return []
        first = steps if self.cycle_epochs is None else max(1, round(self.cycle_epochs * steps_per_epoch))
        return [warmup + end for end in schedules.restarts(first, self.cycle_mult, steps + 1)]

    def notes(self, steps_per_epoch: int) -> Iterator[str]:
        """What the plan says of the stage besides its numbers."""
        if self.new_optimizer:
            steps = self.warmup_steps(steps_per_epoch)
            said = f"its learning rate rises over {steps} steps" if steps else "without a warm-up of its learning rate"
            yield f"stage {self.name!r} starts a new optimizer, {self.optimizer}, {said}"
        if self.schedule == "plateau":
            every = counted(self.plateau_patience, "evaluation")
            yield f"stage {self.name!r} drops to {self.step_gamma:g} of its learning rate after {every} without better"
        if self.may_end_early:
            every = counted(self.patience or 0, "evaluation")
            yield f"stage {self.name!r} ends early after {every} in a row without a better one"
        if self.schedule == "sgdr" and self.cycle_epochs is None:
            yield f"stage {self.name!r} is one SGDR cycle without a restart; --cycle-epochs makes it shorter"
        if cut := self.cut_cycle(steps_per_epoch):
            yield cut

    def cut_cycle(self, steps_per_epoch: int) -> str | None:
        """A warning when the stage ends inside an SGDR cycle, at a learning rate that has not come down yet."""
        if self.schedule != "sgdr" or self.cycle_epochs is None:
            return None
        first, steps = max(1, round(self.cycle_epochs * steps_per_epoch)), self.steps(steps_per_epoch)
        steps -= self.warmup_steps(steps_per_epoch)
        starts = [0, *schedules.restarts(first, self.cycle_mult, steps + 1)]
        if starts[-1] == steps:
            return None
        length = first * self.cycle_mult ** (len(starts) - 1)
        done = (steps - starts[-1]) / length
        fitting = (starts[-1] + length) / steps_per_epoch + self.warmup_epochs
        return f"stage {self.name!r} ends {done:.0%} into its last SGDR cycle; {fitting:g} epochs would finish it"


def counted(number: int, noun: str) -> str:
    """``1 evaluation``, ``2 evaluations``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
