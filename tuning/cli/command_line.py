"""From what the user typed to checked flags and stages, or one clear message. Imports no torch."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from tuning.cli import launcher
from tuning.cli.checks import check_flags, flat
from tuning.cli.coerce import as_key, coerce, field_types, named_file, read_yaml, shown
from tuning.cli.effects import refuse_sampling, refuse_without_effect
from tuning.cli.ending import allow_any_letters, explained, print_yaml, rank, recorded, report, say, say_stopped
from tuning.cli.flag_parser import parse_flags, refuse_names_of_others
from tuning.cli.optimizer_defaults import defaults_of, resolved, resolved_stages
from tuning.cli.run_defaults import OPENING, data_of_run
from tuning.errors import UserError, did_you_mean
from tuning.flags import Flags
from tuning.safety import interrupts
from tuning.safety.echoes import RESUME, ProcessLost
from tuning.sizes import scaled_lr
from tuning.stage_checks import check_stage
from tuning.stage_lists import read_stages, standard_stages
from tuning.stages import Stage

# Where a run goes and whether it runs is not part of what it is: config.yaml leaves these out.
NOT_IN_CONFIG = (
    "run",
    "metrics",
    "push",
    "push_wandb",
    "ensemble",
    "images",
    "space",
    "trials",
    "launcher",
    "output",
    "run_name",
    "resume",
    "stop_after",
    "max_minutes",
    "dry_run",
    "preset",
    "config",
    "print_config",
)
COMMAND_LINE_ONLY = ("preset", "config", "print_config")
DEMO_PRESET = "demo"
MINUTES_PRESET = "quick"


@dataclass(frozen=True)
class Command:
    """What the user asked for, checked.

    Attributes:
        flags: every flag.
        stages: the stages that the flags mean.
        config: both as YAML text, the content of ``config.yaml``.
        asked: the flags before what follows from the optimizer was filled in.
        listed, where: the list of stages in a file, if there is one, and the file's name.
        typed: names of the flags on the command line.
    """

    flags: Flags
    stages: tuple[Stage, ...]
    config: str
    asked: Flags
    listed: list[Any] | None
    where: str
    typed: frozenset[str] = frozenset()


Recipe = Callable[[Command], None]


def run_recipe(recipe: Recipe, name: str, presets: Path) -> NoReturn:
    """Parse the command line, call the recipe and end the process.

    Exit status: 0 done; 2 the user must change something (message on stderr, no traceback); 75 stopped on request and
    resumable; 1 a defect (traceback), or another process failed (message). Under a launcher with ``--max-restarts`` a
    stop on request ends with 0 instead, because the launcher would take 75 for a failure and start the run again.

    Args:
        recipe: does the work; its docstring is the description in ``--help``.
        name: shown in ``--help``, such as ``recipes/finetune.py``.
        presets: folder of the presets that ``--preset NAME`` can name.
    """
    interrupts.listen()
    launcher.end_with_launcher()
    allow_any_letters()
    try:
        command = parse_command(sys.argv[1:], name, recipe.__doc__ or "", presets)
        if command.flags.run.print_config:
            print_yaml(command.config)
        else:
            recorded(explained(partial(recipe, command), command.flags.run.output))()
    except UserError as error:
        report(error)
        sys.exit(2)
    except ProcessLost as error:
        say(f"error (process {rank()}): {error}")
        sys.exit(1)
    except KeyboardInterrupt as error:
        say_stopped(error, "Start it again." if name in OPENING else RESUME)
        sys.exit(0 if launcher.restarts() else 75)
    sys.exit(0)


def parse_command(argv: Sequence[str], name: str, description: str, presets: Path) -> Command:
    """What the command line means, with the file named by --preset or --config under it.

    Raises:
        UserError: a value, a key or a combination that can't work.
        SystemExit: 2 on a malformed command line, 0 on ``--help``; the message has been printed.
    """
    argv = _joined(argv)
    refuse_names_of_others(argv)
    values, listed, where = _read_file(argv, presets, name)
    default = with_values(Flags(), values, where)
    flags = _typed_decay_wins(parse_flags(argv, name, description, default), default)
    check_flags(flags)
    stages = resolve_stages(flags, listed, where)
    refuse_without_effect(flags, default, stages, listed, where, name)
    typed = frozenset(as_key(word[2:].partition("=")[0]) for word in argv if word.startswith("--"))
    return Command(resolved(flags), stages, dump(flags, listed), flags, listed, where, typed)


def _joined(argv: Sequence[str]) -> list[str]:
    """``--launcher "--cpu"`` in one word: alone, the parser takes what begins with ``--`` for the next flag."""
    words: list[str] = []
    for word in argv:
        if words and words[-1] == "--launcher":
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _typed_decay_wins(flags: Flags, default: Flags) -> Flags:
    """A typed --layer-decay takes the place of a preset's --lr-ratio, and the other way round."""
    now, before = flags.optimisation, default.optimisation
    if now.layer_decay != before.layer_decay and now.lr_ratio == before.lr_ratio:
        now = dataclasses.replace(now, lr_ratio=None)
    elif now.lr_ratio != before.lr_ratio and now.layer_decay == before.layer_decay:
        now = dataclasses.replace(now, layer_decay=None)
    return dataclasses.replace(flags, optimisation=now)


