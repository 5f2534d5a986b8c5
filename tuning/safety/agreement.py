"""Processes hold one model: statistics are averaged, and drift between them is an error, not a surprise."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tuning.errors import UserError

_hosts: list[Any] = []  # exchanges on the host, where the default group has none


class DriftError(RuntimeError):
    """Processes that should hold the same parameters don't."""


def join_hosts(accelerator: Accelerator, timeout: timedelta) -> None:
    """Make exchanges possible that wait for no device. All processes take part, once, at the start."""
    _hosts.clear()
    if accelerator.num_processes > 1 and accelerator.device.type != "cpu":
        _hosts.append(torch.distributed.new_group(backend="gloo", timeout=timeout))


def sum_if_all(accelerator: Accelerator, mine: Tensor | None) -> Tensor | None:
    """The sum over all processes of *mine* (0-d), None on all of them where one has none. All processes take part.

    Waits for the others, but for no device: there the processes vote on their hosts. On a CPU one exchange serves both.
    """
    if accelerator.num_processes == 1:
        return mine
    if accelerator.device.type == "cpu":
        both = torch.stack((torch.zeros(()), torch.ones(())) if mine is None else (mine, torch.zeros(())))
        torch.distributed.all_reduce(both)
        total, missing = both.unbind()
        return None if missing else total
    vote = torch.tensor([int(mine is None)], dtype=torch.int32)
    torch.distributed.all_reduce(vote, op=torch.distributed.ReduceOp.MAX, group=_hosts[0])
    return None if mine is None or vote.item() else accelerator.reduce(mine, reduction="sum")


def average_statistics(accelerator: Accelerator, statistics: Iterable[Tensor]) -> None:
    """Give every process the mean of the running statistics of norms, which training batches move apart.

    Called before they are used: otherwise each process would evaluate, and rank 0 keep, a slightly different model. A
    running average is linear, so the moment of averaging changes no result.
    """
    if accelerator.num_processes > 1:
        for buffer in statistics:
            buffer.copy_(accelerator.reduce(buffer, reduction="mean"))


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """``{name: buffer}`` of the running statistics that training batches move: those of norms in training mode."""
    # By buffer, not by class: timm's EvoNorm and its like are no subclasses of BatchNorm.
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        if module.training
        for name, buffer in module.named_buffers(recurse=False)
        if name.startswith("running_")
    }


def refuse_different_steps(found: int | None) -> None:
    """Refuse to go on when processes have found different checkpoints: they don't see the same folder. All take part.

    Args:
        found: step of the checkpoint that this process has found; None without one.

    Raises:
        UserError: on every process, with the step of each.
    """
    steps = gather_object([found])
    if len(set(steps)) > 1:
        seen = ", ".join(f"process {rank}: {'none' if step is None else step}" for rank, step in enumerate(steps))
        raise UserError(
            f"--resume: the processes see checkpoints of different steps ({seen}). --output must be one folder that "
            "all machines share."
        )


def refuse_drift(accelerator: Accelerator, model: nn.Module) -> None:
    """Compare every tensor of the model over all processes, by its sum in float64. All processes take part.

    Not what is split over them: of that each holds another share.

    Raises:
        DriftError: names the first tensor that differs.
    """
    if accelerator.num_processes == 1:
        return
    state = {name: t for name, t in model.state_dict().items() if not isinstance(t, DTensor)}
    if not state:
        return
    mine = torch.stack([tensor.detach().double().sum() for tensor in state.values()])
    every = accelerator.gather(mine).view(accelerator.num_processes, -1)
    differ = (every != every[0]) & ~(every.isnan() & every[0].isnan())
    apart = torch.nonzero(differ.any(dim=0)).flatten().tolist()
    if apart:
        name = list(state)[apart[0]]
        raise DriftError(f"{len(apart)} of {len(state)} tensors differ between processes, the first is {name}.")
