"""Features computed once: what the closed layers make of every image, so that epochs cost the open layers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tuning.data.loader import Micro, TrainFeed
from tuning.data.sampling import EvalOrder, TrainOrder
from tuning.errors import UserError
from tuning.frozen import casting
from tuning.open_part import HeadOnly, Part, pooled
from tuning.safety.out_of_memory import InParts

CHECKED = 4  # images whose logits say whether the head classifies pooled features


class EveryImage(Protocol):
    """Batches of this process that have every image once over all processes, and filler of weight 0."""

    @property
    def order(self) -> EvalOrder | TrainOrder:
        """Which image goes where."""

    def __iter__(self) -> Iterator[Micro]: ...


@dataclass(frozen=True)
class View:
    """The augmented images of one epoch of a feed that takes every image once an epoch."""

    feed: TrainFeed
    epoch: int

    @property
    def order(self) -> TrainOrder:
        """Which image goes where."""
        return self.feed.order

    def __iter__(self) -> Iterator[Micro]:
        return self.feed.epoch(self.epoch)


class Computed(NamedTuple):
    """What was computed once of every image, in the order of the dataset, on the device.

    Attributes:
        features: ``(N, ...)`` float32. A picture that can't be read has the row of the next one, as in training.
        labels: ``(N,)`` int64, of the same rows.
        read: ``(N,)`` bool, whether the picture itself could be read: others don't count in an evaluation.
    """

    features: Tensor
    labels: Tensor
    read: Tensor


def compute_features(
    accelerator: Accelerator, model: nn.Module, feed: EveryImage, forward: str | None = None, part: Part | None = None
) -> Computed:
    """What *part* takes for all images, and labels, on every process; leaves the model in evaluation mode.

    Args:
        forward: how the model is run (`tuning.frozen`); None = in the precision of training.
        part: of the model; None = its head, which takes pooled features.

    Raises:
        UserError: the model's head does more than classify pooled features.
    """
    part = part or HeadOnly(model)
    return _every_image(accelerator, feed, forward, lambda images: part.below(model, images), model, part)


def pooled_features(accelerator: Accelerator, model: nn.Module, feed: EveryImage, part: nn.Module) -> Computed:
    """Pooled features ``(N, C)`` and labels, as `compute_features`, of a feed that gives what *part* takes.

    Args:
        part: of the model, or the model itself.
    """
    below = part.pooled if isinstance(part, Part) else lambda images: pooled(model, images)
    return _every_image(accelerator, feed, None, below, part, HeadOnly(model))


def _every_image(
    accelerator: Accelerator,
    feed: EveryImage,
    forward: str | None,
    below: Callable[[Tensor], Tensor],
    whole: nn.Module,
    above: nn.Module,
) -> Computed:
    """What *below* makes of every image; *above* must make of that what *whole* makes of the image."""
    whole.eval()
    lower, parts = InParts(below), list[tuple[Tensor, ...]]()
    cast = accelerator.autocast() if forward is None else casting(accelerator.device, forward)
    with torch.inference_mode(), cast:
        for number, micro in enumerate(feed):
            made = lower(micro.inputs)
            if number == 0:
                _check_split(whole, above, micro.inputs[:CHECKED], made[:CHECKED])
            index = micro.rows.to(made.device, non_blocking=True)
            parts.append((made.float(), micro.labels, micro.weights, index))
    mine = tuple(torch.cat(column) for column in zip(*parts, strict=True))
    features, labels, weights, index = accelerator.gather(mine)
    assert len(index.unique()) == feed.order.images, "pictures are missing from the features"
    return _in_order(features, labels, weights > 0, index, feed.order.images)


def _check_split(whole: nn.Module, above: nn.Module, inputs: Tensor, made: Tensor) -> None:
    expected = InParts(whole)(inputs).float()
    try:
        split = above.eval()(made).float()
        same = torch.allclose(expected, split, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
    except (TypeError, RuntimeError, AttributeError, NotImplementedError):
        same = False
    if not same:
        model = getattr(whole, "model", whole)
        raise UserError(
            f"the head of {type(model).__name__} does more than classify pooled features, so they can't be computed "
            "once. Leave --cache-features and --head-init fitted out."
        )


def _in_order(features: Tensor, labels: Tensor, counted: Tensor, index: Tensor, images: int) -> Computed:
    if not counted.any():
        raise UserError(f"none of the {images} pictures could be read; check --data.")
    rows = torch.full((images,), -1, dtype=torch.int64, device=features.device)
    rows[index[counted]] = torch.nonzero(counted).flatten()
    read = rows >= 0
    known = torch.nonzero(read).flatten()
    following = torch.searchsorted(known, torch.arange(images, device=rows.device)) % len(known)
    rows = rows[known[following]]
    # Cloned outside inference mode: the head's backward needs ordinary tensors.
    return Computed(features[rows].clone(), labels[rows].clone(), read.clone())


class CachedEval:
    """Evaluation batches from cached features, dealt out like `EvalFeed`'s."""

    def __init__(self, computed: Computed, order: EvalOrder) -> None:
        self.computed, self.order = computed, order

    def __iter__(self) -> Iterator[Micro]:
        for items in self.order.micro_batches():
            index = torch.tensor([item.row for item in items])
            features, labels, read = self.computed
            weights = torch.tensor([item.weight for item in items], device=features.device)
            chosen = index.to(features.device)
            yield Micro(features[chosen], labels[chosen], weights * read[chosen], index)
