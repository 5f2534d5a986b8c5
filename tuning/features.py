"""Features computed once: the input of the head for every image, so that head-only epochs cost next to nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tuning.data.loader import Micro, TrainFeed
from tuning.data.sampling import EvalOrder, TrainOrder
from tuning.entering import HeadOnly
from tuning.errors import UserError
from tuning.frozen import casting
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


def compute_features(
    accelerator: Accelerator, model: nn.Module, feed: EveryImage, forward: str | None = None
) -> tuple[Tensor, Tensor]:
    """Pooled features and labels of all images, on every process; leaves the model in evaluation mode.

    A picture that can't be read takes the row of the next one, as training does.

    Args:
        forward: how the model is run (`tuning.frozen`); None = in the precision of training.

    Returns:
        features ``(N, C)`` float32 and labels ``(N,)`` int64, on the device, in the order of the dataset.

    Raises:
        UserError: the model's head does more than classify pooled features.
    """
    model.eval()
    pool = InParts(lambda inputs: _pooled(model, inputs))
    parts: list[tuple[Tensor, ...]] = []
    cast = accelerator.autocast() if forward is None else casting(accelerator.device, forward)
    with torch.inference_mode(), cast:
        for number, micro in enumerate(feed):
            pooled = pool(micro.inputs)
            if number == 0:
                _check_head(model, micro.inputs[:CHECKED], pooled[:CHECKED])
            index = micro.rows.to(pooled.device, non_blocking=True)
            parts.append((pooled.float(), micro.labels, micro.weights, index))
    mine = tuple(torch.cat(column) for column in zip(*parts, strict=True))
    features, labels, weights, index = accelerator.gather(mine)
    assert len(index.unique()) == feed.order.images, "pictures are missing from the features"
    return _in_order(features, labels, weights > 0, index, feed.order.images)


def _pooled(model: nn.Module, inputs: Tensor) -> Tensor:
    return model.forward_head(model.forward_features(inputs), pre_logits=True)  # type: ignore[operator,no-any-return]


def _check_head(model: nn.Module, inputs: Tensor, pooled: Tensor) -> None:
    whole = InParts(model)(inputs).float()
    try:
        split = HeadOnly(model).eval()(pooled).float()
        same = torch.allclose(whole, split, rtol=1e-2, atol=1e-2 * float(whole.abs().max()))
    except (TypeError, RuntimeError, AttributeError, NotImplementedError):
        same = False
    if not same:
        raise UserError(
            f"the head of {type(model).__name__} does more than classify pooled features, so they can't be computed "
            "once. Leave --cache-features and --head-init fitted out."
        )


def _in_order(features: Tensor, labels: Tensor, counted: Tensor, index: Tensor, images: int) -> tuple[Tensor, Tensor]:
    if not counted.any():
        raise UserError(f"none of the {images} pictures could be read; check --data.")
    rows = torch.full((images,), -1, dtype=torch.int64, device=features.device)
    rows[index[counted]] = torch.nonzero(counted).flatten()
    known = torch.nonzero(rows >= 0).flatten()
    following = torch.searchsorted(known, torch.arange(images, device=rows.device)) % len(known)
    rows = rows[known[following]]
    # Cloned outside inference mode: the head's backward needs ordinary tensors.
    return features[rows].clone(), labels[rows].clone()


class CachedEval:
    """Evaluation batches from cached features, dealt out like `EvalFeed`'s."""

    def __init__(self, features: Tensor, labels: Tensor, order: EvalOrder) -> None:
        self.features, self.labels, self.order = features, labels, order

    def __iter__(self) -> Iterator[Micro]:
        for items in self.order.micro_batches():
            index = torch.tensor([item.row for item in items])
            weights = torch.tensor([item.weight for item in items], device=self.features.device)
            chosen = index.to(self.features.device)
            yield Micro(self.features[chosen], self.labels[chosen], weights, index)
