"""Optimizers by name from timm's factory, on our parameter groups."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from timm.optim._optim_factory import create_optimizer_v2, get_optimizer_class, list_optimizers

from tuning.errors import UserError, did_you_mean


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
    accepted = inspect.signature(get_optimizer_class(name, bind_defaults=False)).parameters
    fused: dict[str, Any] = {"fused": True} if "fused" in accepted else {}
    copies = [dict(group) for group in groups]  # the optimizer writes into what it is given
    return create_optimizer_v2(copies, opt=name, lr=copies[-1]["lr"], momentum=momentum, **fused)


def check_optimizer(name: str) -> None:
    """Refuse a name that timm's factory doesn't know or can't build here.

    Raises:
        UserError: names the nearest known optimizer, or the missing package.
    """
    known = [str(optimizer) for optimizer in list_optimizers()]
    if name.lower() not in known:
        raise UserError(f"--optimizer {name!r} is not known to timm.{did_you_mean(name, known)}")
    try:
        create_optimizer_v2([torch.nn.Parameter(torch.zeros(2, 2))], opt=name, lr=1e-3)
    except Exception as error:
        raise UserError(f"--optimizer {name!r} can't be built here: {error}") from None
