"""Weights of low precision in training: bf16 beside float32 master weights, or bf16 alone.

The levels of NVIDIA's Apex (O0 to O3) in today's words: `docs/precision.md`. fp32 and autocast are Accelerate's own;
here is what it doesn't have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.func import functional_call

Level = Literal["fp32", "bf16", "fp16", "bf16-master", "bf16-pure"]
LOW = torch.bfloat16
ACCELERATE_NAMES = {"fp32": "no", "bf16": "bf16", "fp16": "fp16", "bf16-master": "bf16", "bf16-pure": "bf16"}
_asked: WeakKeyDictionary[Accelerator, Level] = WeakKeyDictionary()


def remember(accelerator: Accelerator, level: Level) -> None:
    """Note what was asked for: the accelerator itself only knows autocast."""
    _asked[accelerator] = level


def level_of(accelerator: Accelerator) -> Level:
    """The precision of training, in the words of the flags."""
    names: dict[str, Level] = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
    return _asked.get(accelerator) or names[accelerator.mixed_precision]


def cast_weights(model: nn.Module, level: Level) -> nn.Module:
    """*model* itself, under ``bf16-pure`` all of it in bf16: weights and statistics, and so gradients and state."""
    return model.to(LOW) if level == "bf16-pure" else model


def lowered(model: nn.Module, level: Level) -> nn.Module:
    """What to call in training for *model*, whose parameters stay what they are."""
    if level not in ("bf16-master", "bf16-pure"):
        return model
    return LowPrecision(model, norms_in_fp32=level == "bf16-master")


class LowPrecision(nn.Module):
    """Forward and backward of *model* in bf16, without autocast; the output is float32.

    The parameters of *model* are the master weights: each pass computes with bf16 copies, and the gradient of a
    copy arrives at its master in the master's type. So the optimizer, clipping, averages, checkpoints and the
    evaluation see masters alone. (FSDP2's ``param_dtype`` does the same.)

    Args:
        norms_in_fp32: norms keep their weights and statistics, and compute in float32, as in Apex's O2.
    """

    def __init__(self, model: nn.Module, norms_in_fp32: bool) -> None:
        super().__init__()
        self.model, self._norms_in_fp32 = model, norms_in_fp32

    def forward(self, inputs: Tensor) -> Tensor:
        """Images or features ``(B, ...)`` -> logits ``(B, K)`` float32."""
        norms = _norms(self.model) if self._norms_in_fp32 else {}
        with torch.autocast(inputs.device.type, enabled=False), _in_fp32(norms.values()):
            copies = {name: tensor.to(LOW) for name, tensor in self._to_cast(norms)}
            return functional_call(self.model, copies, (inputs.to(LOW),)).float()  # type: ignore[no-any-return]

    def _to_cast(self, norms: dict[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
        kept = tuple(f"{name}." for name in norms)
        for named in (self.model.named_parameters(), self.model.named_buffers()):
            for name, tensor in named:
                if tensor.dtype == torch.float32 and not name.startswith(kept):
                    yield name, tensor


def _norms(model: nn.Module) -> dict[str, nn.Module]:
    """Norms with weights or statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and (module._parameters or module._buffers)
    }


@contextmanager
def _in_fp32(norms: Iterable[nn.Module]) -> Iterator[None]:
    """In the body these modules take float32 and give bf16."""
    handles = []
    for norm in norms:
        handles.append(norm.register_forward_pre_hook(lambda module, args: (args[0].float(), *args[1:])))
        handles.append(norm.register_forward_hook(lambda module, args, output: output.to(LOW)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
