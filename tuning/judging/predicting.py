"""The logits of every picture, each once, on any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from tuning.data.broken import Broken, Unreadable
from tuning.data.loader import EvalFeed
from tuning.data.tables import Table
from tuning.errors import UserError
from tuning.feeds import EVAL_BATCH, judging_feed
from tuning.judging.gathering import gathered
from tuning.models.build import ModelInfo
from tuning.safety.out_of_memory import InParts

GPU_BATCH = 256
BATCHES = 32  # of every process between two exchanges: what is kept on a device meanwhile


def judging_batch(asked: int | Literal["auto"], device: torch.device) -> int:
    """Pictures per forward pass per process: ``--micro-batch``, or what keeps the device busy."""
    if asked != "auto":
        return asked
    return EVAL_BATCH if device.type == "cpu" else GPU_BATCH


@dataclass(frozen=True)
class Predictions:
    """What a model says about pictures; the same on every process.

    Attributes:
        logits: ``(N, K)`` float32 on the CPU.
        labels: ``(N,)`` int64, as the dataset has them.
        rows: of the dataset, ``(N,)`` int64, ascending.
        unreadable: the pictures that are missing among them, by row.
    """

    logits: Tensor
    labels: Tensor
    rows: Tensor
    unreadable: tuple[Broken, ...]


def predict_all(
    accelerator: Accelerator,
    model: nn.Module,
    info: ModelInfo,
    rows: Table,
    *,
    workers: int,
    folder: str | None = None,
    batch_size: int = EVAL_BATCH,
    forward: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Predictions:
    """Logits of all *rows*, with the evaluation crop of *info*. All processes take part.

    Args:
        model: the raw model on the accelerator's device; left in evaluation mode.
        folder: that all pictures lie in; None where they are no files of their own.
        batch_size: pictures per forward pass per process.
        forward: called in place of *model*, ``(B, 3, S, S) -> (B, K)``; one that calls it more than once, for example.
        progress: told now and then how many rows are done.

    Raises:
        UserError: not one picture could be read.
    """
    model.eval()
    feed = judging_feed(accelerator, rows, info.input_size, info, workers, Unreadable(folder), batch_size)
    parts: list[Predictions] = []
    for part in stream(accelerator, forward or model, feed, BATCHES):
        parts.append(part)
        progress(sum(len(p.rows) + len(p.unreadable) for p in parts))
    logits, labels, index = in_order(parts)
    unreadable = tuple(broken for part in parts for broken in part.unreadable)
    if not len(index):
        raise UserError(f"none of the {len(rows)} pictures could be read; the first: {unreadable[0]}.")
    seen = len(index) + len(unreadable)
    assert seen == len(rows), f"{seen} of {len(rows)} images were predicted"
    return Predictions(logits, labels, index, unreadable)


def in_order(parts: Sequence[Predictions]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and rows of all *parts*, ascending by row."""
    index = torch.cat([part.rows for part in parts])
    order = torch.argsort(index)
    return torch.cat([p.logits for p in parts])[order], torch.cat([p.labels for p in parts])[order], index[order]


def stream(
    accelerator: Accelerator, forward: Callable[[Tensor], Tensor], feed: EvalFeed, batches: int = BATCHES
) -> Iterator[Predictions]:
    """The same piece by piece: memory doesn't grow with their number.

    Each piece has the next rows of the dataset, or with `EvalOrder.together` the next rows of every process.

    Args:
        forward: normalised images ``(B, 3, S, S)`` -> logits ``(B, K)``.
        batches: of every process in a piece.
    """
    whole, known = InParts(forward), set[int]()
    parts: list[tuple[Tensor, ...]] = []
    with torch.inference_mode(), accelerator.autocast():
        for micro in feed:
            logits = whole(micro.inputs).float()
            parts.append((logits, micro.labels, micro.weights, micro.rows.to(logits.device, non_blocking=True)))
            if len(parts) == batches:  # at the same moment on every process
                yield _piece(accelerator, parts, feed.unreadable, known)
                parts = []
        if parts:
            yield _piece(accelerator, parts, feed.unreadable, known)


def _piece(
    accelerator: Accelerator, parts: list[tuple[Tensor, ...]], unreadable: Unreadable, known: set[int]
) -> Predictions:
    (logits, labels, rows), dealt = gathered(accelerator, parts)
    broken: dict[int, Broken] = {}
    if dealt > len(rows):  # filler, or pictures without a result: the same on every process
        broken = {one.row: one for one in gather_object(list(unreadable.found.values())) if one.row not in known}
        unreadable.found.clear()
        known.update(broken)
    return Predictions(logits, labels, rows, tuple(broken[row] for row in sorted(broken)))
