"""Batches of uint8 pictures from worker processes, and the model's inputs made from them on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tuning.data.ahead import to_evaluate, to_train
from tuning.data.broken import Unreadable
from tuning.data.erasing import Erasing, erased
from tuning.data.mixing import Mix, Mixing, mixed
from tuning.data.pictures import REPLACEMENT_TRIES, Batch, Pictures
from tuning.data.sampling import EvalOrder, Item, TrainOrder, drawn_size
from tuning.data.transforms import Crop, Normalise, random_flips
from tuning.data.workers import WorkerLoader
from tuning.errors import UserError
from tuning.flags import AugmentName

MOST_THREADS = 8  # beyond that the interpreter is what they wait for
CHECK_EVERY = 32  # evaluation batches between looks at the number of unreadable pictures


class Micro(NamedTuple):
    """What one forward pass needs, on the device.

    Attributes:
        inputs: normalised images ``(B, 3, S, S)`` or cached features ``(B, C)``, float32.
        labels: ``(B,)`` int64.
        weights: ``(B,)`` float32, 0 for filler.
        rows: of the dataset, ``(B,)`` int64, on the CPU.
        others: labels of what each image was mixed with, ``(B,)`` int64; None = nothing was mixed.
        shares: of the image's own label where it was mixed, ``(B,)`` float32.
    """

    inputs: Tensor
    labels: Tensor
    weights: Tensor
    rows: Tensor
    others: Tensor | None = None
    shares: Tensor | None = None


class _EpochBatches:
    """Batch sampler of one epoch from one step on; the loader asks it again at the start of every epoch.

    All copies of a feed share it, and with it the order.
    """

    def __init__(self, order: TrainOrder, rows: Any = None) -> None:
        self.order, self.rows, self.epoch, self.first_step = order, rows, 0, 0
        self.shrunk_to: int | None = None

    def shrink(self) -> bool:
        """Halve the micro-batches from here on; False if they have one image."""
        smaller = self.order.batch.smaller
        if smaller is None:
            return False
        self.order, self.shrunk_to = replace(self.order, batch=smaller), smaller.micro_batch
        return True

    def __iter__(self) -> Iterator[list[Item]]:
        return to_train(self.rows, self.order, self.epoch, self.first_step)


class _EvalBatches:
    def __init__(self, order: EvalOrder, rows: Any) -> None:
        self.order, self.rows = order, rows

    def __iter__(self) -> Iterator[list[Item]]:
        return to_evaluate(self.rows, self.order)


def threads_beside(workers: int) -> int:
    """Threads that make a batch: without workers those that train, which wait for it; one in a worker."""
    return 1 if workers else min(MOST_THREADS, torch.get_num_threads())


def _note(batch: Batch, unreadable: Unreadable) -> None:
    if batch.gone:
        raise UserError(
            f"the pictures in {unreadable.folder} can't be read any more: {batch.gone}. Bring the folder back (is its "
            "disk mounted?) and go on with --resume auto."
        )
    unreadable.found.update((broken.row, broken) for broken in batch.unreadable)


class _Feed:
    """What training batches are dealt out by; their size gets smaller where memory runs out."""

    _batches: _EpochBatches

    @property
    def order(self) -> TrainOrder:
        """Which image goes where."""
        return self._batches.order

    @property
    def shrunk_to(self) -> int | None:
        """Images of a micro-batch since memory ran out; None before."""
        return self._batches.shrunk_to

    def shrink(self) -> bool:
        """Make the micro-batches of the next `epoch` smaller, its optimizer steps stay; False if they have one image.

        An iterator that is still under way is of no use afterwards.
        """
        return self._batches.shrink()

    def image_size(self, step: int) -> int | None:
        """Side of the pictures in optimizer step *step* of the run, where steps draw it; else None."""
        return None


class TrainFeed(_Feed):
    """Training batches of this process, decoded by workers; on the device flipped, normalised, mixed and erased.

    Where there are *sizes*, every optimizer step draws one of them, and the device resizes what workers have cut at the
    size of *crop*, the largest.

    Attributes:
        unreadable: the pictures that were replaced on this process.
    """

    def __init__(
        self,
        rows: Any,
        order: TrainOrder,
        crop: Crop,
        normalise: Normalise,
        *,
        augment: AugmentName,
        flip: Literal["none", "horizontal", "both"],
        workers: int,
        device: torch.device,
        unreadable: Unreadable | None = None,
        mixing: Mixing | None = None,
        erasing: Erasing | None = None,
        sizes: Sequence[int] = (),
    ) -> None:
        assert not sizes or crop.size == max(sizes)
        self.unreadable = unreadable or Unreadable()
        self._erasing = erasing
        self._normalise, self._flip, self._device, self._mixing = normalise, flip, device, mixing
        self._crop, self._sizes = crop, tuple(sorted(sizes))
        self._batches = _EpochBatches(order, rows)
        folder, threads = self.unreadable.folder, threads_beside(workers)
        pictures = Pictures(rows, crop, augment, order.seed, replace_unreadable=True, folder=folder, threads=threads)
        self._pictures = pictures
        self._loader = WorkerLoader(pictures, self._batches, workers, keep=True, pin=device.type == "cuda")

    def image_size(self, step: int) -> int | None:
        """Side of the pictures in optimizer step *step* of the run, where steps draw it; else None."""
        return drawn_size(self._sizes, self.order.seed, step) if self._sizes else None

    def epoch(self, epoch: int, first_step: int = 0, run_step: int = 0) -> Iterator[Micro]:
        """The micro-batches of an epoch from optimizer step *first_step* on, which is *run_step* of the run."""
        self._batches.epoch, self._batches.first_step = epoch, first_step
        for batch, step in zip(self._loader, self._steps(first_step, run_step), strict=True):
            _note(batch, self.unreadable)
            if len(batch.unreadable) >= REPLACEMENT_TRIES * len(batch.labels):
                raise UserError(
                    f"none of {len(batch.unreadable)} training pictures in a row could be read; the last: "
                    f"{batch.unreadable[-1]}. Check --data."
                )
            yield self._to_device(batch, self.image_size(step))

    def sample(self, epoch: int, step: int, count: int, run_step: int = 0) -> Micro:
        """The first *count* images, or fewer, of an optimizer step's first micro-batch, made in this process.

        Nothing of the feed moves, and nothing is noted.
        """
        items = next(self.order.micro_batches(epoch, step))
        batch = self._pictures.__getitems__(items[: count + 1])  # the next is the last one's partner
        micro = self._to_device(batch, self.image_size(run_step))
        return Micro(*(None if part is None else part[:count] for part in micro))  # type: ignore[arg-type]

    def shown(self, inputs: Tensor) -> Tensor:
        """Inputs of the model as pictures in [0, 1], float32: without the normalisation."""
        return self._normalise.undone(inputs)

    def _steps(self, first_step: int, run_step: int) -> Iterator[int]:
        """The step of the run that every micro-batch belongs to."""
        order = self.order
        for step in range(first_step, order.steps_per_epoch):
            yield from [run_step + step - first_step] * order.batch.micro_steps(order.images_in(step))

    def _to_device(self, batch: Batch, size: int | None) -> Micro:
        images = batch.images.to(self._device, non_blocking=True)
        if size is not None:
            images = self._crop.resized(images, size)
        images = random_flips(images, self._flip, self.order.seed, batch.epoch, batch.draws)
        micro = _micro(self._normalise(images), batch, self._device)
        if self._mixing is not None:
            micro = _mixed(micro, batch, self._mixing)
        return micro if self._erasing is None else _erased(micro, batch, self._erasing)


class EvalFeed:
    """Evaluation batches of this process: every image once over all processes, without augmentation.

    Attributes:
        unreadable: the pictures of weight 0 on this process; its check is made every `CHECK_EVERY` batches.
    """

    def __init__(
        self,
        rows: Any,
        order: EvalOrder,
        crop: Crop,
        normalise: Normalise,
        *,
        workers: int,
        device: torch.device,
        unreadable: Unreadable | None = None,
    ) -> None:
        self.order, self.unreadable = order, unreadable or Unreadable()
        self._normalise, self._device = normalise, device
        folder, threads = self.unreadable.folder, threads_beside(workers)
        pictures = Pictures(rows, crop, "none", 0, replace_unreadable=False, folder=folder, threads=threads)
        self._loader = WorkerLoader(pictures, _EvalBatches(order, rows), workers, keep=False, pin=device.type == "cuda")

    def __iter__(self) -> Iterator[Micro]:
        for number, batch in enumerate(self._loader, start=1):
            _note(batch, self.unreadable)
            if number % CHECK_EVERY == 0:  # as many batches on every process
                self.unreadable.check()
            images = batch.images.to(self._device, non_blocking=True)
            yield _micro(self._normalise(images), batch, self._device)


def _micro(inputs: Tensor, batch: Batch, device: torch.device) -> Micro:
    labels = batch.labels.to(device, non_blocking=True)
    return Micro(inputs, labels, batch.weights.to(device, non_blocking=True), batch.index)


def _mixed(micro: Micro, batch: Batch, mixing: Mixing) -> Micro:
    drawn = mixing.draw(batch.epoch, batch.draws.numpy(), batch.weights.numpy() > 0, micro.inputs.shape[-1])
    mix = Mix(*(values.to(micro.inputs.device, non_blocking=True) for values in drawn))
    return micro._replace(inputs=mixed(micro.inputs, mix), others=micro.labels[mix.partners], shares=mix.shares)


def _erased(micro: Micro, batch: Batch, erasing: Erasing) -> Micro:
    height, width = micro.inputs.shape[-2:]
    boxes = torch.from_numpy(erasing.boxes(batch.epoch, batch.draws.numpy(), (height, width)))
    return micro._replace(inputs=erased(micro.inputs, boxes.to(micro.inputs.device, non_blocking=True)))


class FeatureFeed(_Feed):
    """Training batches from features computed once: the same order of images, no workers.

    Args:
        features: ``(N, C)`` float32 on the device, row i for image i.
        labels: ``(N,)`` int64 on the device.
        more: of further views of the same images: epoch n takes view n modulo their number.
    """

    def __init__(self, features: Tensor, labels: Tensor, order: TrainOrder, more: Sequence[Tensor] = ()) -> None:
        self._batches = _EpochBatches(order)
        self._labels, self._views = labels, (features, *more)

    def epoch(self, epoch: int, first_step: int = 0, run_step: int = 0) -> Iterator[Micro]:
        """The micro-batches of an epoch from optimizer step *first_step* on."""
        features = self._views[epoch % len(self._views)]
        for rows, reals in self.order.indices(epoch, first_step):
            index, weights = torch.from_numpy(rows), torch.from_numpy(reals)
            chosen = index.to(features.device)
            yield Micro(features[chosen], self._labels[chosen], weights.to(chosen.device), index)


Feed = TrainFeed | FeatureFeed
