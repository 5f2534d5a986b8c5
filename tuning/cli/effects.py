"""Flags that were typed and would have no effect, refused with the reason."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from tuning.cli.checks import flat
from tuning.cli.coerce import as_key
from tuning.cli.optimizer_defaults import takes_momentum
from tuning.cli.run_defaults import OPENING
from tuning.errors import UserError
from tuning.flags import Flags
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
    "color": ("augment", ("medium", "strong")),
    "cache_folder": ("cache", ("disk",)),
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
ONLY_WITHIN_A_RUN = ("finder_at", "finder_share")  # of the finder flags


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
    if listed is None:
        _refuse_rates(values, typed)
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
    _refuse_idle_steps(values, typed, stages)
    _refuse_idle_techniques(values, typed, stages)
    _refuse_idle_when_closed(values, typed, stages)
    if all(stage.cache_features for stage in stages):
        _refuse_pictures(values, erased=any(stage.erases for stage in stages))
    if "shuffle_gb" in typed and not flags.data.streaming:
        raise UserError(f"--shuffle-gb {values['shuffle_gb']:g} has no effect without --streaming. Drop it.")


def _refuse_rates(values: Mapping[str, Any], typed: Sequence[str]) -> None:
    """Learning rates of stages that there are none of; a run of the head alone takes --lr where that is all it has."""
    if "freeze_lr" in typed and not values["freeze_epochs"]:
        raise UserError(
            f"--freeze-lr {values['freeze_lr']} has no effect with --freeze-epochs 0: no stage trains the head alone. "
            "Give --lr, or raise --freeze-epochs."
        )
    if "lr" in typed and not values["epochs"] and (values["freeze_lr"] is not None or values["lr"] == "auto"):
        raise UserError(
            f"--lr {values['lr']} has no effect with --epochs 0: the rate of the head alone is --freeze-lr. Give that, "
            "or raise --epochs."
        )


def _refuse_idle_steps(values: Mapping[str, Any], typed: Sequence[str], stages: Sequence[Stage]) -> None:
    """Details of optimizer steps that no step has."""
    optimizers = sorted({stage.optimizer for stage in stages})
    if "momentum" in typed and not any(map(takes_momentum, optimizers)):
        raise UserError(
            f"--momentum {values['momentum']} has no effect with --optimizer {' and '.join(optimizers)}. Drop it, or "
            "choose one with a momentum of this kind, for example --optimizer sgd."
        )
    for other in ("clip_value", "clip_agc"):
        if values["clip_norm"] and "clip_norm" in typed and values[other] is not None:
            flag = f"--{other.replace('_', '-')} {values[other]}"
            raise UserError(
                f"--clip-norm {values['clip_norm']} has no effect with {flag}, which takes its place. Give one."
            )


def _refuse_idle_techniques(values: Mapping[str, Any], typed: Sequence[str], stages: Sequence[Stage]) -> None:
    """Techniques that no stage gives anything to do."""
    still = all(stage.batch_norm == "frozen" for stage in stages)
    if "batch_norm_images" in typed and still:
        raise UserError(
            f"--batch-norm-images {values['batch_norm_images']} has no effect with --batch-norm frozen, which keeps "
            "the statistics of the weights. Drop it, or choose --batch-norm train or sync."
        )
    if values["snapshots"] and not any(stage.schedule == "sgdr" for stage in stages):
        raise UserError("--snapshots keeps the ends of sgdr cycles; add --schedule sgdr with --cycle-epochs.")
    if values["snapshots"] and any(stage.patience is not None for stage in stages):
        raise UserError(
            "--snapshots keeps the cycles of the plan, and --patience may end a stage before them. Drop one."
        )
    if values["rollback"] and len(stages) == 1:
        raise UserError("--rollback undoes a stage before the next one, and there is one stage. Drop it.")
    if values["patience"] is not None and not any(stage.may_end_early for stage in stages):
        raise UserError(
            f"--patience {values['patience']} has no effect: no stage that is evaluated after every epoch has more "
            f"than {values['patience'] + 1}. Lower it, raise --epochs, or drop it."
        )


def _refuse_idle_when_closed(values: Mapping[str, Any], typed: Sequence[str], stages: Sequence[Stage]) -> None:
    """Flags about layers that are closed."""
    if "frozen_forward" in typed and not any(stage.open == "head" for stage in stages):
        raise UserError(
            f"--frozen-forward {values['frozen_forward']} has no effect: no stage trains the head alone. Drop it, or "
            "raise --freeze-epochs."
        )
    if "grad_checkpointing" in typed and all(stage.open == "head" for stage in stages):
        raise UserError(
            "--grad-checkpointing has no effect: no stage opens anything below the head, so nothing there is kept for "
            "a backward pass. Drop it, or raise --epochs."
        )
    if "feature_views" not in typed:
        return
    cached, views = [stage for stage in stages if stage.cache_features], f"--feature-views {values['feature_views']}"
    if not cached:
        raise UserError(f"{views} has no effect without --cache-features. Drop it, or add that.")
    if values["flip"] == "none" and not any(stage.augment != "none" or stage.erases for stage in cached):
        raise UserError(
            f"{views}: without --augment and --flip all views are the same picture. Drop it, or choose one."
        )


def _refuse_pictures(values: Mapping[str, Any], erased: bool) -> None:
    """What works on pictures, where every stage trains on cached features.

    Args:
        erased: pictures are erased before their features are computed.
    """
    if values["train_sizes"] or values["multi_scale"]:
        key = "train-sizes" if values["train_sizes"] else "multi-scale"
        raise UserError(
            f"--{key} {_said(values[key.replace('-', '_')])} draws sizes of pictures, but every stage trains on cached "
            "features. Drop it, or --cache-features."
        )
    for key in ("mixup", "cutmix"):
        if values[key]:
            raise UserError(
                f"--{key} {values[key]} mixes pictures, but every stage trains on cached features. Drop it, or "
                "--cache-features."
            )
    if values["random_erasing"] and not erased:
        raise UserError(
            f"--random-erasing {values['random_erasing']} erases parts of pictures, but every stage trains on cached "
            "features. Drop it, or --cache-features."
        )


def refuse_sampling(stage: Stage, flags: Flags) -> None:
    """Refuse to correct for the numbers of images twice, or to draw at will from what is read in blocks.

    Raises:
        UserError: names the stage and the remedy.
    """
    asked = f"stage {stage.name!r}: --sampling {stage.sampling}"
    if stage.sampling != "shuffle" and flags.regularisation.class_weights != "none":
        raise UserError(
            f"{asked} shows rare classes more often, and --class-weights {flags.regularisation.class_weights} counts "
            "them more in the loss: together they would count twice. Leave one of the two out."
        )
    if stage.sampling != "shuffle" and flags.data.streaming:
        raise UserError(
            f"{asked} takes single images from anywhere in the data, while --streaming reads whole row groups, each "
            "once an epoch. Use --class-weights balanced, or leave --streaming out."
        )


def _said(value: Any) -> str:
    """A value as it was typed."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


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
    if key == "max_minutes":
        return ("recipes/finetune.py",)
    if key in ONLY_WITHIN_A_RUN:
        return (recipe if searches else "--lr auto of recipes/finetune.py",)
    if searches and key in vars(flags.finder) and key != "stage":
        return (recipe,)
    own = (owners for group, owners in GROUPS_OF_RECIPES.items() if key in vars(getattr(flags, group)))
    return next(own, (recipe,))
