"""Processes hold one model: statistics are averaged, and drift between them is an error, not a surprise."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn


class DriftError(RuntimeError):
    """Processes that should hold the same parameters don't."""


def average_statistics(accelerator: Accelerator, model: nn.Module) -> None:
    """Give every process the mean of the running statistics of norms, which training batches move apart.

    Called before the statistics are used or saved: otherwise each process would evaluate, and rank 0 save, a slightly
    different model. A running average is linear, so the moment of averaging changes no result.
    """
    if accelerator.num_processes == 1:
        return
    for module in (m for m in model.modules() if m.training):
        # By buffer, not by class: timm's EvoNorm and its like are no subclasses of BatchNorm.
        for name, statistics in module.named_buffers(recurse=False):
            if name.startswith("running_"):
                statistics.copy_(accelerator.reduce(statistics, reduction="mean"))


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
