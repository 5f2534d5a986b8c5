"""From what the user typed to checked flags and stages, or one clear message. Imports no torch."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tuning.coerce import coerce, field_types
from tuning.errors import UserError, did_you_mean
from tuning.flags import Flags
from tuning.sizes import scaled_lr
from tuning.stages import Stage, check_stage, read_stages, standard_stages

# Where a run goes and whether it runs is not part of what it is: config.yaml leaves these out.
NOT_IN_CONFIG = ("output", "run_name", "resume", "dry_run", "preset", "config", "print_config")
COMMAND_LINE_ONLY = ("preset", "config", "print_config")
DEMO_PRESET = "demo"


ONLY_WITHOUT_STAGES = ("freeze_epochs", "freeze_lr", "cache_features", "epochs", "unfreeze")
NEEDS = {  # flag: what another flag must be for it to have an effect
    "cycle_epochs": ("schedule", ("sgdr", "triangular")),
    "cycle_mult": ("schedule", ("sgdr",)),
    "cycle_decay": ("schedule", ("sgdr",)),
    "step_epochs": ("schedule", ("step",)),
    "step_gamma": ("schedule", ("step",)),
    "lr_floor": ("schedule", ("cosine", "sgdr", "triangular")),
    "lr_batch": ("lr_scaling", ("linear", "sqrt")),
}


@dataclass(frozen=True)
class Command:
    """What the user asked for, checked.

    Attributes:
        flags: every flag.
        stages: the stages that the flags mean.
        config: both as YAML text, the content of ``config.yaml``.
    """

    flags: Flags
    stages: tuple[Stage, ...]
    config: str


Recipe = Callable[[Command], None]


def run_recipe(recipe: Recipe, name: str, presets: Path) -> NoReturn:
    """Parse the command line, call the recipe and end the process.

    Exit status: 0 done; 2 the user must change something (message on stderr, no traceback); 75 stopped by Ctrl-C; 1 a
    defect (traceback).

    Args:
        recipe: does the work; its docstring is the description in ``--help``.
        name: shown in ``--help``, such as ``recipes/finetune.py``.
        presets: folder of the presets that ``--preset NAME`` can name.
    """
    try:
        command = parse_command(sys.argv[1:], name, recipe.__doc__ or "", presets)
        if command.flags.run.print_config:
            print(command.config, end="")
        else:
            _recorded(recipe)(command)
    except UserError as error:
        _report(error)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; --resume auto --output FOLDER goes on from the last checkpoint", file=sys.stderr)
        sys.exit(75)
    sys.exit(0)


def _recorded(recipe: Recipe) -> Recipe:
    """Under a launcher, hand the true error of this rank to it: its closing lines show that one."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return recipe
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(recipe)  # type: ignore[return-value]


def _report(error: UserError) -> None:
    """Print once: rank 0 at once; the others wait, because a launcher ends them when rank 0 has ended."""
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(5)
    where = f" (process {rank})" if rank else ""
    print(f"error{where}: {error}", file=sys.stderr, flush=True)


def parse_command(argv: Sequence[str], name: str, description: str, presets: Path) -> Command:
    """What the command line means, with the file named by --preset or --config under it.

    Raises:
        UserError: a value, a key or a combination that can't work.
        SystemExit: 2 on a malformed command line, 0 on ``--help``; the message has been printed.
    """
    values, listed, where = _read_file(argv, presets)
    default = _with_values(Flags(), values, where)
    flags = _typed_decay_wins(_parse(argv, name, description, default), default)
    check_flags(flags)
    stages = resolve_stages(flags, listed, where)
    _refuse_without_effect(flags, default, stages, listed, where)
    return Command(flags, stages, dump(flags, listed))


def _typed_decay_wins(flags: Flags, default: Flags) -> Flags:
    """A typed --layer-decay takes the place of a preset's --lr-ratio, and the other way round."""
    now, before = flags.optimisation, default.optimisation
    if now.layer_decay != before.layer_decay and now.lr_ratio == before.lr_ratio:
        now = dataclasses.replace(now, lr_ratio=None)
    elif now.lr_ratio != before.lr_ratio and now.layer_decay == before.layer_decay:
        now = dataclasses.replace(now, layer_decay=None)
    return dataclasses.replace(flags, optimisation=now)


