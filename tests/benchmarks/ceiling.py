"""The ceiling: a model that steps, or only goes forward, over one normalised batch that lies on the device."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks.paired import Row, ratio

LAYOUTS = {"plain weights": torch.contiguous_format, "channels-last weights": torch.channels_last}


def steps(model: nn.Module, layout: torch.memory_format, images: Tensor, labels: Tensor) -> Callable[[int], float]:
    """A function of a number of optimizer steps that says what one of them took, in seconds.

    Forward, backward, fused AdamW and nothing else. The model is a copy; images are ``(B, 3, S, S)`` channels-last.
    """
    mine = copy.deepcopy(model).to(memory_format=layout).train()
    optimizer = torch.optim.AdamW(mine.parameters(), lr=1e-4, fused=True)

    def seconds(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            loss = F.cross_entropy(mine(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        loss.item()  # a GPU is done, too
        return (time.perf_counter() - began) / count

    seconds(1)  # warm
    return seconds


def forwards(model: nn.Module, layout: torch.memory_format, images: Tensor) -> Callable[[int], float]:
    """The same of forward passes in evaluation mode."""
    mine = copy.deepcopy(model).to(memory_format=layout).eval()

    def seconds(count: int) -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            for _ in range(count):
                logits = mine(images)
        logits[0, 0].item()
        return (time.perf_counter() - began) / count

    seconds(1)
    return seconds


def shown(times: Mapping[str, list[float]], name: str) -> str:
    """The fastest of a job's rounds."""
    return f"{1e3 * min(times[name]):.0f} ms"


def other_layouts(times: Mapping[str, list[float]], best: str) -> list[Row]:
    """A row for each layout that was not the *best*."""
    return [
        Row(f"{name} : {best}", ratio(times, best, name), "", shown(times, name)) for name in LAYOUTS if name != best
    ]
