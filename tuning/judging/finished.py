"""Something that was trained, opened again: a run, one of its checkpoints, or any folder in timm's format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from torch import nn

from tuning.cli.coerce import as_key, read_yaml
from tuning.cli.run_defaults import run_of
from tuning.errors import UserError
from tuning.models.build import ModelInfo, build
from tuning.models.names import LOCAL, look_up
from tuning.safety import manifest
from tuning.tracking.run_folder import CONFIG, RunFolder
from tuning.tracking.summary import is_done

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
        fitted_on: the images that a stored temperature was fitted on.
    """

    model: nn.Module
    info: ModelInfo
    classes: tuple[str, ...]
    run: Path | None
    config: Mapping[str, Any]
    temperature: float
    fitted_on: str = ""


def open_finished(run: str, image_size: int | None = None, crop_pct: float | None = None) -> Finished:
    """Open what ``--run`` names.

    Args:
        run: the folder of a finished run (its ``model/`` is taken), a checkpoint of one (its averaged weights where it
            has some), or a folder that ``timm.create_model("local-dir:...", pretrained=True)`` loads.
        image_size: pixels, in place of the model's own.
        crop_pct: in place of the model's own.

    Raises:
        UserError: none of these; a run that is not finished or kept no model; a model without names of its classes.
    """
    folder = Path(run).expanduser()
    if folder.is_file():
        raise UserError(f"--run {run} is a file. Give the folder of a run, of a checkpoint, or a timm folder.")
    if not folder.is_dir():
        raise UserError(f"--run {run}: there is no such folder.")
    if folder.resolve().parent.name == "checkpoints" and folder.resolve().name.startswith("step-"):
        return _open_checkpoint(folder, image_size, crop_pct)
    if (folder / CONFIG).exists():
        _refuse_unfinished(folder)
        return _open_model(folder / "model", folder, image_size, crop_pct)
    if (folder / TIMM_CONFIG).exists():
        return _open_model(folder, run_of(folder), image_size, crop_pct)
    raise UserError(
        f"--run {run} is neither a run (no {CONFIG}), nor a checkpoint of one, nor a timm folder (no {TIMM_CONFIG})."
    )


def open_named(
    name: str, weights: str, classes: Sequence[str] | None, image_size: int | None, crop_pct: float | None
) -> Finished:
    """Open any timm model with weights that classify already.

    Its classes are those of ``local-dir:PATH``, or ImageNet's (WordNet ids, as its folders are called); with a weight
    file, or another number of outputs, those of the data in their order.

    Args:
        name, weights: ``--model`` and ``--weights``.
        classes: of the data; None where it has none.

    Raises:
        UserError: from `build`; weights that don't come with a head for these classes, or without their names.
    """
    if name.startswith(LOCAL):
        return open_finished(name.removeprefix(LOCAL), image_size, crop_pct)
    if weights == "none":
        raise UserError("--weights none: there is nothing to judge in random weights. Give --weights or --run.")
    own = int(look_up(name)[1].get("num_classes") or 0) if weights == "pretrained" else 0
    subset = infer_imagenet_subset({"num_classes": own}) if own else None
    if subset:
        known = ImageNetInfo(subset)
        classes = [known.index_to_label_name(number) for number in range(own)]
    if classes is None:
        raise UserError(
            f"--model {name} --weights {weights}: the names of its classes are not known. Give --run a timm folder "
            f'whose {TIMM_CONFIG} has them as "label_names".'
        )
    model, info = build(name, classes=classes, weights=weights, image_size=image_size, crop_pct=crop_pct)
    if "with a new head of" in info.weights:
        raise UserError(
            f"--model {name}: {info.weights} would be judged, because they come without a head for these "
            f"{len(classes)} classes. Fine-tune it first, and give the run as --run."
        )
    return Finished(model.eval(), info, tuple(classes), None, {}, 1.0)


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


def _open_model(folder: Path, run: Path | None, image_size: int | None, crop_pct: float | None) -> Finished:
    """A timm folder; *run* is that of the flags, where there is one."""
    content = _read_config(folder)
    classes = _class_names(folder, content)
    model, info = build(f"{LOCAL}{folder}", classes=classes, image_size=image_size, crop_pct=crop_pct)
    config = read_yaml(run / CONFIG, str(run / CONFIG)) if run else {}
    temperature, fitted_on = _temperature(folder, content)
    return Finished(model.eval(), info, classes, run, config, temperature, fitted_on)


def _open_checkpoint(folder: Path, image_size: int | None, crop_pct: float | None) -> Finished:
    """Weights of a checkpoint, in the model that its run describes; without a stored temperature."""
    run = folder.resolve().parent.parent
    manifest.read(folder)
    if not (run / "model" / TIMM_CONFIG).exists():
        raise UserError(
            f"--run {folder}: the run it belongs to has no {run / 'model' / TIMM_CONFIG}, which names the classes. A "
            "run writes it at its first evaluation."
        )
    config = read_yaml(run / CONFIG, str(run / CONFIG))
    classes = _class_names(run / "model", _read_config(run / "model"))
    averaged = (folder / manifest.EMA).exists()
    file = folder / (manifest.EMA if averaged else manifest.WEIGHTS)
    name = f"{LOCAL}{run / 'model'}"
    model, info = build(name, classes=classes, weights=str(file), image_size=image_size, crop_pct=crop_pct)
    size = image_size or _final_size(config) or info.input_size
    said = f"the {'averaged weights (EMA)' if averaged else 'weights'} of {folder}"
    return Finished(model.eval(), replace(info, weights=said, input_size=size), classes, run, config, 1.0)


def _final_size(config: Mapping[str, Any]) -> int | None:
    """Side of the input at which a run evaluates, in pixels: that of its last stage; None where no stage names one."""
    stages = [{as_key(key): value for key, value in stage.items()} for stage in config.get("stages") or ()]
    sizes = [stage.get("image_size") for stage in stages]
    if not any(sizes):
        return None
    own = config.get("image_size") or look_up(str(config["model"]))[1]["input_size"][-1]
    return int(sizes[-1] or own)


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


def _temperature(folder: Path, content: Mapping[str, Any]) -> tuple[float, str]:
    stored = content.get(CALIBRATION)
    if stored is None:
        return 1.0, ""
    value = stored.get("temperature") if isinstance(stored, dict) else None
    if not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise UserError(f"{folder / TIMM_CONFIG}: the temperature in {CALIBRATION!r} is {value!r}, not above 0.")
    return float(value), str(stored.get("fitted_on", ""))
