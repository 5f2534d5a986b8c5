"""Any timm model by name, with the weights, the head and the image size asked for; and its way back into a folder."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.data.config import resolve_model_data_config
from timm.layers.patch_embed import PatchEmbed
from timm.models import split_model_name_tag
from torch import Tensor, nn

from tuning.errors import UserError
from tuning.models import packaged_weights, timm_factory
from tuning.models.initialisation import check_scheme, init_head, initialise
from tuning.models.names import folder_of, look_up
from tuning.models.weights import StateDict, fill, hub_overlay, read, require_pretrained, unreachable

# What describes the weights a model was built from, not the weights it holds now.
_STALE = frozenset(
    (
        *("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "architecture", "tag", "custom_load"),
        *("num_classes", "label_names", "label_descriptions", "label_offset"),
        *("test_input_size", "test_crop_pct", "test_pool_size", "pool_size"),
    )
)


@dataclass(frozen=True)
class ModelInfo:
    """What the rest of a run must know about a model: how it sees images, and how to build it again."""

    name: str
    """As the user typed it."""
    architecture: str
    """timm's name without tag or folder."""
    weights: str
    """One sentence: where the initial weights came from."""
    input_size: int
    """Side of the square images, in pixels."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of ``timm.create_model`` that shape the tensors, such as ``img_size``."""


def build(
    name: str,
    *,
    classes: Sequence[str] | int,
    weights: str = "pretrained",
    head_init: str = "default",
    init: str = "default",
    drop_rate: float | None = None,
    drop_path_rate: float | None = None,
    image_size: int | None = None,
    crop_pct: float | None = None,
    final_size: int | None = None,
    several_sizes: bool = False,
    seed: int = 0,
) -> tuple[nn.Module, ModelInfo]:
    """A timm model with one output a class, on the CPU, the same on every process for the same arguments.

    *name*: a timm name, or ``local-dir:PATH``. *weights*: 'pretrained' (a pip package or the folder if there is one,
    else the hub), 'none', or a weight file. *init* applies to the whole network and needs weights 'none'; *head_init*
    to the classifier, whose pretrained values stay only under 'default' and with as many classes as before.
    *drop_rate*, *drop_path_rate*: in [0, 1), None = the model's own. *image_size*: pixels, None = the model's own.
    *crop_pct*: share of the shorter side that evaluation keeps, None = the model's own. *final_size*: pixels that
    position embeddings are laid out for, None = *image_size*. *several_sizes*: they are resampled in every forward pass
    to the size of its pictures, where the model has them and timm can (``dynamic_img_size``).

    Raises UserError for an unknown name, weights that cannot be had or do not fit, and values the model does not take.
    """
    _check_arguments(weights, init, head_init, drop_rate, drop_path_rate, image_size)
    architecture, cfg, model_args = look_up(name)
    kept_size = final_size or image_size
    count = classes if isinstance(classes, int) else len(classes)
    wanted = {"num_classes": count, "drop_rate": drop_rate, "drop_path_rate": drop_path_rate, "img_size": kept_size}
    wanted |= {"dynamic_img_size": several_sizes or None}
    wanted = {key: value for key, value in wanted.items() if value is not None}

    def create(pretrained: bool = False, overlay: dict[str, Any] | None = None) -> nn.Module:
        return timm_factory.create(name, wanted, cfg, seed, pretrained, overlay)

    model, said = _with_weights(name, weights, create)
    if init != "default":
        initialise(model, init, seed)
        said = f"random values ({init})"
    if head_init != "default":
        init_head(model, head_init, seed + 1)
        said += f", its head drawn anew ({head_init})"
    if kept_size is not None:
        check_image_size(model, name, kept_size, cfg)
    if "img_size" in wanted:
        model_args = model_args | {"img_size": kept_size}
    info = _info(model, name, architecture, said, image_size, model_args)
    return model, info if crop_pct is None else replace(info, crop_pct=crop_pct)


def check_image_size(
    model: nn.Module, name: str, image_size: int, cfg: Mapping[str, Any] | None = None, flag: str = "--image-size"
) -> None:
    """Send one zero image through *model*.

    Raises UserError with *flag*, which asks for *image_size*, and the model's own size when it fails.
    """
    training = {module: module.training for module in model.modules()}
    parameter = next(model.parameters())
    cfg = cfg or getattr(model, "pretrained_cfg", {})
    _refuse_unseen_pixels(model, name, image_size, cfg, flag)
    model.eval()
    try:
        # Not inference_mode: what a model caches in a forward pass must still serve in training.
        with torch.no_grad():
            model(torch.zeros(1, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype))
    except Exception as error:
        raise timm_factory.wrong_size(name, image_size, cfg, error, flag=flag) from error
    finally:
        for module, mode in training.items():
            module.training = mode


def keep_best(
    model: nn.Module, info: ModelInfo, classes: Sequence[str], folder: Path, weights: Mapping[str, Tensor]
) -> bool:
    """`save_timm_folder`, or False and a warning when the disk refuses; what was there before is intact then."""
    try:
        save_timm_folder(model, info, classes, folder, weights)
    except (OSError, SafetensorError) as error:
        for part in folder.glob("*.part"):
            part.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error)
        print(f"warning: the best weights could not be written to {folder} ({reason}).", file=sys.stderr, flush=True)
        return False
    return True


