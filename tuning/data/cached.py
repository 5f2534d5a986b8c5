"""Rows whose pictures are decoded once, made smaller and kept for later epochs, processes and runs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from tuning.data.images import decode
from tuning.data.picture_store import PictureStore, Stamp
from tuning.data.reduction import Reduction

# Torch can't hold memory that must not be written to; nothing here writes to its input.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


class CachedRows:
    """A dataset with the columns ``image`` (encoded) and ``label``, and the pixels of its pictures.

    A row is the dataset's own, as without a cache; `picture` is quick. Unreadable pictures are never kept, so that they
    show in every run.

    Args:
        rows: of the dataset.
        labels: of *rows*, ``(N,)``.
        store: where pictures are kept, by `numbers`.
        reduction: what is done to a picture before it is kept, and to one that can't be kept.
        outlives: the store outlives the run, so pictures in files may have changed since.
        numbers: of the rows in the store; None = as they are numbered here.
    """

    def __init__(
        self,
        rows: Dataset,
        labels: np.ndarray,
        store: PictureStore,
        reduction: Reduction,
        *,
        outlives: bool,
        numbers: np.ndarray | None = None,
    ) -> None:
        self.rows, self.labels, self.store, self.reduction = rows, labels, store, reduction
        self._outlives, self._numbers = outlives, numbers
        self._looked_at = bytearray(len(rows) if outlives else 0)  # by this process

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.rows[row]  # type: ignore[no-any-return]

    def taken(self, rows: Dataset, indices: np.ndarray) -> CachedRows:
        """The rows *indices*, which are *rows* of their own, with the same store."""
        numbers = np.arange(len(self)) if self._numbers is None else self._numbers
        return CachedRows(
            rows, self.labels[indices], self.store, self.reduction, outlives=self._outlives, numbers=numbers[indices]
        )

    def picture(self, row: int) -> Tensor:
        """``(H, W, 3)`` uint8, decoded and reduced: the same pixels whether it was kept or not. Not to be written to.

        Raises:
            UnreadableImage: it isn't kept and can't be decoded.
        """
        number = row if self._numbers is None else int(self._numbers[row])
        look = self._outlives and not self._looked_at[row]
        image, stamp = None, None
        if look:
            image = self.rows[row]["image"]
            stamp = _stamp(image)
        kept = self.store.find(number, stamp)
        if kept is None:
            return self._decoded(row, number, image or self.rows[row]["image"])
        if look:
            self._looked_at[row] = True
        return torch.from_numpy(kept)

    def _decoded(self, row: int, number: int, image: Mapping[str, Any]) -> Tensor:
        stamp = _stamp(image)  # before it is read: what changes in between is then seen to have changed
        source = image["bytes"] if image["bytes"] is not None else image["path"]
        picture = self.reduction(decode(source, min_side=self.reduction.min_side))
        self.store.add(number, stamp, picture.numpy())
        return picture


def _stamp(image: Mapping[str, Any]) -> Stamp:
    """Size and time of change of a picture that is a file of its own; none for one in a table, or gone."""
    if image["bytes"] is not None:
        return len(image["bytes"]), 0
    try:
        status = os.stat(image["path"])
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns
