"""What is known of the licences of data and starting weights; nothing is ever guessed."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm

from tuning.models.names import LOCAL
from tuning.tracking.run_folder import CONFIG

UNKNOWN = "unknown"
DEMO_PACKAGE = "elpv-dataset"
DEMO_LICENCE = "CC-BY-NC-SA-4.0 (the photos; not for commercial use)"


def data_licence(data: str | None) -> str:
    """Licence of what ``--data`` named: that of the demo, else unknown."""
    if data != "demo":
        return UNKNOWN
    try:
        metadata = importlib.metadata.metadata(DEMO_PACKAGE).json
    except importlib.metadata.PackageNotFoundError:
        return DEMO_LICENCE
    stated = metadata.get("license_expression")
    return f"{DEMO_LICENCE}; {DEMO_PACKAGE} states {stated}" if stated else DEMO_LICENCE


def weights_licence(config: Mapping[str, Any]) -> str:
    """Licence of the weights that a run started from, by the flags in its ``config.yaml``."""
    model, weights = config.get("model"), config.get("weights")
    if weights == "none":
        return "none: it started from random values"
    if not isinstance(model, str) or weights != "pretrained":
        return UNKNOWN
    if model.startswith(LOCAL):
        return _of_folder(Path(model.removeprefix(LOCAL)))
    cfg = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    if cfg is None or not cfg.license:
        return UNKNOWN
    return f"{cfg.license} (as timm {timm.__version__} states for {cfg.architecture}{'.' + cfg.tag if cfg.tag else ''})"


def _of_folder(folder: Path) -> str:
    """That which a timm folder states; a folder of a run repeats what its own start was under, so it does not count."""
    if (folder.parent / CONFIG).exists():
        return UNKNOWN
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stated = content["pretrained_cfg"]["license"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return UNKNOWN
    return f"{stated} (as {folder.name}/config.json states)" if isinstance(stated, str) else UNKNOWN


def base_model(config: Mapping[str, Any]) -> str | None:
    """Repository on the hub of the weights that a run started from, where timm names one."""
    model = config.get("model")
    if config.get("weights") != "pretrained" or not isinstance(model, str) or not timm.is_model(model):
        return None
    cfg = timm.get_pretrained_cfg(model)
    name = cfg.hf_hub_id if cfg else None
    return name.partition("@")[0] if name else None
