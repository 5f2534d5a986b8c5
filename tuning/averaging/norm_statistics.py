"""Running statistics of BatchNorm taken anew from training images, for an evaluation; training keeps its own.

Every layer's mean and variance over all images, with each batch normalised by itself below it: "precise BatchNorm" (Wu
and Johnson 2021, arXiv:2105.07576). Batches are the same on any number of processes, and so is the result, bit for bit
where the forward passes are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tuning.averaging.batch_norm import apart, norms
from tuning.data.broken import Unreadable
from tuning.data.loader import EvalFeed, Micro
from tuning.data.local_order import train_order
from tuning.data.sampling import SameBatches
from tuning.data.sources import Data
from tuning.data.streamed import StreamedRows
from tuning.data.tables import Table, in_memory, take
from tuning.data.transforms import Crop, Normalise
from tuning.models.build import ModelInfo
from tuning.sizes import BatchPlan

IMAGES = 2048  # where they are needed and nobody said how many
BATCH = 64  # images whose statistics normalise one another; all of a process's in one forward pass


class NormStatistics:
    """Takes running statistics anew. All processes use it at the same moments.

    Args:
        images: of the training data, the first of a random order, or all where there are fewer; None = `IMAGES`.

    Attributes:
        wanted: somebody has asked for them, for whatever is evaluated.
    """

    def __init__(
        self, accelerator: Accelerator, data: Data, info: ModelInfo, workers: int, seed: int, images: int | None
    ) -> None:
        self._accelerator, self._data, self._info, self._workers, self._seed = accelerator, data, info, workers, seed
        self._images = min(images or IMAGES, len(data.train))
        self.wanted = images is not None

    @contextmanager
    def estimated(self, model: nn.Module, names: Collection[str], image_size: int) -> Iterator[None]:
        """In the body the buffers *names* hold what the images say, after it what they held before, bit for bit.

        Args:
            model: the raw model.
            names: of running statistics; those of other layers serve as they are.
            image_size: pixels.
        """
        known = norms(model)
        layers = {prefix: known[prefix] for prefix in dict.fromkeys(name.rpartition(".")[0] for name in names)}
        buffers = [named for layer in layers.values() for named in layer.named_buffers(recurse=False)]
        held = [(name, buffer, buffer.clone()) for name, buffer in buffers]
        try:
            if layers:
                self._estimate(model, list(layers.values()), image_size)
            for name, buffer, before in held:
                if not name.startswith("running_"):  # counters
                    buffer.copy_(before)
            yield
        finally:
            for _, buffer, before in held:
                buffer.copy_(before)

    def _estimate(self, model: nn.Module, layers: list[nn.Module], image_size: int) -> None:
        seen: list[list[Tensor]] = [[] for _ in layers]
        real: list[bool] = []
        hooks = [
            layer.register_forward_pre_hook(partial(_note, into)) for layer, into in zip(layers, seen, strict=True)
        ]
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        for layer in layers:
            layer.training = True
        try:
            with apart(model), torch.no_grad(), self._accelerator.autocast():
                for micro in self._feed(image_size):
                    inputs, counts = _counted(micro)
                    real.append(counts)
                    model(inputs)
        finally:
            for hook in hooks:
                hook.remove()
            for module, training in modes:
                module.training = training
        for layer, moments in zip(layers, seen, strict=True):
            if moments:  # a layer may be left out of the forward pass
                _set(layer, *self._pooled(moments, real))

    def _pooled(self, moments: list[Tensor], real: list[bool]) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance ``(C,)`` of what all processes saw, in the order of the batches."""
        calls = len(moments) // len(real)
        counted = [counts for counts in real for _ in range(calls)]
        mine = torch.stack([one * float(counts) for one, counts in zip(moments, counted, strict=True)])
        every = self._accelerator.gather(mine[None]).cpu().double()
        in_order = every.unflatten(1, (len(real), calls)).transpose(0, 1).flatten(0, 2)
        count, mean, variance = in_order[:, 0], in_order[:, 1], in_order[:, 2]
        total = count.sum(0)
        overall = (count * mean).sum(0) / total
        within, between = (count * variance).sum(0), (count * (mean - overall).square()).sum(0)
        return overall, (within + between) / (total - 1).clamp(min=1)

    def _feed(self, image_size: int) -> EvalFeed:
        """Batches of this process, with the evaluation crop; as many on every process."""
        rank, processes = self._accelerator.process_index, self._accelerator.num_processes
        return EvalFeed(
            self._rows,
            SameBatches(len(self._rows), BATCH, rank, processes),
            Crop(image_size, self._info.interpolation, self._info.crop_pct),
            Normalise(self._info.mean, self._info.std),
            workers=self._workers,
            device=self._accelerator.device,
            unreadable=Unreadable(self._data.folder),
        )

    @cached_property
    def _rows(self) -> Table:
        """A random sample of the training data; streamed rows are read once and kept."""
        train, images = self._data.train, self._images
        blocks = train.blocks if isinstance(train, StreamedRows) else None
        drawn = np.array(train_order(len(train), self._seed, BatchPlan(images, images, 1), 0, blocks).rows(0, 0))
        if not isinstance(train, StreamedRows):
            return take(train, drawn)
        return take(in_memory(take(train, np.sort(drawn)), self._data.classes), np.argsort(np.argsort(drawn)))


def _counted(micro: Micro) -> tuple[Tensor, bool]:
    """The pictures of a batch that could be read, and whether they count: filler goes through the model for nothing."""
    readable = micro.weights > 0
    counts = int(readable.sum()) > 1
    return (micro.inputs[readable] if counts else micro.inputs), counts


def _note(into: list[Tensor], layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Number of values, mean and biased variance of each channel, ``(3, C)``."""
    values = inputs[0].detach().float()
    variance, mean = torch.var_mean(values, [0, *range(2, values.dim())], correction=0)
    into.append(torch.stack((torch.full_like(mean, values.numel() / len(mean)), mean, variance)))


def _set(layer: nn.Module, mean: Tensor, variance: Tensor) -> None:
    buffers = dict(layer.named_buffers(recurse=False))
    buffers["running_mean"].copy_(mean)
    buffers["running_var"].copy_(variance)
