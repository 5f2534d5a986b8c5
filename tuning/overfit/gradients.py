"""Which open parameters get a gradient, seen by the clipping function that the engine calls once a step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tuning.clipping import Clip


class GradientWatch:
    """Clips like *clip*, and remembers the largest gradient of every open parameter before that.

    Attributes:
        steps: optimizer steps seen.
    """

    def __init__(self, clip: Clip) -> None:
        self._clip, self.steps = clip, 0
        self._largest: dict[str, Tensor] = {}

    def __call__(self, model: nn.Module) -> Tensor:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.grad is not None:
                size = parameter.grad.detach().abs().amax()
                self._largest[name] = torch.maximum(self._largest.get(name, size), size)
        self.steps += 1
        return self._clip(model)

    def largest(self, model: nn.Module) -> dict[str, float | None]:
        """Of every open parameter; None = it never had a gradient."""
        values = torch.stack([*self._largest.values()]).tolist() if self._largest else []
        sizes = dict(zip(self._largest, values, strict=True))
        return {name: sizes.get(name) for name, p in model.named_parameters() if p.requires_grad}
