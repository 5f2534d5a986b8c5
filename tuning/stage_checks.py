"""What no stage can have, whatever the model and the data."""

from __future__ import annotations

import math
from collections.abc import Callable

from tuning.cli.coerce import shown
from tuning.errors import UserError
from tuning.flags.names import RISES_FIRST
from tuning.stages import PARTS, Stage

MOST_LAYERS = 10**6


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
    refuse(stage.swa_epochs <= stage.epochs, "swa_epochs", f"the last stage has {stage.epochs} epochs, give no more")
    for key in ("mixup", "cutmix"):
        alpha = getattr(stage, key)
        refuse(alpha == 0 or 0.01 <= alpha <= 100, key, "give 0 for off, or a number from 0.01 to 100, for example 0.2")
    erasing = stage.random_erasing
    refuse(erasing is None or 0 <= erasing <= 1, "random_erasing", "give a probability in [0, 1], for example 0.25")
    refuse(stage.patience is None or stage.patience >= 1, "patience", "give at least 1 evaluation")
    refuse(stage.plateau_patience >= 1, "plateau_patience", "give at least 1 evaluation")
    views = not stage.cache_features or 1 <= stage.feature_views <= stage.epochs
    refuse(views, "feature_views", f"an epoch takes one view, so give 1 to {stage.epochs}, or more epochs")
    _check_patience(stage)
    _check_sizes(stage, refuse)
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
    if stage.schedule in RISES_FIRST:
        raise UserError(
            f"{said} may end the stage before the learning rate of --schedule {stage.schedule} has come down. Drop it, "
            "or choose cosine, constant, step, plateau or sgdr."
        )
    if stage.swa_epochs:
        raise UserError(
            f"{said} may end the stage before the epochs that --swa-epochs {stage.swa_epochs} averages. Drop one of "
            "the two."
        )
    cycle = stage.cycle_epochs
    if stage.schedule == "sgdr" and not (cycle and cycle == int(cycle) and stage.warmup_epochs % 1 == 0):
        raise UserError(
            f"{said} with --schedule sgdr counts the ends of cycles, and the model is evaluated at ends of epochs: "
            f"give whole --cycle-epochs (now {cycle}) and --warmup-epochs (now {stage.warmup_epochs:g})."
        )
    if stage.schedule == "plateau" and stage.plateau_patience >= stage.patience:
        raise UserError(
            f"{said} ends the stage before --plateau-patience {stage.plateau_patience} drops its learning rate. Raise "
            "the first or lower the second."
        )


def _check_sizes(stage: Stage, refuse: Callable[[bool, str, str], None]) -> None:
    sizes = stage.train_sizes
    several = not sizes or (len(sizes) == len({*sizes}) > 1 and min(sizes) >= 8)
    refuse(several, "train_sizes", "give two or more different sizes from 8 pixels, for example 96 128 160")
    refuse(
        0 <= stage.multi_scale <= 0.9, "multi_scale", "give a fraction of --image-size in [0, 0.9], for example 0.25"
    )
    if sizes and stage.multi_scale:
        raise UserError(
            f"stage {stage.name!r}: --train-sizes {' '.join(map(str, sizes))} and --multi-scale {stage.multi_scale:g} "
            "exclude each other: both say which sizes are drawn. Give one of the two."
        )


def _finite_from_zero(value: float) -> bool:
    return math.isfinite(value) and value >= 0


def _check_open(stage: Stage) -> None:
    depth = stage.open
    if isinstance(depth, str):
        ok = depth in ("head", "all", *PARTS)
    else:
        ok = 1 <= depth <= MOST_LAYERS if isinstance(depth, int) else 0 < depth <= 1
    if not ok:
        raise UserError(
            f"stage {shown(stage.name)}: open is {shown(depth)}; give head, all, norms, norms-biases, a number of "
            "layers from 1, or a fraction of the depth in (0, 1]."
        )
    if stage.cache_features and depth in ("all", *PARTS):
        raise UserError(
            f"stage {stage.name!r}: cache_features needs closed layers below the open ones, but open is {depth!r}; use "
            "open: head, a number of layers or a fraction, or leave cache_features out."
        )
