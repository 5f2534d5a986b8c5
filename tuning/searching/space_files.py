"""Files of search spaces in the format of W&B sweeps, read and checked. Imports no torch and no wandb.

The format: https://docs.wandb.ai/guides/sweeps/sweep-config-keys. One file serves W&B's agents and the local search,
so what the local search would not do is refused rather than passed over.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tuning.cli.coerce import as_key, named_file, read_yaml, shown
from tuning.cli.command_line import NOT_IN_CONFIG
from tuning.errors import UserError, did_you_mean
from tuning.flags import Flags
from tuning.searching.spaces import ARGS, DEFAULT_COMMAND, Choice, Parameter, Range, Space, Stopper
from tuning.tracking.summary import HIGHER_IS_BETTER

KEYS = ("program", "method", "metric", "parameters", "early_terminate", "command", "run_cap")
FOR_WANDB = ("name", "description", "project", "entity")  # which the local search has no use for
METHODS = ("grid", "random", "bayes")
RANGES = ("uniform", "int_uniform", "q_uniform", "log_uniform_values")
DISTRIBUTIONS = ("constant", "categorical", *RANGES)
STOPPERS = {"hyperband": ("type", "min_iter", "eta"), "median": ("type", "min_iter")}


def read_space(space: str, folder: Path) -> Space:
    """The search space in a file, or by its name in *folder*.

    Raises:
        UserError: no such file, or something in it that can't be searched; names the nearest known word.
    """
    path = named_file(space, folder, "--space")
    content = read_yaml(path, f"--space {space}")
    where = str(path)
    _refuse_unknown(content, (*KEYS, *FOR_WANDB), where)
    program = content.get("program", "recipes/finetune.py")
    if not isinstance(program, str) or Path(program).name != "finetune.py":
        raise UserError(f"{where}: program is {shown(program)}; the local search runs recipes/finetune.py.")
    method = content.get("method")
    if method not in METHODS:
        raise UserError(f"{where}: method is {shown(method)}; give {', '.join(METHODS)}.{_near(method, METHODS)}")
    run_cap = content.get("run_cap")
    return Space(
        where,
        method,
        _metric(content.get("metric"), where),
        _parameters(content.get("parameters"), method, where),
        _command(content.get("command", list(DEFAULT_COMMAND)), where),
        _stopper(content.get("early_terminate"), where),
        None if run_cap is None else _count(run_cap, f"{where}, run_cap"),
    )


def _metric(metric: Any, where: str) -> str:
    content = _mapping(metric, f"{where}, metric")
    _refuse_unknown(content, ("name", "goal"), f"{where}, metric")
    known = [f"{whose}/{name}" for whose in ("eval", "eval_ema") for name in HIGHER_IS_BETTER]
    name, goal = content.get("name"), content.get("goal", "minimize")
    if name not in known:
        raise UserError(f"{where}: metric is {shown(name)}; give one of {', '.join(known)}.{_near(name, known)}")
    right = "maximize" if HIGHER_IS_BETTER[name.rpartition("/")[2]] else "minimize"
    if goal != right:
        raise UserError(f"{where}: goal of {name} is {shown(goal)}; it must be {right}.")
    return str(name)


def _parameters(listed: Any, method: str, where: str) -> dict[str, Parameter]:
    flags = [key for group in vars(Flags()).values() for key in vars(group) if key not in NOT_IN_CONFIG]
    found: dict[str, Parameter] = {}
    for key, content in _mapping(listed, f"{where}, parameters").items():
        name, place = as_key(key), f"{where}, parameter {as_key(key)}"
        if name not in flags:
            raise UserError(f"{place}: there is no such flag to search.{did_you_mean(name, flags)}")
        found[name] = _parameter(_mapping(content, place), place)
        if method == "grid" and isinstance(found[name], Range):
            raise UserError(f"{place}: a grid needs values, not a range.")
    return found


def _parameter(content: Mapping[str, Any], place: str) -> Parameter:
    _refuse_unknown(content, ("value", "values", "min", "max", "q", "distribution"), place)
    given = sorted({"value", "values", "min"} & content.keys())
    if len(given) != 1 or ("max" in content) != ("min" in content):
        raise UserError(f"{place}: give one of value, values, or min with max; it has {', '.join(content) or 'none'}.")
    kind = content.get("distribution", {"value": "constant", "values": "categorical"}.get(given[0]))
    if kind is not None and kind not in DISTRIBUTIONS:
        known = ", ".join(DISTRIBUTIONS)
        raise UserError(
            f"{place}: distribution {shown(kind)} is none of the local search's: {known}.{_near(kind, DISTRIBUTIONS)}"
        )
    if kind is not None and (kind in RANGES) != (given[0] == "min"):
        raise UserError(f"{place}: distribution {kind} does not go with {given[0]}.")
    if ("q" in content) != (kind == "q_uniform"):
        raise UserError(f"{place}: q goes with distribution q_uniform, and that with q.")
    if given[0] == "min":
        return _range(content, kind, place)
    values = [content["value"]] if given[0] == "value" else content["values"]
    if not isinstance(values, list) or not values or not all(isinstance(v, str | int | float | None) for v in values):
        raise UserError(f"{place}: {given[0]} is {shown(content[given[0]])}; give numbers, texts, true, false or null.")
    return Choice(tuple(map(_number_in_text, values)))


def _range(content: Mapping[str, Any], kind: str | None, place: str) -> Range:
    bounds = {key: _number_in_text(content[key]) for key in ("min", "max", "q") if key in content}
    for key, value in bounds.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{place}: {key} is {shown(value)}; give a number.")
    low, high, whole = bounds["min"], bounds["max"], {type(bounds["min"]), type(bounds["max"])} == {int}
    if not low < high:
        raise UserError(f"{place}: min {low} is not below max {high}.")
    if kind == "log_uniform_values" and low <= 0:
        raise UserError(f"{place}: min {low} has no logarithm; give a number above 0.")
    if kind == "int_uniform" and not whole:
        raise UserError(f"{place}: int_uniform needs whole numbers, it has {low} and {high}.")
    if kind is None and not whole and int in {type(low), type(high)}:
        raise UserError(f"{place}: give both bounds as whole numbers or both with a decimal point; W&B wants it so.")
    if kind == "q_uniform" and bounds["q"] <= 0:
        raise UserError(f"{place}: q is {bounds['q']}; give a number above 0.")
    if kind == "int_uniform" or (kind is None and whole):
        return Range(low, high)
    return Range(float(low), float(high), kind == "log_uniform_values", bounds.get("q"))


def _number_in_text(value: Any) -> Any:
    """YAML reads ``1e-3`` as a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _command(words: Any, where: str) -> tuple[str, ...]:
    if not isinstance(words, list):
        raise UserError(f"{where}: command is {shown(words)}; give a list of words.")
    words = [str(word) for word in words]
    if words.count("${program}") != 1 or sum(words.count(args) for args in ARGS) != 1:
        raise UserError(f"{where}: command needs ${{program}} once, and once {' or '.join(ARGS)}.")
    macros = ("${env}", "${interpreter}", "${program}", *ARGS)
    for word in words:
        if "${" in word and word not in macros and "${envvar:" not in word:
            raise UserError(f"{where}: command has {word}, which the local search doesn't know.{_near(word, macros)}")
    return tuple(words)


