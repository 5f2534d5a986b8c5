"""Refuses flags that can't work, alone or together. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from tuning.cli.coerce import coerce, field_types
from tuning.errors import UserError
from tuning.flags import Flags

LOWEST = {  # smallest value: whole numbers
    0: (
        *("workers", "freeze_epochs", "epochs", "seed", "save_every", "check_steps", "near_bits"),
        *("bootstrap", "latency_repeats", "swa_epochs"),
    ),
    1: (
        *("limit_train", "limit_eval", "batch_size", "micro_batch", "lr_batch"),
        *("keep", "log_every", "threads", "max_steps", "max_skipped", "overfit_steps", "min_side"),
        *("patience", "plateau_patience", "feature_views", "finder_sweeps", "top_k", "check_images", "trials"),
    ),
    2: ("batch_norm_images",),
    10: ("finder_steps",),
}
LONGEST_WAIT = 60.0 * 24 * 7  # minutes; a time-out that never ends would hide what hangs


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
    check("give a fraction of the peak in (0, 1], for example 0.5", lambda x: 0 < x <= 1, "swa_lr")
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
    check("give minutes above 0, for example 90", above_0, "stop_after", "max_minutes")
    check("give 10^9 bytes above 0, for example 2", above_0, "shuffle_gb")
    check("give a ratio of sides from 1, for example 4", lambda x: 1 <= x < math.inf, "max_aspect")
    check("give millions of pixels above 0, for example 50", above_0, "max_megapixels")
    check("give at most 16 of the 100 bits", lambda x: x <= 16, "near_bits")
    check(f"give minutes above 0, at most {LONGEST_WAIT:g}", lambda x: 0 < x <= LONGEST_WAIT, "timeout")


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
        raise UserError(
            "--init zero: a network of zeros answers every picture alike, and no gradient changes that. Choose "
            "kaiming, xavier or orthogonal, or --head-init zero for the head alone."
        )
    _check_averages(flags)
    _check_minutes(flags)
    if flags.batch.cache != "none" and flags.data.streaming:
        raise UserError(
            f"--cache {flags.batch.cache} keeps the decoded pictures of data at rest, --streaming reads data that is "
            "too large for that. Leave one of the two out."
        )
    if staging.cache_features and not staging.freeze_epochs:
        raise UserError("--cache-features is for the head-only epochs, but --freeze-epochs is 0. Raise it.")


def _check_minutes(flags: Flags) -> None:
    """What has a length that minutes can't settle."""
    if flags.run.max_minutes is None:
        return
    given = f"--max-minutes {flags.run.max_minutes:g}"
    if flags.optimisation.lr == "auto":
        raise UserError(
            f"{given} and --lr auto: how long the search takes follows from the epochs, and they from what it leaves. "
            "Find the rate with recipes/find_lr.py and give it as a number."
        )
    if flags.run.max_steps is not None:
        raise UserError(
            f"{given} and --max-steps {flags.run.max_steps} both say when the run ends. Give one of the two."
        )


def _check_averages(flags: Flags) -> None:
    """Averages that nobody keeps can't be chosen."""
    averages, best_of = flags.averages, flags.run.best_of
    if best_of == "ema" and flags.regularisation.ema_decay is None:
        raise UserError("--best-of ema needs averaged weights; add --ema-decay, for example 0.999.")
    if best_of == "swa" and not averages.swa_epochs:
        raise UserError("--best-of swa needs an average of the last epochs; add --swa-epochs, for example 5.")
    if averages.swa_lr is not None and not averages.swa_epochs:
        raise UserError(f"--swa-lr {averages.swa_lr:g} is the rate of --swa-epochs, which is 0. Give the epochs, too.")
