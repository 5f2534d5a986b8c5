"""Refuses flags that can't work, alone, together or without effect. Imports no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tuning.coerce import as_key, coerce, field_types
from tuning.errors import UserError
from tuning.flags import Flags
from tuning.run_defaults import OPENING
from tuning.stages import Stage

ONLY_WITHOUT_STAGES = ("freeze_epochs", "freeze_lr", "cache_features", "epochs", "unfreeze")
NEEDS = {  # flag: what another flag must be for it to have an effect
    "cycle_epochs": ("schedule", ("sgdr", "triangular")),
    "cycle_mult": ("schedule", ("sgdr",)),
    "cycle_decay": ("schedule", ("sgdr",)),
    "step_epochs": ("schedule", ("step",)),
    "step_gamma": ("schedule", ("step", "plateau")),
    "plateau_patience": ("schedule", ("plateau",)),
    "lr_floor": ("schedule", ("cosine", "sgdr", "triangular", "plateau")),
    "lr_batch": ("lr_scaling", ("linear", "sqrt")),
    "focal_gamma": ("loss", ("focal",)),
}
LOWEST = {  # smallest value: whole numbers
    0: (
        *("workers", "freeze_epochs", "epochs", "seed", "save_every", "check_steps", "near_bits"),
        *("bootstrap", "latency_repeats"),
    ),
    1: (
        *("limit_train", "limit_eval", "batch_size", "micro_batch", "lr_batch"),
        *("keep", "log_every", "threads", "max_steps", "max_skipped", "overfit_steps", "min_side"),
        *("patience", "plateau_patience", "finder_sweeps", "top_k", "check_images", "trials"),
    ),
    10: ("finder_steps",),
}
GROUPS_OF_RECIPES = {
    "overfit": ("recipes/overfit.py",),
    "check": ("recipes/check.py",),
    "finder": ("recipes/find_lr.py",),
    "opened": OPENING,
    "evaluate": ("recipes/evaluate.py",),
    "predict": ("recipes/predict.py",),
    "export": ("recipes/export.py",),
    "sweep": ("recipes/sweep.py",),
}
_ANY_RUN = ("output", "precision", "threads", "timeout", "preset", "config", "print_config")
_MODEL = ("run", "model", "weights", "image_size", "crop_pct", "micro_batch", "workers")
USED = {  # flags that recipes know which train nothing; all others are refused when they are typed
    "recipes/evaluate.py": (
        *(*_ANY_RUN, *_MODEL, "calibrate", "tta", "ensemble", "bootstrap"),
        *("data", "image_column", "label_column", "train_split", "eval_split", "limit_eval", "streaming"),
    ),
    "recipes/predict.py": (*_ANY_RUN, *_MODEL, "images", "top_k"),
    "recipes/export.py": (
        *("run", "output", "threads", "dry_run", "preset", "config", "print_config"),
        *("format", "export_input", "tolerance", "check_images", "latency_repeats", "license", "metrics"),
        *("push", "push_wandb"),
        *("data", "image_column", "label_column", "train_split", "eval_split", "limit_eval", "streaming"),
    ),
}
LONGEST_WAIT = 60.0 * 24 * 7  # minutes; a time-out that never ends would hide what hangs
ONLY_WITHIN_A_RUN = ("finder_at", "finder_share")  # of the finder flags


def flat(flags: Flags) -> dict[str, Any]:
    """``{flag: value}`` without the groups."""
    return {key: value for group in vars(flags).values() for key, value in vars(group).items()}


def check_flags(flags: Flags) -> None:
    """Refuse single values and combinations that can't work.

    Raises:
        UserError: names the flag, the value and the remedy.
    """
    _check_types(flags)
    values = flat(flags)
    _check_counts(values)
    _check_numbers(values)
    _check_combinations(flags)


def _refuse(ok: bool, key: str, values: Mapping[str, Any], remedy: str) -> None:
    if not ok:
        raise UserError(f"--{key.replace('_', '-')} is {values[key]!r}; {remedy}.")


def _check_types(flags: Flags) -> None:
    """What was typed keeps the bounds of what is read from a file, so that ``config.yaml`` can hold and repeat it."""
    for group in vars(flags).values():
        for key, wanted in field_types(type(group)).items():
            coerce(getattr(group, key), wanted, f"--{key.replace('_', '-')}")


def _check_counts(values: Mapping[str, Any]) -> None:
    for low, keys in LOWEST.items():
        for key in keys:  # words such as auto have been checked by their type
            ok = not isinstance(values[key], int) or values[key] >= low
            _refuse(ok, key, values, f"give a whole number from {low}")
    _refuse(values["seed"] < 2**63, "seed", values, "give a whole number below 2^63")


def _check_numbers(values: Mapping[str, Any]) -> None:
    def check(remedy: str, ok: Callable[[float], bool], *keys: str) -> None:
        for key in keys:
            _refuse(values[key] is None or ok(values[key]), key, values, remedy)

    def above_0(x: float) -> bool:
        return 0 < x < math.inf

    check("give a number in [0, 1)", lambda x: 0 <= x < 1, "drop_rate", "drop_path_rate", "label_smoothing")
    check("give a share in (0, 1]", lambda x: 0 < x <= 1, "crop_pct")
    check("give a decay between 0 and 1, for example 0.999", lambda x: 0 < x < 1, "ema_decay")
    check("give a fraction between 0 and 1, for example 0.25", lambda x: 0 < x < 1, "val_fraction")
    lr_ok = values["lr"] in (None, "auto") or above_0(values["lr"])
    _refuse(lr_ok, "lr", values, "give auto or a rate above 0, for example 3e-4")
    check("give a learning rate above 0, for example 3e-4", above_0, "freeze_lr")
    check("give a learning rate above 0, for example 1e-6", above_0, "finder_start", "finder_end")
    check("give a number from 0, for example 2", lambda x: 0 <= x < math.inf, "focal_gamma")
    check("give a norm above 0, or 0 for off", lambda x: 0 <= x < math.inf, "clip_norm")
    check("give a number above 0", above_0, "clip_value", "clip_agc")
    check("give a loss above 0, for example 0.1", above_0, "overfit_target")
    check("give a difference of logits above 0, for example 1e-3", above_0, "tolerance")
    check("give a share in (0, 1], for example 0.1", lambda x: 0 < x <= 1, "finder_share")
    check("give 0, or a whole number from 10", lambda x: x == 0 or x >= 10, "finder_race")
    check("give a share in [0, 1], for example 0.01", lambda x: 0 <= x <= 1, "max_unreadable")
    check("give minutes above 0, for example 90", above_0, "stop_after")
    check("give 10^9 bytes above 0, for example 2", above_0, "shuffle_gb")
    check("give a ratio of sides from 1, for example 4", lambda x: 1 <= x < math.inf, "max_aspect")
    check("give millions of pixels above 0, for example 50", above_0, "max_megapixels")
    check("give at most 16 of the 100 bits", lambda x: x <= 16, "near_bits")
    check(f"give minutes above 0, at most {LONGEST_WAIT:g}", lambda x: 0 < x <= LONGEST_WAIT, "timeout")


def refuse_without_effect(
    flags: Flags, default: Flags, stages: Sequence[Stage], listed: list[Any] | None, where: str, recipe: str
) -> None:
    """Refuse a flag that was typed for nothing, rather than ignore it."""
    values, before = flat(flags), flat(default)
    typed = [key for key in values if values[key] != before[key]]
    _refuse_of_others(flags, values, typed, stages, recipe)
    if recipe in OPENING:
        _check_opening(flags, typed, recipe)
    _refuse_listed(values, typed, listed, where)
    _refuse_idle(flags, values, typed, stages)


def _refuse_of_others(
    flags: Flags, values: Mapping[str, Any], typed: Sequence[str], stages: Sequence[Stage], recipe: str
) -> None:
    """Flags that belong to another recipe."""
    for key in typed:
        if key not in USED.get(recipe, (key,)):
            flag = key.replace("_", "-")
            raise UserError(f"--{flag} {_said(values[key])} has no effect in {recipe}, which trains nothing. Drop it.")
        owners = _owners(flags, key, recipe, stages)
        if recipe.startswith("recipes/") and recipe not in owners:
            flag, owner = key.replace("_", "-"), " and ".join(owners)
            raise UserError(f"--{flag} {_said(values[key])} is for {owner} and has no effect in {recipe}. Drop it.")


def _refuse_listed(values: Mapping[str, Any], typed: Sequence[str], listed: list[Any] | None, where: str) -> None:
    """Flags that the stages of a file set themselves."""
    if listed is not None:
        own = {as_key(key) for stage in listed for key in stage} | set(ONLY_WITHOUT_STAGES)
        for key in typed:
            if key in own:
                flag = key.replace("_", "-")
                raise UserError(
                    f"--{flag} {values[key]}: the stages listed in {where} set that themselves. Copy the file, edit "
                    "its stages and give it as --preset."
                )


def _refuse_idle(flags: Flags, values: Mapping[str, Any], typed: Sequence[str], stages: Sequence[Stage]) -> None:
    """Flags that do nothing as the others are."""
    for key, (switch, allowed) in NEEDS.items():
        chosen = sorted({str(getattr(stage, switch, values[switch])) for stage in stages})
        if key in typed and not set(chosen) & set(allowed):
            flag, other = key.replace("_", "-"), switch.replace("_", "-")
            raise UserError(
                f"--{flag} {values[key]} has no effect with --{other} {' and '.join(chosen)}. Drop it, or choose "
                f"--{other} {' or '.join(allowed)}."
            )
    if "shuffle_gb" in typed and not flags.data.streaming:
        raise UserError(f"--shuffle-gb {values['shuffle_gb']:g} has no effect without --streaming. Drop it.")
    if values["patience"] is not None and not any(stage.may_end_early for stage in stages):
        raise UserError(
            f"--patience {values['patience']} has no effect: no stage that is evaluated after every epoch has more "
            f"than {values['patience'] + 1}. Lower it, raise --epochs, or drop it."
        )
    for key in ("mixup", "cutmix"):
        if values[key] and all(stage.cache_features for stage in stages):
            raise UserError(
                f"--{key} {values[key]} mixes pictures, but every stage trains on cached features. Drop it, or "
                "--cache-features."
            )


def _said(value: Any) -> str:
    """A value as it was typed."""
    return " ".join(value) if isinstance(value, tuple) else str(value)


def _check_opening(flags: Flags, typed: Sequence[str], recipe: str) -> None:
    """What recipes that open something trained refuse; ``--print-config`` needs nothing to open."""
    opened, evaluate = flags.opened.run, flags.evaluate
    for key in ("model", "weights"):
        if opened is not None and key in typed:
            raise UserError(f"--{key} {getattr(flags.model, key)}: --run {opened} is the model. Give one of the two.")
    if opened is None and (evaluate.ensemble or evaluate.calibrate):
        flag = "--ensemble" if evaluate.ensemble else "--calibrate"
        raise UserError(f"{flag} needs --run, a run or a timm folder.")
    if evaluate.calibrate and (evaluate.ensemble or evaluate.tta != "none"):
        flag = "--ensemble" if evaluate.ensemble else f"--tta {evaluate.tta}"
        raise UserError(f"--calibrate stores a temperature for one model as it is; leave {flag} out.")
    if (flags.run.precision or "").startswith("bf16-"):
        raise UserError(f"--precision {flags.run.precision} is a way to train; {recipe} takes fp32, bf16 and fp16.")
    members = [os.path.realpath(path) for path in (opened, *evaluate.ensemble) if path]
    if len({*members}) < len(members):
        raise UserError("--ensemble: the same model twice is no ensemble. Name each once.")
    nothing = opened is None and flags.model == Flags().model and flags.data == Flags().data
    if recipe == "recipes/evaluate.py" and nothing and not flags.run.print_config:
        raise UserError("Give what is to be judged: --run R, or --model (with --weights) and --data.")


def _owners(flags: Flags, key: str, recipe: str, stages: Sequence[Stage]) -> tuple[str, ...]:
    """The recipes that a flag is for; *recipe* itself if it is for all."""
    searches = any(stage.find_lr for stage in stages) and recipe in ("recipes/finetune.py", "recipes/sweep.py")
    if key in ONLY_WITHIN_A_RUN:
        return (recipe if searches else "--lr auto of recipes/finetune.py",)
    if searches and key in vars(flags.finder) and key != "stage":
        return (recipe,)
    own = (owners for group, owners in GROUPS_OF_RECIPES.items() if key in vars(getattr(flags, group)))
    return next(own, (recipe,))


def _check_combinations(flags: Flags) -> None:
    optimisation, model, staging = flags.optimisation, flags.model, flags.staging
    regularisation = flags.regularisation
    if regularisation.loss == "focal" and regularisation.label_smoothing:
        raise UserError(
            f"--loss focal is defined for one label an image, --label-smoothing {regularisation.label_smoothing} "
            "spreads it over all classes. Leave one of the two out."
        )
    if optimisation.layer_decay is not None and optimisation.lr_ratio is not None:
        raise UserError(
            f"--layer-decay {optimisation.layer_decay} and --lr-ratio {optimisation.lr_ratio} exclude each other: both "
            "set the learning rates of lower layers. Give one of the two."
        )
    if optimisation.lr == "auto" and optimisation.lr_scaling != "none":
        raise UserError(
            f"--lr auto is found for --batch-size as it is; --lr-scaling {optimisation.lr_scaling} would change it. "
            "Leave --lr-scaling out."
        )
    if optimisation.clip_value is not None and optimisation.clip_agc is not None:
        raise UserError(
            f"--clip-value {optimisation.clip_value} and --clip-agc {optimisation.clip_agc} exclude each other; give "
            "one of the two."
        )
    if model.init != "default" and model.weights != "none":
        raise UserError(
            f"--init {model.init} would overwrite --weights {model.weights}. Add --weights none, or use --head-init."
        )
    if model.init == "zero":
        raise UserError("--init zero: a network of zeros gets no gradient. Choose kaiming, xavier or orthogonal.")
    if flags.run.best_of == "ema" and flags.regularisation.ema_decay is None:
        raise UserError("--best-of ema needs averaged weights; add --ema-decay, for example 0.999.")
    if staging.cache_features and not staging.freeze_epochs:
        raise UserError("--cache-features is for the head-only epochs, but --freeze-epochs is 0. Raise it.")