def _stopper(content: Any, where: str) -> Stopper | None:
    if content is None:
        return None
    place = f"{where}, early_terminate"
    values = _mapping(content, place)
    kind = values.get("type")
    if kind not in STOPPERS:
        raise UserError(f"{place}: type is {shown(kind)}; give {' or '.join(STOPPERS)}.{_near(kind, STOPPERS)}")
    _refuse_unknown(values, STOPPERS[kind], place)
    counts = {key: _count(values[key], f"{place}, {key}") for key in ("min_iter", "eta") if key in values}
    if "min_iter" not in counts or counts.get("eta", 3) < 2:
        raise UserError(f"{place}: give min_iter, the evaluation to judge at first, and an eta from 2.")
    return Stopper(kind, counts["min_iter"], counts.get("eta", 3))


def _count(value: Any, place: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{place} is {shown(value)}; give a whole number from 1.")
    return value


def _mapping(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise UserError(f"{place}: expected 'key: value' lines, got {shown(value)}.")
    return {key if isinstance(key, str) else shown(key): content for key, content in value.items()}


def _refuse_unknown(content: Iterable[str], known: Iterable[str], place: str) -> None:
    for key in content:
        if key not in known:
            raise UserError(f"{place}: the local search has no use for the key {key!r}.{did_you_mean(key, known)}")


def _near(value: Any, known: Iterable[str]) -> str:
    return did_you_mean(value, known) if isinstance(value, str) else ""
