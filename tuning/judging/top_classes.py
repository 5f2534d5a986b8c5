"""The most probable classes of each picture, chosen on the device: little has to leave it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tuning.data.broken import Broken
from tuning.errors import UserError
from tuning.judging.prediction_files import columns


def top_classes(model: Callable[[Tensor], Tensor], top_k: int, temperature: float) -> Callable[[Tensor], Tensor]:
    """``(B, 3, S, S) -> (B, 2 * top_k)``: probabilities, highest first, then the numbers of their classes.

    Args:
        temperature: the logits are divided by it first.
    """

    def forward(images: Tensor) -> Tensor:
        best = (model(images).float() / temperature).softmax(dim=1).topk(top_k, dim=1)
        return torch.cat((best.values, best.indices.float()), dim=1)  # exact up to 2^24 classes

    return forward


def refuse_too_many(top_k: int, classes: int) -> None:
    """Refuse to name more classes than there are.

    Raises:
        UserError: names both numbers.
    """
    if top_k > classes:
        raise UserError(f"--top-k {top_k}: the model has {classes} classes. Give at most {classes}.")


def records(
    best: Tensor, rows: Tensor, unreadable: Sequence[Broken], paths: Sequence[str], classes: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """A row of the output for every picture in the order of the inputs; those without a result have an ``error``.

    Args:
        best: from `top_classes`, ``(N, 2 * top_k)``.
        rows: of *paths*, ``(N,)``.
    """
    top_k = best.shape[1] // 2
    names = columns(top_k)
    values, numbers = best[:, :top_k].tolist(), best[:, top_k:].long().tolist()
    made = dict(zip(rows.tolist(), zip(values, numbers, strict=True), strict=True))
    reasons = {broken.row: broken.reason for broken in unreadable}
    for row in sorted({*made, *reasons}):
        pairs: list[Any] = [None] * (2 * top_k)
        if row in made:
            pairs = [x for p, number in zip(*made[row], strict=True) for x in (classes[number], p)]
        yield dict(zip(names, (paths[row], *pairs, reasons.get(row)), strict=True))