def save_timm_folder(
    model: nn.Module,
    info: ModelInfo,
    classes: Sequence[str],
    folder: Path,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a folder that ``timm.create_model("local-dir:<folder>", pretrained=True)`` loads.

    It holds ``model.safetensors`` and ``config.json``. *model* is the raw model; *state_dict* replaces its weights
    (an average, or gathered shards: whole tensors on the CPU, no two in the same memory). *classes* in the order of the
    outputs. Each file is complete or absent. One process writes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = dict(state_dict or {})
    if state_dict is None:  # safetensors refuses tensors that share memory, hence the copy
        plain = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in model.state_dict().items()}
    save_file(plain, folder / "model.safetensors.part", metadata={"format": "pt"})
    text = json.dumps(_config(model, info, classes), indent=2, ensure_ascii=False)
    (folder / "config.json.part").write_text(text + "\n", encoding="utf-8")
    # safetensors lets nobody but this user read its file.
    shutil.copymode(folder / "config.json.part", folder / "model.safetensors.part")
    for file in ("model.safetensors", "config.json"):
        with (folder / f"{file}.part").open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(folder / f"{file}.part", folder / file)


def _config(model: nn.Module, info: ModelInfo, classes: Sequence[str]) -> dict[str, Any]:
    """The content of ``config.json`` in timm's schema."""
    source = getattr(model, "pretrained_cfg", {})
    cfg = {key: value for key, value in source.items() if key not in _STALE and value is not None}
    cfg |= {
        "input_size": [3, info.input_size, info.input_size],
        "mean": list(info.mean),
        "std": list(info.std),
        "interpolation": info.interpolation,
        "crop_pct": info.crop_pct,
        "crop_mode": "center",  # as `transforms.Crop` does it, whatever the weights came with
        "num_classes": len(classes),
        "custom_load": False,
        "pool_size": None,
        "first_conv": source.get("first_conv"),
        "classifier": source.get("classifier"),
    }
    return {
        "architecture": info.architecture,
        "num_classes": len(classes),
        "num_features": getattr(model, "num_features", None),
        "label_names": list(classes),
        "model_args": dict(info.model_args),
        "pretrained_cfg": cfg,
    }


def _check_arguments(
    weights: str,
    init: str,
    head_init: str,
    drop_rate: float | None,
    drop_path_rate: float | None,
    image_size: int | None,
) -> None:
    check_scheme(init, whole_network=True)
    check_scheme(head_init, whole_network=False)
    for flag, rate in (("--drop-rate", drop_rate), ("--drop-path-rate", drop_path_rate)):
        if rate is not None and not 0 <= rate < 1:
            raise UserError(f"{flag} is a probability from 0 up to but not including 1, got {rate!r}.")
    if init != "default" and weights != "none":
        raise UserError(
            f"--init {init} draws the whole network anew and would discard --weights {weights}: add --weights none."
        )
    if image_size is not None and image_size < 1:
        raise UserError(f"--image-size must be a positive number of pixels, got {image_size!r}.")


def _with_weights(name: str, weights: str, create: Callable[..., nn.Module]) -> tuple[nn.Module, str]:
    """The model, and where its weights came from."""
    if weights == "none":
        return create(), "random values"
    if weights != "pretrained":
        return _filled(create, read(Path(weights)), f"the file {weights}")
    folder = folder_of(name)
    if folder is not None:
        return _filled(create, read(folder), f"the folder {folder}")
    packaged = packaged_weights.find(name)
    if packaged:
        return _filled(create, packaged_weights.load(packaged, name), f"the installed package {packaged.parts[-3]}")
    require_pretrained(name)
    overlay = hub_overlay(name)
    try:
        return create(pretrained=True, overlay=overlay), f"timm's pretrained weights {_full_name(name)}"
    except UserError:
        raise
    except Exception as error:  # the hub client, its HTTP library and safetensors each have their own
        raise unreachable(name, error) from error


def _filled(create: Callable[..., nn.Module], state: StateDict, source: str) -> tuple[nn.Module, str]:
    model = create()

    def convert(state: StateDict) -> nn.Module:
        classes = getattr(model, "num_classes", 0)
        overlay = {"state_dict": state, "source": "", "custom_load": False, "num_classes": classes, "label_offset": 0}
        return create(pretrained=True, overlay=overlay)

    keeps_head = fill(model, state, source, convert)
    return model, source if keeps_head else f"{source}, with a new head of {getattr(model, 'num_classes', 0)} classes"


def _full_name(name: str) -> str:
    cfg = timm.get_pretrained_cfg(name)
    return f"{split_model_name_tag(name)[0]}.{cfg.tag}" if cfg and cfg.tag else name


def _info(
    model: nn.Module, name: str, architecture: str, said: str, image_size: int | None, model_args: Mapping[str, Any]
) -> ModelInfo:
    data = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    return ModelInfo(
        name=name,
        architecture=architecture,
        weights=said,
        input_size=image_size or int(data["input_size"][-1]),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation=data["interpolation"],
        crop_pct=float(data["crop_pct"]),
        model_args=model_args,
    )


def _refuse_unseen_pixels(model: nn.Module, name: str, image_size: int, cfg: Mapping[str, Any], flag: str) -> None:
    """timm cuts an image into whole patches and drops what is left at the right and the bottom, without a word."""
    patch = getattr(model, "patch_embed", None)
    if isinstance(patch, PatchEmbed) and not patch.dynamic_img_pad:
        side = patch.patch_size[0]
        unseen = image_size % side
        if unseen:
            raise timm_factory.wrong_size(
                name, image_size, cfg, ValueError(f"it would not see the last {unseen} pixels"), side, flag
            )