def _parse(argv: Sequence[str], name: str, description: str, default: Flags) -> Flags:
    import tyro

    return tyro.cli(
        Flags,
        args=list(argv),
        default=default,
        prog=name,
        description=description,
        config=(tyro.conf.OmitArgPrefixes,),
        console_outputs=os.environ.get("RANK", "0") == "0",
    )


def _read_file(argv: Sequence[str], presets: Path) -> tuple[dict[str, Any], list[Any] | None, str]:
    """The YAML file that supplies defaults: --config, --preset, or for the demo without either its own preset."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--config", "--preset", "--data"):
        early.add_argument(flag)
    try:
        given, _ = early.parse_known_args(list(argv))
    except argparse.ArgumentError:  # a flag without its value: the full parser says so
        return {}, None, ""
    if given.config and given.preset:
        raise UserError(f"--config {given.config} and --preset {given.preset} exclude each other; give one of the two.")
    if given.config:
        return _load_yaml(Path(given.config), "--config")
    if given.preset:
        return _load_yaml(_preset_path(given.preset, presets), "--preset")
    if given.data in (None, "demo"):
        return _load_yaml(presets / f"{DEMO_PRESET}.yaml", "--preset")
    return {}, None, ""


def _preset_path(preset: str, presets: Path) -> Path:
    if Path(preset).suffix in (".yaml", ".yml"):
        return Path(preset)
    names = sorted(path.stem for path in presets.glob("*.yaml"))
    if preset not in names:
        raise UserError(f"--preset {preset!r} is not known.{did_you_mean(preset, names)} Known: {', '.join(names)}.")
    return presets / f"{preset}.yaml"


def _load_yaml(path: Path, flag: str) -> tuple[dict[str, Any], list[Any] | None, str]:
    import yaml

    if not path.is_file():
        raise UserError(f"{flag} {path}: there is no such file.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except Exception as error:  # damaged values make PyYAML raise nearly every type
        raise UserError(f"{flag} {path} can't be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{flag} {path} must hold 'flag: value' lines; it holds {type(content).__name__}.")
    values = {str(key).replace("-", "_"): value for key, value in content.items()}
    return values, values.pop("stages", None), str(path)


def _with_values(flags: Flags, values: Mapping[str, Any], where: str) -> Flags:
    """*flags* with the flat *values* put into their groups."""
    groups = {group.name: getattr(flags, group.name) for group in dataclasses.fields(flags)}
    types = {name: field_types(type(content)) for name, content in groups.items()}
    known = {key: group for group, keys in types.items() for key in keys if key not in COMMAND_LINE_ONLY}
    changes: dict[str, dict[str, Any]] = {group: {} for group in groups}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{where} has the unknown key {key!r}.{did_you_mean(key, known)}")
        group = known[key]
        changes[group][key] = coerce(value, types[group][key], f"{where}, {key}")
    return Flags(**{group: dataclasses.replace(content, **changes[group]) for group, content in groups.items()})


def dump(flags: Flags, listed: list[Any] | None = None) -> str:
    """The flags as flat YAML, with the list of stages when there is one."""
    import yaml

    kept = {key: value for key, value in flat(flags).items() if key not in NOT_IN_CONFIG}
    return yaml.safe_dump(kept | ({"stages": listed} if listed else {}), sort_keys=False, allow_unicode=True)


def flat(flags: Flags) -> dict[str, Any]:
    """``{flag: value}`` without the groups."""
    return {key: value for group in vars(flags).values() for key, value in vars(group).items()}


def resolve_stages(flags: Flags, listed: list[Any] | None = None, where: str = "") -> tuple[Stage, ...]:
    """The stages that the flags mean, checked, with scaled learning rates.

    Raises:
        UserError: from `read_stages` and `check_stage`.
    """
    base = _base_stage(flags)
    if listed is not None:
        stages = read_stages(listed, base, where)
    else:
        staging = flags.staging
        stages = standard_stages(base, staging.freeze_epochs, staging.freeze_lr, staging.unfreeze)
    for stage in stages:
        check_stage(stage)
        if stage.batch_norm == "frozen" and flags.model.weights == "none":
            raise UserError(
                f"stage {stage.name!r}: --batch-norm frozen with --weights none: there are no statistics to keep. "
                "Use --batch-norm train."
            )
    scaling, lr_batch = flags.optimisation.lr_scaling, flags.optimisation.lr_batch
    return tuple(
        dataclasses.replace(stage, lr=scaled_lr(stage.lr, scaling, stage.batch_size, lr_batch)) for stage in stages
    )


def _base_stage(flags: Flags) -> Stage:
    values = flat(flags)
    given = {key: values[key] for key in field_types(Stage) if key in values}
    if flags.optimisation.layer_decay is None and flags.optimisation.lr_ratio is None:
        given["lr_ratio"] = 1.0 if flags.model.weights == "none" else 0.1
    if flags.staging.batch_norm == "auto":
        given["batch_norm"] = "train" if flags.model.weights == "none" else "frozen"
    return Stage(name="all", open="all", **given)


def check_flags(flags: Flags) -> None:
    """Refuse single values and combinations that can't work.

    Raises:
        UserError: names the flag, the value and the remedy.
    """
    values = flat(flags)

    def refuse(ok: bool, key: str, remedy: str) -> None:
        if not ok:
            raise UserError(f"--{key.replace('_', '-')} is {values[key]!r}; {remedy}.")

    def at_least(low: int, *keys: str) -> None:
        for key in keys:
            value = values[key]
            refuse(not isinstance(value, int) or value >= low, key, f"give a whole number from {low}")

    def share(*keys: str) -> None:
        for key in keys:
            refuse(values[key] is None or 0 <= values[key] < 1, key, "give a number in [0, 1)")

    at_least(0, "workers", "freeze_epochs", "epochs", "seed", "save_every")
    at_least(1, "limit_train", "limit_eval", "batch_size", "micro_batch", "lr_batch", "keep", "log_every", "threads")
    at_least(1, "max_steps")
    refuse(values["seed"] < 2**63, "seed", "give a whole number below 2^63")
    share("drop_rate", "drop_path_rate", "label_smoothing")
    crop = values["crop_pct"]
    refuse(crop is None or 0 < crop <= 1, "crop_pct", "give a share in (0, 1]")
    refuse(0 < values["val_fraction"] < 1, "val_fraction", "give a fraction between 0 and 1, for example 0.25")
    for key in ("lr", "freeze_lr"):
        refuse(math.isfinite(values[key]) and values[key] > 0, key, "give a learning rate above 0, for example 3e-4")
    refuse(0 <= values["clip_norm"] < math.inf, "clip_norm", "give a norm above 0, or 0 for off")
    for key in ("clip_value", "clip_agc"):
        refuse(values[key] is None or (math.isfinite(values[key]) and values[key] > 0), key, "give a number above 0")
    _check_combinations(flags)


def _refuse_without_effect(
    flags: Flags, default: Flags, stages: Sequence[Stage], listed: list[Any] | None, where: str
) -> None:
    """Refuse a flag that was typed for nothing, rather than ignore it."""
    values, before = flat(flags), flat(default)
    typed = [key for key in values if values[key] != before[key]]
    if listed is not None:
        own = {str(key).replace("-", "_") for stage in listed for key in stage} | set(ONLY_WITHOUT_STAGES)
        for key in typed:
            if key in own:
                flag = key.replace("_", "-")
                raise UserError(
                    f"--{flag} {values[key]}: the stages listed in {where} set that themselves. Copy the file, edit "
                    "its stages and give it as --preset."
                )
    for key, (switch, allowed) in NEEDS.items():
        chosen = sorted({str(getattr(stage, switch, values[switch])) for stage in stages})
        if key in typed and not set(chosen) & set(allowed):
            flag, other = key.replace("_", "-"), switch.replace("_", "-")
            raise UserError(
                f"--{flag} {values[key]} has no effect with --{other} {' and '.join(chosen)}. Drop it, or choose "
                f"--{other} {' or '.join(allowed)}."
            )


def _check_combinations(flags: Flags) -> None:
    optimisation, model, staging = flags.optimisation, flags.model, flags.staging
    if optimisation.layer_decay is not None and optimisation.lr_ratio is not None:
        raise UserError(
            f"--layer-decay {optimisation.layer_decay} and --lr-ratio {optimisation.lr_ratio} exclude each other: both "
            "set the learning rates of lower layers. Give one of the two."
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
    if staging.cache_features and not staging.freeze_epochs:
        raise UserError("--cache-features is for the head-only epochs, but --freeze-epochs is 0. Raise it.")
