"""Encoded pictures to micro-batches of uint8, in whichever process reads them."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tuning.data.broken import Broken, why_gone
from tuning.data.cached import CachedRows
from tuning.data.images import UnreadableImage, decode
from tuning.data.sampling import Item
from tuning.data.sources import image_name
from tuning.data.transforms import Crop, crop_seeds
from tuning.flags import AugmentName

REPLACEMENT_TRIES = 20
_one_at_a_time = threading.Lock()  # a dataset is not made for several threads, and a row costs little


@cache
def _pool(count: int, _process: int) -> ThreadPoolExecutor:
    """Threads of this process; a forked one has none of its parent's."""
    return ThreadPoolExecutor(count, "pictures")


@dataclass
class Batch:
    """One micro-batch as a worker hands it over: ``images`` ``(B, 3, S, S)`` uint8, channels-last.

    `index` holds the rows; `draws` what seeds the draws of each picture (`Item.draw`). `gone` says why
    nothing in the data folder could be read.
    """

    images: Tensor
    labels: Tensor
    weights: Tensor
    index: Tensor
    draws: Tensor
    epoch: int
    unreadable: list[Broken] = field(default_factory=list)
    gone: str | None = None

    def pin_memory(self) -> Batch:
        """Called by torch's loader so that copies to a GPU don't wait."""
        tensors = (self.images, self.labels, self.weights, self.index)
        images, labels, weights, index = (tensor.pin_memory() for tensor in tensors)
        return Batch(images, labels, weights, index, self.draws, self.epoch, self.unreadable, self.gone)


@dataclass(frozen=True)
class Pictures(Dataset[Batch]):
    """Decodes and crops whole micro-batches; stateless, so any worker may make any of them.

    Attributes:
        rows: dataset with the columns ``image`` (encoded) and ``label``; of `CachedRows` pictures are taken as kept.
        augment: ``none`` = the evaluation crop, else the strength of `Crop.random`.
        replace_unreadable: training takes the next readable picture instead; evaluation sets the weight to 0.
        folder: that all pictures lie in; None where they are no files of their own.
        threads: that decode and crop a micro-batch together; the pictures are the same with any number.
    """

    rows: Any
    crop: Crop
    augment: AugmentName
    seed: int
    replace_unreadable: bool
    folder: str | None = None
    threads: int = 1

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, items: list[Item]) -> Batch:
        size = self.crop.size
        images = torch.zeros((len(items), size, size, 3), dtype=torch.uint8)
        labels = torch.zeros(len(items), dtype=torch.int64)
        weights = torch.tensor([item.weight for item in items], dtype=torch.float32)
        index = torch.tensor([item.row for item in items])
        draws = torch.tensor([item.draw for item in items])
        seeds = crop_seeds(self.seed, items[0].epoch, draws.numpy())

        mode = torch.is_inference_mode_enabled()

        def make(place: int) -> list[Broken]:
            """Fill one place of the batch; what could not be read on the way."""
            unreadable: list[Broken] = []
            with torch.inference_mode(mode):  # every thread has its own
                picture, labels[place] = self._read(items[place], unreadable)
                if picture is None:
                    weights[place] = 0.0
                elif self.augment == "none":
                    self.crop.center(picture, out=images[place])
                else:
                    self.crop.random(picture, self.augment, seeds[place], out=images[place])
            return unreadable

        places = range(len(items))
        made = _pool(self._threads, os.getpid()).map(make, places) if self._threads > 1 else map(make, places)
        unreadable = [broken for found in made for broken in found]
        gone = why_gone(self.folder) if unreadable and self.folder else None
        return Batch(images.permute(0, 3, 1, 2), labels, weights, index, draws, items[0].epoch, unreadable, gone)

    @property
    def _threads(self) -> int:
        """Threads that share a micro-batch: one where pictures are in a store, or draw from torch's own generator."""
        alone = isinstance(self.rows, CachedRows) or (self.augment != "none" and self.crop.operations is not None)
        return 1 if alone else self.threads

    def _read(self, item: Item, unreadable: list[Broken]) -> tuple[Tensor | None, int]:
        """The picture of an item, or the next readable one, or None; and its label."""
        label = 0
        for offset in range(REPLACEMENT_TRIES if self.replace_unreadable else 1):
            number = (item.row + offset) % len(self.rows)
            if isinstance(self.rows, CachedRows):
                row, label = None, int(self.rows.labels[number])
            else:
                row = item.content if item.content and not offset else self._row(number)
                label = int(row["label"])
            try:
                return self._picture(number, row), label
            except UnreadableImage as error:
                unreadable.append(Broken(number, image_name(row or self._row(number), number), error.reason))
        return None, label

    def _row(self, number: int) -> Mapping[str, Any]:
        with _one_at_a_time:
            return self.rows[number]  # type: ignore[no-any-return]

    def _picture(self, number: int, row: Mapping[str, Any] | None) -> Tensor:
        return self.rows.picture(number) if row is None else decode(_source(row), min_side=self.crop.size)  # type: ignore[no-any-return]


def _source(row: Mapping[str, Any]) -> bytes | str:
    image = row["image"]
    return image["bytes"] if image["bytes"] is not None else image["path"]  # type: ignore[no-any-return]
