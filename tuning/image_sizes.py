"""Which sizes a stage trains at, which the model can take, and the batch that follows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from tuning.errors import UserError
from tuning.sizes import scaled_lr
from tuning.stages import Stage


class RunSizes(NamedTuple):
    """What a model must know of the sizes of its run before it is built.

    Attributes:
        final: side in pixels of the last stage, at which all are evaluated; None = that of --image-size or the model.
        several: the model sees pictures of more than one size.
    """

    final: int | None
    several: bool


def run_sizes(stages: Sequence[Stage]) -> RunSizes:
    """The sizes of a run of these stages."""
    return RunSizes(
        stages[-1].image_size, len({stage.image_size for stage in stages}) > 1 or any(stage.varies for stage in stages)
    )


def stride(model: nn.Module) -> int:
    """Pixels of the input for one cell of the last feature map, along a side: a patch of a ViT, 32 in most others."""
    info: Any = getattr(model, "feature_info", None) or ()
    reductions = [level["reduction"] for level in getattr(info, "info", info)]
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
    return int(max([*reductions, patch if isinstance(patch, int) else max(patch)]))


def sizes_of(stage: Stage, image_size: int, model: nn.Module) -> tuple[int, ...]:
    """Sides in pixels that the steps of a stage draw from, ascending; *image_size* alone where they draw none.

    Raises:
        UserError: ``multi_scale`` leaves fewer than two sizes.
    """
    if not stage.varies:
        return (image_size,)
    if stage.train_sizes:
        return tuple(sorted(stage.train_sizes))
    cell, reach = stride(model), stage.multi_scale * image_size + 1e-6
    multiples = range(cell, int(image_size + reach) + 1, cell)
    sizes = tuple(size for size in multiples if size >= image_size - reach)
    if len(sizes) < 2:
        among = f"there {'is only' if sizes else 'is'} {sizes[0] if sizes else 'none'}"
        raise UserError(
            f"stage {stage.name!r}: --multi-scale {stage.multi_scale:g} draws from the multiples of {cell}, the stride "
            f"of {type(model).__name__}, within {image_size - reach:.0f} to {image_size + reach:.0f} pixels, and "
            f"{among}. Raise it, or name the sizes with --train-sizes."
        )
    return sizes


def batch_at(stage: Stage, image_size: int, final: int, scaling: str, train_images: int) -> Stage:
    """*stage* with the batch, and the learning rate, that its size asks for; as it is without ``batch_scaling``.

    A whole multiple of the batch divides over every number of processes over which the batch itself does.

    Args:
        image_size: side of its input in pixels.
        final: that of the last stage, which its batch size is meant for.
        scaling: ``--lr-scaling``.
    """
    most = max(1, train_images // stage.batch_size)
    times = min(most, max(1, round((final / image_size) ** 2)))
    if stage.batch_scaling == "none" or times == 1:
        return stage
    batch = stage.batch_size * times
    return replace(stage, batch_size=batch, lr=scaled_lr(stage.lr, scaling, batch, stage.batch_size))
