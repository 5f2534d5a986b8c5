"""The stages of a run: those that flags mean, and those of a YAML list."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tuning.cli.coerce import WholeNumbers, as_key, coerce, field_types, shown
from tuning.errors import UserError, did_you_mean
from tuning.stages import PARTS, Stage

GRADUAL_PARTS = 4
# lr: auto, what follows from the stage before, and what belongs to the last stage.
NOT_KEYS = ("find_lr", "new_optimizer", "swa_epochs", "swa_lr")


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
    types["train_sizes"] = WholeNumbers
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
    if "feature_views" in given and not given.get("cache_features"):
        raise UserError(f"{where} has feature_views without cache_features: true. Add that, or drop it.")
    if given.get("layer_decay") is not None and "lr_ratio" not in given:
        given["lr_ratio"] = None
    if given.get("lr_ratio") is not None and "layer_decay" not in given:
        given["layer_decay"] = None
    for key, other in (("train_sizes", "multi_scale"), ("multi_scale", "train_sizes")):
        if given.get(key) and other not in given:
            given[other] = () if other == "train_sizes" else 0.0
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
        unfreeze: ``all``, ``norms``, ``norms-biases``, or ``gradual`` = four equal parts of the depth (fewer when there
            are fewer epochs), opened from the top (Howard & Ruder 2018).
    """
    stages = []
    if freeze_epochs:
        head = dataclasses.replace(base, name="head", open="head", epochs=freeze_epochs)
        stages.append(dataclasses.replace(head, lr=freeze_lr, find_lr=False))
    if base.epochs and unfreeze in ("all", *PARTS):
        stages.append(dataclasses.replace(base, name=unfreeze, open=unfreeze, cache_features=False))
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
