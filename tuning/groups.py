"""Parameter groups: one learning rate per depth, weight decay only where it belongs."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from tuning.depth import layer_ids
from tuning.errors import UserError

Group = dict[str, Any]


def param_groups(model: nn.Module, lr: float, layer_decay: float = 1.0, weight_decay: float = 0.0) -> list[Group]:
    """Optimizer groups of the raw *model*, stem first: ``peak_lr = lr * layer_decay ** (top - depth)``.

    Each group is ``{"params", "name", "peak_lr", "lr", "weight_decay", "depth"}``; the decayed and the undecayed part
    of a depth share a name such as ``layer07``. Closed parameters are included, so the groups are the same in every
    stage. Biases, norms and all else of at most one dimension, and what ``model.no_weight_decay()`` names, are not
    decayed.

    Raises UserError when a value is out of range. Bao et al. 2022 (BEiT), arXiv:2106.08254.
    """
    _check_rates(lr, layer_decay, weight_decay)
    ids = layer_ids(model)
    exempt = _undecayed_patterns(model)
    top = max(ids.values())
    members: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        undecayed = parameter.ndim <= 1 or any(fnmatch.fnmatch(name, pattern) for pattern in exempt)
        members.setdefault((ids[name], undecayed), []).append(parameter)
    groups = [
        {
            "params": members[depth, undecayed],
            "name": f"layer{depth:0{len(str(top))}d}",
            "weight_decay": 0.0 if undecayed else weight_decay,
            "depth": depth,
        }
        for depth, undecayed in sorted(members)
    ]
    set_peak_lrs(groups, lr, layer_decay)
    set_lr(groups, 1.0)
    return groups


def set_peak_lrs(groups: Iterable[Group], lr: float, layer_decay: float) -> None:
    """Give every group the peak learning rate of a new stage, in place: ``lr * layer_decay ** (top - depth)``."""
    groups = list(groups)
    top = max(group["depth"] for group in groups)
    for group in groups:
        group["peak_lr"] = lr * layer_decay ** (top - group["depth"])


def set_lr(groups: Iterable[Group], factor: float) -> None:
    """Set the learning rate of this step, in place: ``lr = peak_lr * factor``."""
    for group in groups:
        group["lr"] = group["peak_lr"] * factor


def decay_for_ratio(model: nn.Module | Mapping[str, int], lr_ratio: float) -> float:
    """The decay per layer that gives ``stem LR / head LR = lr_ratio``: ``lr_ratio ** (1 / top)``.

    A ratio means the same for every family, whereas one decay per layer means a stem factor of 2.4e-2 on ViT-S and of
    3.2e-4 on RegNetY-016. Args: the raw model, or its ``layer_ids``. Raises UserError outside 0 < lr_ratio <= 1 or
    for a single depth.
    """
    if not 0 < lr_ratio <= 1:
        raise UserError(f"--lr-ratio must lie above 0 and up to 1 (stem LR / head LR), got {lr_ratio!r}.")
    ids = layer_ids(model) if isinstance(model, nn.Module) else model
    top = max(ids.values())
    if top == 0 and lr_ratio < 1:
        raise UserError(f"--lr-ratio {lr_ratio!r} has no effect: this model has a single depth. Leave it at 1.")
    return float(lr_ratio ** (1 / max(top, 1)))


def _undecayed_patterns(model: nn.Module) -> frozenset[str]:
    """Names and patterns that the model's authors keep free of weight decay (position embeddings, class tokens ...)."""
    declare = getattr(model, "no_weight_decay", None)
    return frozenset(declare()) if callable(declare) else frozenset()


def _check_rates(lr: float, layer_decay: float, weight_decay: float) -> None:
    if not 0 <= lr < float("inf"):
        raise UserError(f"--lr must be a number of at least 0, got {lr!r}.")
    if not 0 < layer_decay <= 1:
        raise UserError(f"--layer-decay must lie above 0 and up to 1, got {layer_decay!r}.")
    if not 0 <= weight_decay < float("inf"):
        raise UserError(f"--weight-decay must be a number of at least 0, got {weight_decay!r}.")
