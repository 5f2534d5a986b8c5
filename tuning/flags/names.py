"""Words that several flags and stage keys take, and flags of several words."""

from typing import TYPE_CHECKING, Literal

from tuning.cli.coerce import WholeNumbers

ScheduleName = Literal["sgdr", "cosine", "one-cycle", "step", "triangular", "constant", "plateau"]
RISES_FIRST: tuple[ScheduleName, ...] = ("one-cycle", "triangular")  # a warm-up themselves, and low only at the end
InitName = Literal["default", "kaiming", "xavier", "orthogonal", "zero"]
TrackerName = Literal["wandb", "tensorboard", "none"]
LossName = Literal["cross-entropy", "bce", "focal"]
AugmentName = Literal["none", "light", "medium", "strong"]
ColorName = Literal["auto", "change", "keep"]
SamplingName = Literal["shuffle", "sqrt", "balanced"]
ForwardName = Literal["auto", "fp32", "fp32-channels-last", "bf16", "bf16-channels-last"]

# Any number of texts, or of whole numbers. cli.flag_parser knows these two: for `tuple[str, ...]`, and for `X | None`
# in place of `Optional[X]`, the parser imports typeguard, which makes every command slower.
if TYPE_CHECKING:
    Texts = tuple[str, ...]
else:
    Texts = tuple
Sizes = WholeNumbers
