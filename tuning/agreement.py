"""Processes hold one model: statistics are averaged, and drift between them is an error, not a surprise."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from tuning.errors import UserError


class DriftError(RuntimeError):
    """Processes that should hold the same parameters don't."""


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


def refuse_different_steps(accelerator: Accelerator, found: int | None) -> None:
    """Refuse to go on when processes have found different checkpoints: they don't see the same folder.

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

    Raises:
        DriftError: names the first tensor that differs.
    """
    if accelerator.num_processes == 1:
        return
    state = model.state_dict()
    mine = torch.stack([tensor.detach().double().sum() for tensor in state.values()])
    every = accelerator.gather(mine).view(accelerator.num_processes, -1)
    differ = (every != every[0]) & ~(every.isnan() & every[0].isnan())
    apart = torch.nonzero(differ.any(dim=0)).flatten().tolist()
    if apart:
        name = list(state)[apart[0]]
        raise DriftError(f"{len(apart)} of {len(state)} tensors differ between processes, the first is {name}.")
