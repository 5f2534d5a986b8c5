"""What every process computed for its part of the images, put together: every image once, in the order of its rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor


def gathered(accelerator: Accelerator, parts: Sequence[tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], int]:
    """The columns of all processes on the CPU, ascending by row, without filler. All processes take part.

    Args:
        parts: batches of this process, each the same columns ``(B, ...)`` on its device: the last but one weights, 0
            for what does not count, the last rows of the dataset. Equally many of equal sizes on every process.

    Returns:
        the columns without the weights, ``(N, ...)``, their last the rows; and how many rows were dealt out, those that
        don't count included.
    """
    mine = tuple(torch.cat(column) for column in zip(*parts, strict=True))
    *columns, weights, rows = (column.cpu() for column in accelerator.gather(mine))
    dealt = len(rows.unique())
    counted = weights > 0
    rows = rows[counted]
    assert len(rows.unique()) == len(rows), "an image was counted twice"
    order = torch.argsort(rows)
    return (*(column[counted][order] for column in columns), rows[order]), dealt
