"""Gradient checkpointing: what a block keeps for its backward pass is dropped, and computed again when it is needed.

Chen et al. 2016, arXiv:1604.06174. The blocks, and what is kept at their edges, are timm's. Gradients are the same:
random draws are repeated, too.
"""

from __future__ import annotations

from collections.abc import Sequence

from timm.layers.config import set_reentrant_ckpt
from torch import nn

from tuning.errors import UserError
from tuning.stages import Stage


def recompute_blocks(model: nn.Module, asked: str, remedy: str) -> None:
    """Switch timm's gradient checkpointing on, in place.

    Args:
        asked: the setting, as the user knows it.
        remedy: what to do with it where the model has no checkpointing.

    Raises:
        UserError: the model has none.
    """
    # torch's other implementation gives no gradient where what enters a block has none: partly frozen stages.
    set_reentrant_ckpt(False)
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError):
        raise UserError(f"{asked}: {type(model).__name__} has no gradient checkpointing in timm; {remedy}.") from None


def check_recomputing(model: nn.Module, stages: Sequence[Stage], precision: str, asked: str) -> None:
    """Refuse what a second forward pass of a block would change.

    Args:
        asked: the setting, as the user knows it.

    Raises:
        UserError: names the setting, its value and the remedy.
    """
    if precision in ("bf16-master", "bf16-pure"):
        raise UserError(
            f"{asked} computes blocks again in the backward pass, when the copies of the weights that "
            f"--precision {precision} computes with are gone. Use --precision bf16, or leave it out."
        )
    keeps_statistics = any(name.rpartition(".")[2].startswith("running_") for name, _ in model.named_buffers())
    for stage in stages:
        if keeps_statistics and stage.batch_norm != "frozen" and stage.open != "head":
            raise UserError(
                f"stage {stage.name!r}: {asked} computes blocks twice, and --batch-norm "
                f"{stage.batch_norm} would move the running statistics of {type(model).__name__} twice in every step. "
                "Choose a --model without BatchNorm, with pretrained weights --batch-norm frozen, or leave it out and "
                "use a smaller --micro-batch."
            )
