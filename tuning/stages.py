"""A run is a list of stages: which depth is open, for how long, at which rate, with which optimizer and schedule."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tuning import schedules
from tuning.coerce import as_key, coerce, field_types, shown
from tuning.errors import UserError, did_you_mean
from tuning.flags import ScheduleName

GRADUAL_PARTS = 4
MOST_LAYERS = 10**6
NOT_KEYS = ("find_lr", "new_optimizer")  # lr: auto, and what follows from the stage before


@dataclass(frozen=True)
class Stage:
    """One stage. Every field but `name` and `open` defaults to the flag of the same name.

    Attributes:
        name: shown in the plan and marked in the curves.
        open: ``head``; ``all``; a whole number n = the head and the n layers below it; a fraction f in (0, 1] = the
            head and that part of the depth.
        epochs: passes over the data.
        lr: peak learning rate of the head, after --lr-scaling.
        lr_ratio: stem LR / head LR (None when `layer_decay` is given).
        layer_decay: LR factor per layer (None when `lr_ratio` is given).
        batch_size: images per optimizer step over all processes.
        image_size: side of the input in pixels (None = the model's).
        cache_features: compute the input of the head once; for ``open: head`` only.
        find_lr: `lr` is kept only if the LR finder has no confident answer (``lr: auto``).
        mixup, cutmix: alpha, 0 = off; pictures alone are mixed, no cached features.
        patience: evaluations in a row without a better one after which the stage ends; None = it runs to its end.
        plateau_patience: those after which the plateau schedule drops.
        new_optimizer: the stage before names another one, so that this one starts without state.
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
    batch_norm: Literal["frozen", "train"]
    augment: Literal["none", "light", "medium"]
    cache_features: bool
    find_lr: bool = False
    mixup: float = 0.0
    cutmix: float = 0.0
    patience: int | None = None
    plateau_patience: int = 2
    new_optimizer: bool = False

    @property
    def mixes(self) -> bool:
        """Pictures are mixed with others."""
        return bool(self.mixup or self.cutmix) and not self.cache_features

    @property
    def may_end_early(self) -> bool:
        """Evaluations may end the stage before its last epoch. On cached features there is one, at its end."""
        return self.patience is not None and not self.cache_features and self.epochs > self.patience + 1

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
        warmup = self.warmup_steps(steps_per_epoch)
        rest = max(1, total - warmup)
        return schedules.with_warmup(self._shape(rest, steps_per_epoch), warmup)

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


def check_stage(stage: Stage) -> None:
    """Refuse values that no stage can have.

    Raises:
        UserError: names the stage, the key, the value and the remedy.
    """

    def refuse(ok: bool, key: str, remedy: str) -> None:
        if not ok:
            flag = key.replace("_", "-")
            raise UserError(f"stage {stage.name!r}: --{flag} is {getattr(stage, key)!r}; {remedy}.")

    refuse(math.isfinite(stage.lr) and stage.lr > 0, "lr", "give a learning rate above 0, for example 3e-4")
    refuse(stage.epochs >= 1, "epochs", "give at least 1 epoch or leave the stage out")
    refuse(stage.batch_size >= 1, "batch_size", "give at least 1 image")
    refuse(stage.image_size is None or stage.image_size >= 8, "image_size", "give at least 8 pixels")
    refuse(_finite_from_zero(stage.weight_decay), "weight_decay", "give 0 or more")
    refuse(0 <= stage.momentum < 1, "momentum", "give a number in [0, 1)")
    refuse(0 <= stage.lr_floor < 1, "lr_floor", "give a fraction of the peak in [0, 1)")
    refuse(0 <= stage.warmup_epochs < stage.epochs, "warmup_epochs", "give less than the stage's epochs")
    refuse(stage.cycle_epochs is None or 0 < stage.cycle_epochs < math.inf, "cycle_epochs", "give more than 0 epochs")
    refuse(stage.step_epochs is None or 0 < stage.step_epochs < math.inf, "step_epochs", "give more than 0 epochs")
    refuse(stage.cycle_mult >= 1, "cycle_mult", "give 1 or more")
    refuse(0 < stage.cycle_decay <= 1, "cycle_decay", "give a factor in (0, 1]")
    refuse(0 < stage.step_gamma <= 1, "step_gamma", "give a factor in (0, 1]")
    refuse(stage.layer_decay is None or 0 < stage.layer_decay <= 1, "layer_decay", "give a factor in (0, 1]")
    refuse(stage.lr_ratio is None or 0 < stage.lr_ratio <= 1, "lr_ratio", "give a ratio in (0, 1]")
    for key in ("mixup", "cutmix"):
        alpha = getattr(stage, key)
        refuse(alpha == 0 or 0.01 <= alpha <= 100, key, "give 0 for off, or a number from 0.01 to 100, for example 0.2")
    refuse(stage.patience is None or stage.patience >= 1, "patience", "give at least 1 evaluation")
    refuse(stage.plateau_patience >= 1, "plateau_patience", "give at least 1 evaluation")
    _check_patience(stage)
    if stage.layer_decay is not None and stage.lr_ratio is not None:
        raise UserError(
            f"stage {stage.name!r}: --layer-decay {stage.layer_decay} and --lr-ratio {stage.lr_ratio} exclude each "
            "other; give one of the two."
        )
    _check_open(stage)


def _check_patience(stage: Stage) -> None:
    """Refuse to end a stage where its learning rate has yet to come down, or where its drop would come too late."""
    if stage.patience is None:
        return
    said = f"stage {stage.name!r}: --patience {stage.patience}"
    if stage.schedule in ("one-cycle", "triangular"):
        raise UserError(
            f"{said} may end the stage before the learning rate of --schedule {stage.schedule} has come down. Drop it, "
            "or choose cosine, constant, step, plateau or sgdr."
        )
    cycle = stage.cycle_epochs
    if stage.schedule == "sgdr" and not (cycle and cycle == int(cycle) and stage.warmup_epochs % 1 == 0):
        raise UserError(
            f"{said} with --schedule sgdr counts the ends of cycles, and evaluations are at ends of epochs: give "
            f"whole --cycle-epochs (now {cycle}) and --warmup-epochs (now {stage.warmup_epochs:g})."
        )
    if stage.schedule == "plateau" and stage.plateau_patience >= stage.patience:
        raise UserError(
            f"{said} ends the stage before --plateau-patience {stage.plateau_patience} drops its learning rate. Raise "
            "the first or lower the second."
        )


def counted(number: int, noun: str) -> str:
    """``1 evaluation``, ``2 evaluations``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _finite_from_zero(value: float) -> bool:
    return math.isfinite(value) and value >= 0


def _check_open(stage: Stage) -> None:
    depth = stage.open
    if isinstance(depth, str):
        ok = depth in ("head", "all")
    else:
        ok = 1 <= depth <= MOST_LAYERS if isinstance(depth, int) else 0 < depth <= 1
    if not ok:
        raise UserError(
            f"stage {shown(stage.name)}: open is {shown(depth)}; give head, all, a number of layers from 1, or a "
            "fraction of the depth in (0, 1]."
        )
    if stage.cache_features and depth != "head":
        raise UserError(
            f"stage {stage.name!r}: cache_features needs all layers below the head closed, but open is {depth!r}; "
            "use open: head or leave cache_features out."
        )


def read_stages(listed: Sequence[Mapping[str, Any]], base: Stage, where: str) -> list[Stage]:
    """Stages from the YAML list under ``stages:``; keys that a stage leaves out come from *base*.

    Raises:
        UserError: an unknown key (names the nearest), a value of the wrong type, or no list.
    """
    if not isinstance(listed, list) or not listed or not all(isinstance(entry, dict) for entry in listed):
        raise UserError(
            f"{where}: stages must be a list of stages like '- {{open: head, epochs: 3}}'; got {shown(listed)}."
        )
    return [_read_stage(entry, base, f"{where}: stage {number}") for number, entry in enumerate(listed, start=1)]


def _read_stage(entry: Mapping[str, Any], base: Stage, where: str) -> Stage:
    types = {key: kind for key, kind in field_types(Stage).items() if key not in NOT_KEYS}
    given: dict[str, Any] = {}
    for key, value in entry.items():
        key = as_key(key)
        if key not in types:
            raise UserError(
                f"{where} has the unknown key {shown(key)}.{did_you_mean(key, types)} Known: {', '.join(types)}."
            )
        if key == "lr":
            given["find_lr"] = value == "auto"
            if value == "auto":
                continue
        given[key] = _read_depth(value) if key == "open" else coerce(value, types[key], f"{where}, {key}")
    if "open" not in given:
        raise UserError(f"{where} doesn't say what is open; add open: head, all, or a number of layers.")
    if given.get("layer_decay") is not None and "lr_ratio" not in given:
        given["lr_ratio"] = None
    if given.get("lr_ratio") is not None and "layer_decay" not in given:
        given["layer_decay"] = None
    given.setdefault("name", _default_name(given["open"]))
    return dataclasses.replace(base, **{"cache_features": False, **given})


def _read_depth(value: Any) -> str | int | float:
    """``40%`` and quoted numbers as numbers; what is no depth stays as it was typed, for `check_stage` to refuse."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    text = value if isinstance(value, str) else shown(value)
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    return text


def _default_name(depth: str | int | float) -> str:
    if isinstance(depth, str):
        return depth
    return f"top-{shown(depth)}" if isinstance(depth, int) else f"top-{depth:.0%}"


def standard_stages(base: Stage, freeze_epochs: int, freeze_lr: float, unfreeze: str) -> list[Stage]:
    """Head first for *freeze_epochs*, then everything for ``base.epochs``, at once or gradually from the top.

    Args:
        base: the values every stage starts from; its `epochs` are those after the frozen ones.
        unfreeze: ``all``, or ``gradual`` = four equal parts of the depth (fewer when there are fewer epochs),
            opened from the top (Howard & Ruder 2018).
    """
    stages = []
    if freeze_epochs:
        head = dataclasses.replace(base, name="head", open="head", epochs=freeze_epochs)
        stages.append(dataclasses.replace(head, lr=freeze_lr, find_lr=False))
    if base.epochs and unfreeze == "all":
        stages.append(dataclasses.replace(base, name="all", open="all", cache_features=False))
    elif base.epochs:
        parts = min(GRADUAL_PARTS, base.epochs)
        for part in range(1, parts + 1):
            epochs = base.epochs * part // parts - base.epochs * (part - 1) // parts
            depth: str | float = "all" if part == parts else part / parts
            stages.append(
                dataclasses.replace(base, name=_default_name(depth), open=depth, epochs=epochs, cache_features=False)
            )
    if not stages:
        raise UserError("--freeze-epochs 0 and --epochs 0 leave nothing to train; raise one of the two.")
    return stages


def stage_number(stages: Sequence[Stage], wanted: str, flag: str) -> int:
    """Index of the stage that *wanted* names, or numbers from 1.

    Raises:
        UserError: there is no such stage; names *flag* and the stages there are.
    """
    names = [stage.name for stage in stages]
    if wanted in names:
        return names.index(wanted)
    if wanted.isdecimal() and 1 <= int(wanted) <= len(names):
        return int(wanted) - 1
    listed = ", ".join(f"{number} = {name}" for number, name in enumerate(names, start=1))
    raise UserError(f"{flag} {shown(wanted)} is not a stage: {listed}.{did_you_mean(wanted, names)}")
