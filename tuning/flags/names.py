"""Words that several flags and stage keys take, and flags of several words."""

from typing import TYPE_CHECKING, Annotated, Literal

from tyro.constructors import PrimitiveConstructorSpec

from tuning.cli.coerce import WholeNumbers

ScheduleName = Literal["sgdr", "cosine", "one-cycle", "step", "triangular", "constant", "plateau"]
InitName = Literal["default", "kaiming", "xavier", "orthogonal", "zero"]
LossName = Literal["cross-entropy", "bce", "focal"]
AugmentName = Literal["none", "light", "medium", "strong"]
ColorName = Literal["auto", "change", "keep"]
SamplingName = Literal["shuffle", "sqrt", "balanced"]
ForwardName = Literal["auto", "fp32", "fp32-channels-last", "bf16", "bf16-channels-last"]

if TYPE_CHECKING:
    Texts = tuple[str, ...]
    Sizes = WholeNumbers
else:
    Texts = Annotated[
        tuple,
        PrimitiveConstructorSpec(
            nargs="*",
            metavar="[STR [STR ...]]",
            instance_from_str=tuple,
            is_instance=lambda value: isinstance(value, tuple),
            str_from_instance=list,
        ),
    ]
    Sizes = Annotated[
        WholeNumbers,
        PrimitiveConstructorSpec(
            nargs="*",
            metavar="[INT [INT ...]]",
            instance_from_str=lambda words: WholeNumbers(map(int, words)),
            is_instance=lambda value: isinstance(value, WholeNumbers),
            str_from_instance=lambda sizes: list(map(str, sizes)),
        ),
    ]
"""Any number of texts, or of whole numbers. Spelt for the parser: for ``tuple[str, ...]`` and ``X | None`` (not
`Optional`) it imports typeguard, which makes every command slower."""
