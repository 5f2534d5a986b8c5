"""Gradient clipping, once per optimizer step, on unscaled gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn

from tuning.depth import head_names

Clip = Callable[[nn.Module], Tensor]


def clipping(norm: float, value: float | None, agc: float | None) -> Clip:
    """A function that clips the gradients of a model in place and returns their norm before clipping (a 0-d tensor).

    Args:
        norm: largest norm over all gradients (Pascanu et al. 2013); 0 = no clipping. Used when the others are None.
        value: largest magnitude of any gradient element.
        agc: largest ratio of gradient norm to weight norm per output unit (Brock et al. 2021); the head is left out,
            as in the paper.
    """
    if value is not None:
        return lambda model: _measured(model, lambda m: nn.utils.clip_grad_value_(_open(m), value))
    if agc is not None:
        return lambda model: _measured(model, lambda m: _clip_adaptively(m, agc))
    if norm > 0:
        return lambda model: nn.utils.clip_grad_norm_(_open(model), norm)
    return lambda model: _measured(model, lambda m: None)


def _measured(model: nn.Module, clip: Callable[[nn.Module], object]) -> Tensor:
    gradients = [p.grad for p in _open(model) if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    clip(model)
    return norm


def _clip_adaptively(model: nn.Module, ratio: float) -> None:
    adaptive_clip_grad(_below_head(model), clip_factor=ratio)  # type: ignore[no-untyped-call]


def _open(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _below_head(model: nn.Module) -> Iterable[nn.Parameter]:
    head = head_names(model)
    return [p for name, p in model.named_parameters() if p.requires_grad and name not in head]
