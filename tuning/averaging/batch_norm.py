"""BatchNorm over the images of all processes: the statistics of a forward pass are those of its whole batch.

Layers change their class in place and back, so parameters, buffers, names and hooks stay the same objects, and what is
saved is a plain timm model. On GPUs the work is done by `torch.nn.SyncBatchNorm`, which knows no other device; here it
learns the CPU, by two sums over the processes forward and two backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from torch import Tensor, distributed, nn

from tuning.errors import UserError


class SyncedBatchNorm(nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm`, on a CPU too: ``(B, C)`` or ``(B, C, ...)``, as many images on every process."""

    def forward(self, x: Tensor) -> Tensor:
        """Training: mean and variance of the batches of all processes; evaluation: the running ones."""
        if x.device.type != "cpu" or not self.training or distributed.get_world_size() == 1:
            return super().forward(x)
        axes, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        count = x.numel() // x.shape[1] * distributed.get_world_size()
        values = x.float()  # sums in bf16 would be too coarse
        mean = _sum_over_processes(values.sum(axes)) / count
        centred = values - mean.view(shape)
        variance = _sum_over_processes(centred.square().sum(axes)) / count
        self._follow(mean.detach(), variance.detach() * (count / max(1, count - 1)))
        normalised = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(x.dtype)

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics; of the variance they hold the unbiased estimate, as torch's do."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


class SyncedBatchNormAct(SyncBatchNormAct, SyncedBatchNorm):
    """timm's BatchNorm with its activation."""


class _SumOverProcesses(torch.autograd.Function):
    """The sum over all processes; every process's loss depends on it, so the gradient is a sum over them, too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        """The sum of *values* over all processes."""
        total = values.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        """Every process's gradient counts for every process's values."""
        total = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total


def _sum_over_processes(values: Tensor) -> Tensor:
    return _SumOverProcesses.apply(values)  # type: ignore[no-any-return, no-untyped-call]


SYNCED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: SyncedBatchNorm,
    nn.BatchNorm2d: SyncedBatchNorm,
    nn.BatchNorm3d: SyncedBatchNorm,
    BatchNormAct2d: SyncedBatchNormAct,
}


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that keep running statistics, by name."""
    # By buffer, not by class: timm's EvoNorm and its like are no subclasses of BatchNorm.
    return {
        name: module
        for name, module in model.named_modules()
        if any(buffer.startswith("running_") for buffer, _ in module.named_buffers(recurse=False))
    }


def refuse_foreign_norms(model: nn.Module, wish: str) -> None:
    """Refuse a *wish* that is for BatchNorm alone when *model* has running statistics of another kind.

    Raises:
        UserError: names the first such layer.
    """
    for name, module in norms(model).items():
        if _own_class(module) not in SYNCED:
            raise UserError(
                f"{wish} is for BatchNorm, but {name} of {type(model).__name__} is {_own_class(module).__name__}, with "
                "running statistics of another kind. Leave it out."
            )


def synchronise(model: nn.Module, wanted: bool) -> None:
    """Make the BatchNorm layers in training mode take their statistics over all processes; give the others back.

    Args:
        wanted: False = all layers are plain ones.
    """
    for module in model.modules():
        own = _own_class(module)
        if own in SYNCED:
            _become(module, SYNCED[own] if wanted and module.training else own)


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """In the body every process has BatchNorm layers of its own, which exchange nothing."""
    synced = [module for module in model.modules() if type(module) is not _own_class(module)]
    for module in synced:
        _become(module, _own_class(module))
    try:
        yield
    finally:
        for module in synced:
            _become(module, SYNCED[_own_class(module)])


def _own_class(module: nn.Module) -> type[nn.Module]:
    own: type[nn.Module] = vars(module).get("_class_when_apart", type(module))
    return own


def _become(module: nn.Module, wanted: type[nn.Module]) -> None:
    own = _own_class(module)
    module.__class__ = wanted
    if wanted is own:
        vars(module).pop("_class_when_apart", None)
        vars(module).pop("process_group", None)
    else:
        vars(module)["_class_when_apart"] = own
        vars(module)["process_group"] = None  # all processes
