"""What a typed model name stands for: a timm name, with or without the tag of its weights, or a folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
from timm.models import split_model_name_tag

from tuning.errors import UserError, did_you_mean

LOCAL = "local-dir:"


def look_up(name: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(architecture, timm's configuration of the weights, saved model arguments) of a typed model name.

    Raises UserError, with the nearest known name, for a name, a tag or a folder that timm does not know.
    """
    if name.startswith(LOCAL):
        config = _read_config(Path(name.removeprefix(LOCAL)))
        _check_registered(config["architecture"], f"the architecture in {name}")
        return config["architecture"], config.get("pretrained_cfg", config), dict(config.get("model_args") or {})
    if "/" in name or ":" in name:
        raise UserError(f"--model {name!r} is no timm name. A folder is written local-dir:PATH.")
    architecture, tag = split_model_name_tag(name)
    _check_registered(architecture, "--model")
    known = [other.partition(".")[2] for other in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in known:
        raise UserError(
            f"--model {name!r}: {architecture} has no weights called {tag!r}.{did_you_mean(tag, known)} "
            f"Known: {', '.join(known) or 'none'}."
        )
    cfg = timm.get_pretrained_cfg(name)
    return architecture, asdict(cfg) if cfg else {}, {}


def _check_registered(architecture: str, what: str) -> None:
    if not timm.is_model(architecture):
        raise UserError(
            f"{what} {architecture!r} is not known to timm.{did_you_mean(architecture, timm.list_models())}"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["architecture"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{str(folder)!r} is no model folder: a config.json naming its architecture cannot be read there."
        ) from error
    return config


def folder_of(name: str) -> Path | None:
    """The folder in ``local-dir:PATH``, or None for a timm name."""
    return Path(name.removeprefix(LOCAL)) if name.startswith(LOCAL) else None
