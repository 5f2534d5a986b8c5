"""How long a forward pass takes on this machine: the original in torch, and its export."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tuning.exporting.formats import Network

BATCHES = (1, 8, 32)


class Timed(NamedTuple):
    """A network and what it takes for a given number of images."""

    network: Network
    inputs: Mapping[int, Tensor]


def latencies(timed: Mapping[str, Timed], repeats: int, batches: Sequence[int] = BATCHES) -> list[dict[str, Any]]:
    """Median milliseconds of a forward pass, one row a batch size: ``{"batch", "<name>": ms, ...}``.

    The networks take turns, so that a machine that gets slower or busy slows all of them; the first round is not
    counted.
    """
    table = []
    for batch in batches:
        seconds: dict[str, list[float]] = {name: [] for name in timed}
        with torch.inference_mode():
            for repeat in range(repeats + 1):
                for name, (network, inputs) in timed.items():
                    start = time.perf_counter()
                    network(inputs[batch])
                    if repeat:
                        seconds[name].append(time.perf_counter() - start)
        row = {name: round(1000 * statistics.median(taken), 3) for name, taken in seconds.items()}
        table.append({"batch": batch, **row})
    return table
