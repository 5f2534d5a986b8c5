"""How a stage that trains the head alone runs the closed layers: in which numbers, in which layout of the weights.

They need no graph: autograd builds none below the lowest open parameter, since the pictures ask for no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from tuning.depth import head_names

LAST = "-channels-last"  # how names of `flags.ForwardName` end that put weights into that layout


def lay_out(model: nn.Module, forward: str | None) -> list[nn.Parameter]:
    """Put the weights of convolutions below the head into channels-last order, if *forward* says so.

    Returns:
        those that were in another order, for `lay_back`.
    """
    if forward is None or not forward.endswith(LAST):
        return []
    head = head_names(model)
    below = [p for name, p in model.named_parameters() if p.dim() == 4 and name not in head]
    moved = [p for p in below if not p.is_contiguous(memory_format=torch.channels_last)]
    for parameter in moved:
        parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return moved


def lay_back(moved: Sequence[nn.Parameter]) -> None:
    """Put weights that `lay_out` has moved back into the usual order."""
    for parameter in moved:
        parameter.data = parameter.data.contiguous()


def casting(device: torch.device, forward: str | None) -> AbstractContextManager[object]:
    """Around a forward pass: autocast to bf16, if *forward* says so."""
    low = forward is not None and forward.startswith("bf16")
    return torch.autocast(device.type, torch.bfloat16) if low else nullcontext()


def called(model: nn.Module, forward: str | None) -> nn.Module:
    """What to call in training for *model*: itself, or under bf16 autocast of the stage's own."""
    return Low(model) if forward is not None and forward.startswith("bf16") else model


class Low(nn.Module):
    """*model* under bf16 autocast, whatever the precision of training; its output is float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` -> logits ``(B, K)`` float32."""
        with torch.autocast(inputs.device.type, torch.bfloat16):
            logits: Tensor = self.model(inputs)
        return logits.float()