def _read_file(argv: Sequence[str], presets: Path, recipe: str) -> tuple[dict[str, Any], list[Any] | None, str]:
    """The YAML file that supplies defaults: --config, --preset, or without either the demo's or that of --max-minutes.

    Recipes that open a run take its data flags.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--config", "--preset", "--data", "--run", "--weights"):
        early.add_argument(flag)
    early.add_argument("--max-minutes", "--max_minutes")
    try:
        given, _ = early.parse_known_args(list(argv))
    except argparse.ArgumentError:  # a flag without its value: the full parser says so
        return {}, None, ""
    if given.config and given.preset:
        raise UserError(f"--config {given.config} and --preset {given.preset} exclude each other; give one of the two.")
    if given.config:
        return _load_yaml(Path(given.config), "--config")
    if given.preset:
        return _load_yaml(named_file(given.preset, presets, "--preset"), "--preset")
    if recipe in OPENING:
        values, where = data_of_run(Path(given.run), given.data) if given.run else ({}, "")
        return values, None, where
    if given.data is None and not {"-h", "--help"}.isdisjoint(argv):
        return {}, None, ""  # help is asked for one's own data
    if given.data in (None, "demo"):
        return _load_yaml(presets / f"{DEMO_PRESET}.yaml", "--preset")
    if given.max_minutes and given.weights != "none" and recipe == "recipes/finetune.py":
        return _load_yaml(presets / f"{MINUTES_PRESET}.yaml", "--preset")
    return {}, None, ""


def _load_yaml(path: Path, flag: str) -> tuple[dict[str, Any], list[Any] | None, str]:
    values = read_yaml(path, f"{flag} {path}")
    return values, values.pop("stages", None), str(path)


def with_values(flags: Flags, values: Mapping[str, Any], where: str) -> Flags:
    """*flags* with the flat *values* put into their groups."""
    groups = {group.name: getattr(flags, group.name) for group in dataclasses.fields(flags)}
    types = {name: field_types(type(content)) for name, content in groups.items()}
    known = {key: group for group, keys in types.items() for key in keys if key not in COMMAND_LINE_ONLY}
    changes: dict[str, dict[str, Any]] = {group: {} for group in groups}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{where} has the unknown key {shown(key)}.{did_you_mean(key, known)}")
        group = known[key]
        changes[group][key] = coerce(value, types[group][key], f"{where}, {key}")
    return Flags(**{group: dataclasses.replace(content, **changes[group]) for group, content in groups.items()})


def with_flags(command: Command, values: Mapping[str, Any], listed: list[Any] | None, where: str) -> Command:
    """*command* as if the flags in *values* had been typed, with *listed* as its list of stages.

    Args:
        where: what the values are from, for messages.
    """
    flags = with_values(command.asked, values, where)
    stages = resolve_stages(flags, listed, command.where)
    return dataclasses.replace(
        command, flags=resolved(flags), stages=stages, config=dump(flags, listed), asked=flags, listed=listed
    )


def dump(flags: Flags, listed: list[Any] | None = None) -> str:
    """The flags as flat YAML, with the list of stages when there is one, and with what follows from the optimizer."""
    import yaml

    values = flat(resolved(flags)).items()
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values}
    kept = {key: value for key, value in plain.items() if key not in NOT_IN_CONFIG}
    kept |= {"stages": resolved_stages(listed, flags)} if listed else {}
    text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    if {"\x85", "\u2028", "\u2029"}.isdisjoint(text):
        return text
    return yaml.safe_dump(kept, sort_keys=False)  # as they are, these would be read back as spaces


def resolve_stages(flags: Flags, listed: list[Any] | None = None, where: str = "") -> tuple[Stage, ...]:
    """The stages that the flags mean, checked, with scaled learning rates.

    Raises:
        UserError: from `read_stages` and `check_stage`.
    """
    listed, flags = resolved_stages(listed, flags), resolved(flags)
    base = _base_stage(flags)
    if listed is not None:
        stages = read_stages(listed, base, where)
    else:
        staging = flags.staging
        assert staging.freeze_lr is not None
        stages = standard_stages(base, staging.freeze_epochs, staging.freeze_lr, staging.unfreeze)
    stages = [*(dataclasses.replace(stage, swa_epochs=0, swa_lr=None) for stage in stages[:-1]), stages[-1]]
    for stage in stages:
        check_stage(stage)
        refuse_sampling(stage, flags)
        if stage.batch_norm == "frozen" and flags.model.weights == "none":
            raise UserError(
                f"stage {stage.name!r}: --batch-norm frozen with --weights none: there are no statistics to keep. "
                "Use --batch-norm train."
            )
    scaling, lr_batch = flags.optimisation.lr_scaling, flags.optimisation.lr_batch
    scaled = (scaled_lr(stage.lr, scaling, stage.batch_size, lr_batch) for stage in stages)
    anew = [False, *(not stage.keeps_optimizer_of(before) for before, stage in itertools.pairwise(stages))]
    return tuple(
        dataclasses.replace(stage, lr=lr, new_optimizer=new)
        for stage, lr, new in zip(stages, scaled, anew, strict=True)
    )


def _base_stage(flags: Flags) -> Stage:
    values = flat(flags)
    given = {key: values[key] for key in field_types(Stage) if key in values}
    if flags.optimisation.layer_decay is None and flags.optimisation.lr_ratio is None:
        given["lr_ratio"] = 1.0 if flags.model.weights == "none" else 0.1
    if flags.optimisation.lr == "auto":
        given |= {"lr": defaults_of(flags.optimisation.optimizer).lr, "find_lr": True}
    if flags.staging.batch_norm == "auto":
        given["batch_norm"] = "train" if flags.model.weights == "none" else "frozen"
    return Stage(name="all", open="all", **given)
