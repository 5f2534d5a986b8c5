"""The formats of an export: how each is written, and how it is loaded again to be judged by what lies on the disk."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import timm
import torch
from torch import Tensor, nn

from tuning.data.transforms import Normalise
from tuning.errors import UserError
from tuning.models.build import ModelInfo, save_timm_folder
from tuning.models.weights import first_line

Format = Literal["timm", "onnx", "exported-program"]
InputType = Literal["uint8", "float"]
Network = Callable[[Tensor], Tensor]  # inputs (B, 3, S, S) -> logits (B, K), both on the CPU

FILES = {"timm": "model.safetensors", "onnx": "model.onnx", "exported-program": "model.pt2"}
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "timm": (), "exported-program": ()}
EXAMPLE_BATCH = 2  # images that a network is traced with; torch takes 1 for a constant


class WithNormalisation(nn.Module):
    """uint8 RGB ``(B, 3, S, S)`` -> logits ``(B, K)``: the model with `Normalise` before it."""

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        # As in `Normalise`, so that the inputs are equal to the last bit.
        self.register_buffer("scale", torch.tensor(std).mul(255).reciprocal().view(1, -1, 1, 1), persistent=False)
        self.register_buffer(
            "shift", torch.tensor(mean).div(torch.tensor(std)).neg().view(1, -1, 1, 1), persistent=False
        )

    def forward(self, images: Tensor) -> Tensor:
        """Normalise on the device, then the model."""
        scaled = images.to(torch.float32) * self.get_buffer("scale") + self.get_buffer("shift")
        logits: Tensor = self.model(scaled)
        return logits


def check_packages(kind: Format) -> None:
    """Refuse a format whose packages are not installed.

    Raises:
        UserError: names them and the extra that brings them.
    """
    missing = [name for name in PACKAGES[kind] if find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format {kind} needs {', '.join(missing)}, which {'are' if len(missing) > 1 else 'is'} not installed: "
            f"pip install 'fine-tuning[onnx]' (in a checkout: pip install -e '.[onnx]')."
        )


def input_type(kind: Format, asked: InputType | None) -> InputType:
    """What goes into the export: as asked, or uint8 with the normalisation inside; a timm folder always takes floats.

    Raises:
        UserError: uint8 for a timm folder.
    """
    if kind == "timm" and asked == "uint8":
        raise UserError("--export-input uint8: a timm folder holds weights only, so its input is normalised outside.")
    return asked or ("float" if kind == "timm" else "uint8")


def original(model: nn.Module, info: ModelInfo, uint8: bool) -> nn.Module:
    """What is exported: *model*, with the normalisation before it where the input is uint8; in evaluation mode."""
    return (WithNormalisation(model, info.mean, info.std) if uint8 else model).eval()


def write(kind: Format, model: nn.Module, info: ModelInfo, classes: Sequence[str], folder: Path, uint8: bool) -> None:
    """Write *model* (on the CPU, in evaluation mode) into *folder* under the name in `FILES`.

    Args:
        uint8: the input is uint8 and the normalisation goes into the network.

    Raises:
        UserError: torch can't express the model in this format; names the reason.
    """
    if kind == "timm":
        save_timm_folder(model, info, classes, folder)
        return
    shape = (EXAMPLE_BATCH, 3, info.input_size, info.input_size)
    example = torch.zeros(shape, dtype=torch.uint8 if uint8 else torch.float32)
    with _refusing(kind, info.name, instead="timm"), torch.no_grad():
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(original(model, info, uint8), (example,), dynamic_shapes=({0: batch},))
    if kind == "exported-program":
        torch.export.save(program, folder / FILES[kind])
        return
    with _refusing(kind, info.name, instead="timm or exported-program"), torch.no_grad():
        written = torch.onnx.export(
            program, dynamo=True, input_names=["images"], output_names=["logits"], verbose=False
        )
        assert written is not None
    written.save(str(folder / FILES[kind]))


@contextlib.contextmanager
def _refusing(kind: Format, name: str, instead: str) -> Iterator[None]:
    """Turn an exporter's error into a `UserError` with its reason and another format, and its pages of output off."""
    try:
        with quiet(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    except Exception as error:  # torch.export, torch.onnx and onnxscript each have their own
        cause: BaseException = error
        while cause.__cause__ is not None:  # torch.onnx wraps the reason several times
            cause = cause.__cause__
        raise UserError(
            f"--format {kind}: {name} can't be expressed in it ({type(cause).__name__}: {first_line(cause)}). "
            f"Choose --format {instead}."
        ) from error


def load(kind: Format, folder: Path, threads: int) -> Network:
    """The network in *folder*, on the CPU.

    Args:
        threads: of ONNX Runtime; torch keeps those that the process has.
    """
    if kind == "onnx":
        return _onnx_network(folder / FILES[kind], threads)
    if kind == "timm":
        with quiet():
            model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
        return model.eval()
    return torch.export.load(folder / FILES[kind]).module()


def _onnx_network(path: Path, threads: int) -> Network:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def network(inputs: Tensor) -> Tensor:
        (logits,) = session.run(None, {"images": inputs.numpy()})
        return torch.from_numpy(logits)

    return network


def inputs_for(images: Tensor, info: ModelInfo, uint8: bool) -> Tensor:
    """uint8 ``(B, 3, S, S)`` -> what the export takes, contiguous."""
    return (images if uint8 else Normalise(info.mean, info.std)(images)).contiguous()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings and log lines of the exporters: what they make is judged by its answers."""
    before = logging.root.manager.disable
    try:
        logging.disable(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
