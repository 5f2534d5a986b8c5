"""Batches of uint8 pictures from worker processes, and the model's inputs made from them on the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tuning.data.images import UnreadableImage, decode
from tuning.data.sampling import EvalOrder, Item, TrainOrder
from tuning.data.sources import image_name
from tuning.data.transforms import Crop, Normalise, crop_seed, random_flips
from tuning.errors import UserError

REPLACEMENT_TRIES = 20


class Micro(NamedTuple):
    """What one forward pass needs, on the device.

    Attributes:
        inputs: normalised images ``(B, 3, S, S)`` or cached features ``(B, C)``, float32.
        labels: ``(B,)`` int64.
        weights: ``(B,)`` float32, 0 for filler.
        rows: of the dataset, ``(B,)`` int64, on the CPU.
    """

    inputs: Tensor
    labels: Tensor
    weights: Tensor
    rows: Tensor


@dataclass
class Batch:
    """One micro-batch as a worker hands it over: ``images`` ``(B, 3, S, S)`` uint8, channels-last."""

    images: Tensor
    labels: Tensor
    weights: Tensor
    index: Tensor
    epoch: int
    unreadable: list[str] = field(default_factory=list)

    def pin_memory(self) -> Batch:
        """Called by torch's loader so that copies to a GPU don't wait."""
        tensors = (self.images, self.labels, self.weights, self.index)
        images, labels, weights, index = (tensor.pin_memory() for tensor in tensors)
        return Batch(images, labels, weights, index, self.epoch, self.unreadable)


@dataclass(frozen=True)
class Pictures(Dataset[Batch]):
    """Decodes and crops whole micro-batches; stateless, so any worker may make any of them.

    Attributes:
        rows: dataset with the columns ``image`` (encoded) and ``label``.
        augment: ``none`` = the evaluation crop, else the strength of `Crop.random`.
        replace_unreadable: training takes the next readable picture instead; evaluation sets the weight to 0.
    """

    rows: Any
    crop: Crop
    augment: Literal["none", "light", "medium"]
    seed: int
    replace_unreadable: bool

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, items: list[Item]) -> Batch:
        size = self.crop.size
        images = torch.zeros((len(items), size, size, 3), dtype=torch.uint8)
        labels = torch.zeros(len(items), dtype=torch.int64)
        weights = torch.tensor([item.weight for item in items], dtype=torch.float32)
        unreadable: list[str] = []
        for place, item in enumerate(items):
            picture, label = self._read(item, unreadable)
            labels[place] = label
            if picture is None:
                weights[place] = 0.0
            else:
                images[place] = picture.permute(1, 2, 0)
        index = torch.tensor([item.row for item in items])
        return Batch(images.permute(0, 3, 1, 2), labels, weights, index, items[0].epoch, unreadable)

    def _read(self, item: Item, unreadable: list[str]) -> tuple[Tensor | None, int]:
        for offset in range(REPLACEMENT_TRIES if self.replace_unreadable else 1):
            row = self.rows[(item.row + offset) % len(self.rows)]
            try:
                return self._cut(decode(_source(row), min_side=self.crop.size), item), int(row["label"])
            except UnreadableImage as error:
                name, reason = image_name(row), str(error)
                unreadable.append(reason if reason.startswith(name) else f"{name}: {reason}")
        return None, int(row["label"])

    def _cut(self, picture: Tensor, item: Item) -> Tensor:
        if self.augment == "none":
            return self.crop.center(picture)
        return self.crop.random(picture, self.augment, crop_seed(self.seed, item.epoch, item.row))


def _source(row: dict[str, Any]) -> bytes | str:
    image = row["image"]
    return image["bytes"] if image["bytes"] is not None else image["path"]  # type: ignore[no-any-return]


def _as_is(batch: Any) -> Any:
    return batch


class _EpochBatches:
    """Batch sampler of one epoch from one step on; the loader asks it again at the start of every epoch."""

    def __init__(self, order: TrainOrder) -> None:
        self.order, self.epoch, self.first_step = order, 0, 0

    def __iter__(self) -> Iterator[list[Item]]:
        return self.order.micro_batches(self.epoch, self.first_step)


class _EvalBatches:
    def __init__(self, order: EvalOrder) -> None:
        self.order = order

    def __iter__(self) -> Iterator[list[Item]]:
        return self.order.micro_batches()


def _loader(
    pictures: Pictures, batches: Any, workers: int, device: torch.device, *, keep_workers: bool
) -> DataLoader[Batch]:
    return DataLoader(
        pictures,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=device.type == "cuda",
        persistent_workers=keep_workers and workers > 0,
    )


class TrainFeed:
    """Training batches of this process: decoded by workers; moved, flipped and normalised on the device.

    Attributes:
        order: which image goes where.
        unreadable: names and reasons of the pictures that were replaced on this process, growing.
    """

    def __init__(
        self,
        rows: Any,
        order: TrainOrder,
        crop: Crop,
        normalise: Normalise,
        *,
        augment: Literal["none", "light", "medium"],
        flip: Literal["none", "horizontal", "both"],
        workers: int,
        device: torch.device,
    ) -> None:
        self.order, self.unreadable = order, set[str]()
        self._normalise, self._flip, self._device = normalise, flip, device
        self._batches = _EpochBatches(order)
        pictures = Pictures(rows, crop, augment, order.seed, replace_unreadable=True)
        self._loader = _loader(pictures, self._batches, workers, device, keep_workers=True)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Micro]:
        """The micro-batches of an epoch from optimizer step *first_step* on."""
        self._batches.epoch, self._batches.first_step = epoch, first_step
        for batch in self._loader:
            self.unreadable.update(batch.unreadable)
            if len(batch.unreadable) >= REPLACEMENT_TRIES * len(batch.labels):
                raise UserError(
                    f"none of {len(batch.unreadable)} training pictures in a row could be read; the last: "
                    f"{batch.unreadable[-1]}"
                )
            yield self._to_device(batch)

    def _to_device(self, batch: Batch) -> Micro:
        images = batch.images.to(self._device, non_blocking=True)
        images = random_flips(images, self._flip, self.order.seed, batch.epoch, batch.index)
        return _micro(self._normalise(images), batch, self._device)


class EvalFeed:
    """Evaluation batches of this process: every image once over all processes, without augmentation."""

    def __init__(
        self, rows: Any, order: EvalOrder, crop: Crop, normalise: Normalise, *, workers: int, device: torch.device
    ) -> None:
        self.order, self.unreadable = order, set[str]()
        self._normalise, self._device = normalise, device
        pictures = Pictures(rows, crop, "none", 0, replace_unreadable=False)
        self._loader = _loader(pictures, _EvalBatches(order), workers, device, keep_workers=False)

    def __iter__(self) -> Iterator[Micro]:
        for batch in self._loader:
            self.unreadable.update(batch.unreadable)
            images = batch.images.to(self._device, non_blocking=True)
            yield _micro(self._normalise(images), batch, self._device)


def _micro(inputs: Tensor, batch: Batch, device: torch.device) -> Micro:
    labels = batch.labels.to(device, non_blocking=True)
    return Micro(inputs, labels, batch.weights.to(device, non_blocking=True), batch.index)


class FeatureFeed:
    """Training batches from features computed once: the same order of images, no workers.

    Args:
        features: ``(N, C)`` float32 on the device, row i for image i.
        labels: ``(N,)`` int64 on the device.
        unreadable: names of the pictures whose row is another's.
    """

    def __init__(self, features: Tensor, labels: Tensor, order: TrainOrder, unreadable: set[str]) -> None:
        self.order, self.unreadable = order, unreadable
        self._features, self._labels = features, labels

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Micro]:
        """The micro-batches of an epoch from optimizer step *first_step* on."""
        for items in self.order.micro_batches(epoch, first_step):
            index = torch.tensor([item.row for item in items])
            weights = torch.tensor([item.weight for item in items], dtype=torch.float32)
            chosen = index.to(self._features.device)
            yield Micro(self._features[chosen], self._labels[chosen], weights.to(chosen.device), index)


Feed = TrainFeed | FeatureFeed
