"""Flags of the group model."""

from dataclasses import dataclass
from typing import Literal, Optional

from tuning.cli.coerce import NO_NUMBERS
from tuning.flags.names import InitName, Sizes


@dataclass(frozen=True)
class ModelFlags:
    model: str = "tf_efficientnet_lite0"
    """Any timm model name, or local-dir:PATH for a folder in timm's format."""
    weights: str = "pretrained"
    """pretrained, none, or the path of a weight file (.safetensors, .pth)."""
    head_init: Literal["default", "kaiming", "xavier", "orthogonal", "zero", "fitted"] = "default"
    """How the weights of the new head start. default = timm's own; fitted = logistic regression on features computed
    once, its L2 penalty chosen by cross-validation. Where nothing says how the head begins, new heads of pretrained
    models are fitted, without epochs of their own (docs/defaults.md)."""
    init: InitName = "default"
    """The same for the whole network, without fitted, and zero is refused: it can't learn. With --weights none only."""
    drop_rate: Optional[float] = None
    """Dropout before the head, probability in [0, 1). Default: the model's own, mostly 0."""
    drop_path_rate: Optional[float] = None
    """Stochastic depth (Huang et al. 2016), probability in [0, 1) of dropping the deepest block. Default: the
    model's own."""
    image_size: Optional[int] = None
    """Side of the square input in pixels. Default: the size the weights were trained at."""
    crop_pct: Optional[float] = None
    """Share of the picture's shorter side that the evaluation crop keeps, in (0, 1]. Default: the model's own."""
    train_sizes: Sizes = NO_NUMBERS
    """Sides of the training input in pixels, of which every optimizer step draws one, for example 96 128 160.
    Evaluation stays at the last stage's --image-size."""
    multi_scale: float = 0.0
    """The same in short: every multiple of the model's stride within this fraction of --image-size, for example 0.25;
    0 = off. Excludes --train-sizes."""
