"""Optimizers by name from timm's factory, on our parameter groups."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.optim._optim_factory import create_optimizer_v2, get_optimizer_class, list_optimizers
from torch import Tensor
from torch.distributed.tensor import DTensor

from tuning.errors import UserError, did_you_mean

FUSED_ON_SHARES = (torch.optim.Adam, torch.optim.AdamW)  # torch can't do it for others
SECOND_ORDER = "adahessian"


def create_optimizer(name: str, groups: list[dict[str, Any]], momentum: float) -> torch.optim.Optimizer:
    """An optimizer over *groups*; torch's fused implementation where there is one.

    Args:
        name: any name of ``timm.optim.list_optimizers()``; ``sgd`` has Nesterov momentum, as in timm.
        groups: from `tuning.groups.param_groups`, each with its own ``lr`` and ``weight_decay``.
        momentum: for SGD and its kin; others ignore it.

    Raises:
        UserError: an unknown name, or one that needs a package that is not installed.
    """
    check_optimizer(name)
    if name.lower() == "sgd" and momentum == 0:
        name = "momentum"  # timm's name for SGD without Nesterov, which torch refuses at momentum 0
    kind = get_optimizer_class(name, bind_defaults=False)
    split = any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"])
    can_fuse = kind in FUSED_ON_SHARES if split else "fused" in inspect.signature(kind).parameters
    fused: dict[str, Any] = {"fused": True} if can_fuse else {}
    copies = [dict(group) for group in groups]  # the optimizer writes into what it is given
    return create_optimizer_v2(copies, opt=name, lr=copies[-1]["lr"], momentum=momentum, **fused)


def step_if(optimizer: torch.optim.Optimizer, finite: Tensor, open_groups: Sequence[int]) -> None:
    """Update the parameters if *finite* (0-d bool, on the device) holds, else leave the step out as if it never was.

    torch's fused optimizers decide on the device. Others are decided on the host, which waits for the device.

    Args:
        open_groups: numbers of the groups that can have gradients.
    """
    if _decides_on_device(optimizer):
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()  # type: ignore[attr-defined]
        with _without_closed_groups(optimizer, open_groups):
            optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    elif finite:
        optimizer.step()


@contextmanager
def _without_closed_groups(optimizer: torch.optim.Optimizer, open_groups: Sequence[int]) -> Iterator[None]:
    """In the body the optimizer has groups with gradients only: an update of the head would mostly walk past others.

    For optimizers that count steps by parameter, as torch's do: those that count by group would count otherwise.
    """
    every = optimizer.param_groups
    opened = [every[number] for number in open_groups]
    optimizer.param_groups = [group for group in opened if any(p.grad is not None for p in group["params"])]
    try:
        yield
    finally:
        optimizer.param_groups = every


def start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give open parameters under fused SGD the momentum 0 that they begin with.

    torch allocates it uninitialised in the first step and leaves it so when that step is left out.
    """
    if not isinstance(optimizer, torch.optim.SGD) or not _decides_on_device(optimizer):
        return
    for group in optimizer.param_groups:
        for parameter in (p for p in group["params"] if group["momentum"] and p.requires_grad):
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _decides_on_device(optimizer: torch.optim.Optimizer) -> bool:
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def check_optimizer(name: str) -> None:
    """Refuse a name that timm's factory doesn't know or can't build here.

    Raises:
        UserError: names the nearest known optimizer, or the missing package.
    """
    known = [str(optimizer) for optimizer in list_optimizers()]
    if name.lower() == SECOND_ORDER:
        raise UserError(
            f"--optimizer {name} needs second derivatives, for which no gradient here is kept differentiable. Choose "
            "another, for example adamw."
        )
    if name.lower() not in known:
        raise UserError(f"--optimizer {name!r} is not known to timm.{did_you_mean(name, known)}")
    try:
        create_optimizer_v2([torch.nn.Parameter(torch.zeros(2, 2))], opt=name, lr=1e-3)
    except Exception as error:
        raise UserError(f"--optimizer {name!r} can't be built here: {error}") from None
