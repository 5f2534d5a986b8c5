"""A model that runs out of memory where a test says so: the errors are torch's own, raised in the real code paths."""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

Where = Literal["forward", "backward"]


@dataclass
class ShortMemory:
    """Forward or backward passes of more than *fits* images fail from the *first*-th large one on.

    Attributes:
        where: in which pass.
        fits: images that always fit.
        first: large passes that go well before; later ones fail, *times* of them.
        times: failures before memory is there again; None = for ever.
        seen: images of every forward pass.
        failed: of these, the images of those that failed.
    """

    where: Where
    fits: int
    first: int = 0
    times: int | None = None
    seen: list[int] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)

    def watch(self, module: nn.Module) -> None:
        """Let *module*, anywhere in a model, run out of memory."""
        module.register_forward_hook(self._after_forward)

    def watch_all(self, kind: str) -> None:
        """The same for every module of a class named *kind* that this process ever runs."""
        torch.nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output: (
                self._after_forward(module, inputs, output) if type(module).__name__ == kind else None
            )
        )

    def _after_forward(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        self.seen.append(len(output))
        fails = len(output) > self.fits and self._is_due()
        if fails and self.where == "forward":
            raise self._error(len(output))
        return _Passes.apply(output, (lambda: self._error(len(output))) if fails else None)  # type: ignore[no-any-return]

    def _is_due(self) -> bool:
        large = sum(size > self.fits for size in self.seen)
        return large > self.first and (self.times is None or len(self.failed) < self.times)

    def _error(self, images: int) -> Exception:
        self.failed.append(images)
        return torch.OutOfMemoryError(f"out of memory with {images} images")


def limit_memory(megabytes: int) -> None:
    """Let this process take only so much more memory than it has, for the rest of its life: allocations really fail."""
    lines = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) for line in lines if line.startswith("VmSize:"))
    limit = 1024 * used + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


class _Passes(torch.autograd.Function):
    """The identity, whose backward pass fails with the error that *error* makes."""

    @staticmethod
    def forward(context: Any, inputs: Tensor, error: Callable[[], Exception] | None) -> Tensor:
        context.error = error
        return inputs.view_as(inputs)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        if context.error is not None:
            raise context.error()
        return gradient, None
