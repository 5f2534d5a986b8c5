"""What a timm model asks of a GPU in one micro-batch, counted without GPU and memory (torch's meta device)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tests.benchmarks.scale_model import Work
from tuning.depth import closed_eval, open_names, set_open

aten = torch.ops.aten
NO_KERNEL = (aten.empty, aten.empty_like, aten.new_empty, aten.new_empty_strided, aten.detach, aten._unsafe_view)


def count(name: str, images: int, image_size: int, classes: int = 1000, opened: str | int | float = "all") -> Work:
    """One forward and backward pass of a timm model in bf16, with the depth *opened* of a stage open."""
    with torch.device("meta"), _fused_attention():
        model = timm.create_model(name, num_classes=classes).bfloat16().train()
        set_open(model, open_names(model, opened))
        closed_eval(model)
        pictures = torch.zeros(images, 3, image_size, image_size, dtype=torch.bfloat16)
        labels = torch.zeros(images, dtype=torch.long)
        with Kernels() as seen, gradients_of(model, seen) as gradients:
            functional.cross_entropy(model(pictures).float(), labels).backward()
    elements = sum(p.numel() for p in model.parameters())
    gathered = 4 if any(name.endswith("running_mean") for name, _ in model.named_buffers()) else 2
    return Work(images, tuple(seen.kernels), tuple(gradients), elements, gathered)


class Kernels(TorchDispatchMode):
    """FLOP and bytes, read and written, of every operation within it that is more than another view of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[tuple[float, float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        result = func(*args, **named)
        if not func.is_view and func.overloadpacket not in NO_KERNEL:
            tensors = [leaf for leaf in tree_leaves((args, named, result)) if isinstance(leaf, Tensor)]
            self.kernels.append((_flops(func, args, named, result), sum(t.nbytes for t in tensors)))
        return result


def _flops(func: Any, args: Any, named: Any, result: Any) -> float:
    if func.overloadpacket is aten.convolution_backward:  # torch's own count forgets the groups
        gradient, _, weight, *_, wanted = args
        return float(2 * gradient.numel() * weight[0].numel() * sum(wanted[:2]))
    counted = flop_registry.get(func.overloadpacket)
    return float(counted(*args, **named, out_val=result)) if counted else 0.0


@contextmanager
def gradients_of(model: nn.Module, seen: Kernels) -> Iterator[list[tuple[int, int]]]:
    """Bytes in float32 of every gradient within it, as it appears, and the number of kernels until then."""
    found: list[tuple[int, int]] = []
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda p: found.append((4 * p.numel(), len(seen.kernels))))
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    yield found
    for hook in hooks:
        hook.remove()


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention as one kernel, which torch chooses on a GPU; on the meta device it would write out every matrix."""
    plain = functional.scaled_dot_product_attention

    def fused(*inputs: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False) -> Tensor:
        if attn_mask is not None:
            return plain(*inputs, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal)
        return aten._scaled_dot_product_flash_attention(*inputs, dropout_p, is_causal)[0]  # type: ignore[no-any-return]

    with mock.patch.object(functional, "scaled_dot_product_attention", fused):
        yield
