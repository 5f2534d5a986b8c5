"""Something that was trained, opened again: a run, one of its checkpoints, or any folder in timm's format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from tuning import manifest
from tuning.coerce import as_key, read_yaml
from tuning.errors import UserError
from tuning.model_names import LOCAL, look_up
from tuning.models import ModelInfo, build
from tuning.run_folder import CONFIG, RunFolder
from tuning.summary import is_done

TIMM_CONFIG = "config.json"
CALIBRATION = "calibration"  # of config.json; timm ignores keys it doesn't know


@dataclass(frozen=True)
class Finished:
    """A trained model and what is known of it.

    Attributes:
        model: the raw timm model in float32 and evaluation mode, on the CPU.
        info: how it sees images; its `weights` say which were taken.
        classes: names of its outputs, in their order.
        run: folder of the run it came from, where it came from one.
        config: flags of that run; empty without one.
        temperature: to divide the logits by before the softmax; 1 where none was stored with the model.
    """

    model: nn.Module
    info: ModelInfo
    classes: tuple[str, ...]
    run: Path | None
    config: Mapping[str, Any]
    temperature: float


def open_finished(run: str) -> Finished:
    """Open what ``--run`` names.

    Args:
        run: the folder of a finished run (its ``model/`` is taken), a checkpoint of one (its averaged weights where it
            has some), or a folder that ``timm.create_model("local-dir:...", pretrained=True)`` loads.

    Raises:
        UserError: none of these; a run that is not finished or kept no model; a model without names of its classes.
    """
    folder = Path(run).expanduser()
    if folder.is_file():
        raise UserError(f"--run {run} is a file. Give the folder of a run, of a checkpoint, or a timm folder.")
    if not folder.is_dir():
        raise UserError(f"--run {run}: there is no such folder.")
    if folder.resolve().parent.name == "checkpoints" and folder.resolve().name.startswith("step-"):
        return _open_checkpoint(folder)
    if (folder / CONFIG).exists():
        _refuse_unfinished(folder)
        return _open_model(folder / "model", folder)
    if (folder / TIMM_CONFIG).exists():
        above = folder.resolve().parent
        return _open_model(folder, above if (above / CONFIG).exists() else None)
    raise UserError(
        f"--run {run} is neither a run (no {CONFIG}), nor a checkpoint of one, nor a timm folder (no {TIMM_CONFIG})."
    )


def _refuse_unfinished(run: Path) -> None:
    model = run / "model"
    if not (model / TIMM_CONFIG).exists():
        raise UserError(
            f"--run {run} holds no model: a run of recipes/finetune.py writes model/ at its first evaluation. Give "
            "another run, or finish this one with --resume auto."
        )
    if not is_done(RunFolder(run)):
        raise UserError(
            f"--run {run} is not finished. Finish it with --resume auto, or take what it has so far: {model} for the "
            "best weights, or one of its checkpoints."
        )


def _open_model(folder: Path, run: Path | None) -> Finished:
    """A timm folder; *run* is that of the flags, where there is one."""
    content = _read_config(folder)
    classes = _class_names(folder, content)
    model, info = build(f"{LOCAL}{folder}", classes=classes)
    config = read_yaml(run / CONFIG, str(run / CONFIG)) if run else {}
    return Finished(model.eval(), info, classes, run, config, _temperature(folder, content))


def _open_checkpoint(folder: Path) -> Finished:
    """Weights of a checkpoint, in the model that its run describes; without a stored temperature."""
    run = folder.resolve().parent.parent
    found = manifest.read(folder)
    if not (run / "model" / TIMM_CONFIG).exists():
        raise UserError(
            f"--run {folder}: the run it belongs to has no {run / 'model' / TIMM_CONFIG}, which names the classes. A "
            "run writes it at its first evaluation."
        )
    config = read_yaml(run / CONFIG, str(run / CONFIG))
    classes = _class_names(run / "model", _read_config(run / "model"))
    averaged = (folder / manifest.EMA).exists()
    file = folder / (manifest.EMA if averaged else manifest.WEIGHTS)
    model, info = build(f"{LOCAL}{run / 'model'}", classes=classes, weights=str(file))
    size = _size_of_stage(config, found.progress.stage) or info.input_size
    said = f"the {'averaged weights (EMA)' if averaged else 'weights'} of {folder}"
    return Finished(model.eval(), replace(info, weights=said, input_size=size), classes, run, config, 1.0)


def _size_of_stage(config: Mapping[str, Any], number: int) -> int | None:
    """Side of the input in the stage of a checkpoint, in pixels; None where all stages of the run have the same."""
    stages = [{as_key(key): value for key, value in stage.items()} for stage in config.get("stages") or ()]
    sizes = [stage.get("image_size") for stage in stages]
    if not any(sizes):
        return None
    own = config.get("image_size") or look_up(str(config["model"]))[1]["input_size"][-1]
    return int(sizes[min(number, len(sizes) - 1)] or own)


def _read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        UserError: it can't be read as one.
    """
    try:
        content = json.loads((folder / TIMM_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / TIMM_CONFIG} can't be read as JSON ({error}). Export the model anew.") from None
    if not isinstance(content, dict):
        raise UserError(f"{folder / TIMM_CONFIG} is not the description of a timm model.")
    return content


def _class_names(folder: Path, content: Mapping[str, Any]) -> tuple[str, ...]:
    cfg = content.get("pretrained_cfg")
    names = content.get("label_names") or (cfg.get("label_names") if isinstance(cfg, dict) else None)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len({*names}) < len(names):
        raise UserError(
            f"{folder / TIMM_CONFIG} does not name the classes of the model. Add "
            '"label_names": [...], one name an output, in their order.'
        )
    outputs = content.get("num_classes", len(names))
    if outputs != len(names):
        raise UserError(f"{folder / TIMM_CONFIG} names {len(names)} classes for {outputs} outputs of the model.")
    return tuple(names)


def _temperature(folder: Path, content: Mapping[str, Any]) -> float:
    stored = content.get(CALIBRATION)
    if stored is None:
        return 1.0
    value = stored.get("temperature") if isinstance(stored, dict) else None
    if not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise UserError(f"{folder / TIMM_CONFIG}: the temperature in {CALIBRATION!r} is {value!r}, not above 0.")
    return float(value)
