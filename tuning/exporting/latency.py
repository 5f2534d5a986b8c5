"""How long a forward pass takes on this machine: the original in torch, and its export."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tuning.exporting.formats import Network

BATCHES = (1, 8, 32)
ENOUGH_SECONDS, FEWEST = 20.0, 3  # a batch size that has taken so long ends with fewer repeats


def latencies(
    networks: Mapping[str, Network], inputs: Tensor, repeats: int, batches: Sequence[int] = BATCHES
) -> list[dict[str, Any]]:
    """Median milliseconds of a forward pass, one row a batch size: ``{"batch", "<name>": ms, ..., "repeats"}``.

    The networks take turns, so that a machine that gets slower or busy slows all of them, in an order drawn anew every
    round, so that none falls into step with what else runs there; the first round is not counted.

    Args:
        inputs: of all networks, at least as many as the largest of *batches*.
        repeats: passes of each network, at most; at least 1.
    """
    return [_row(networks, inputs[:batch].clone(), repeats) for batch in batches]


def _row(networks: Mapping[str, Network], inputs: Tensor, repeats: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    begun, done, draws = time.perf_counter(), 0, random.Random(0)
    with torch.inference_mode():
        for repeat in range(repeats + 1):
            for name in draws.sample(list(networks), len(networks)):
                start = time.perf_counter()
                networks[name](inputs)
                if repeat:
                    seconds[name].append(time.perf_counter() - start)
            done = repeat
            if done >= FEWEST and time.perf_counter() - begun > ENOUGH_SECONDS:
                break
    medians = {name: round(1000 * statistics.median(taken), 3) for name, taken in seconds.items()}
    return {"batch": len(inputs), **medians, "repeats": done}
