"""Flags of the group regularisation."""

from dataclasses import dataclass
from typing import Literal, Optional

from tuning.flags.names import AugmentName, ColorName, LossName, SamplingName


@dataclass(frozen=True)
class RegularisationFlags:
    loss: LossName = "cross-entropy"
    """Training loss: cross-entropy; bce = every class against the rest (Wightman et al. 2021); focal = less weight for
    what is classified well (Lin et al. 2017). Evaluation always reports cross-entropy."""
    focal_gamma: float = 2.0
    """How much less: the factor of --loss focal is (1 - probability of the label) to this power, from 0."""
    label_smoothing: float = 0.0
    """Probability mass moved from the label to all classes (Szegedy et al. 2016), in [0, 1)."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced = weight each class in the loss by 1 / its share of the images, so that rare classes count as much."""
    ema_decay: Optional[float] = None
    """Keep an exponential moving average of the weights with this decay per optimizer step, in (0, 1), for example
    0.999; it warms up from 0. Evaluated beside the raw weights, as eval_ema/... Default: none."""
    augment: AugmentName = "light"
    """none = the evaluation crop; light = random crops of 70-100 % of the area; medium = 35-100 % and a mild random
    operation (RandAugment); strong = 8-100 %, an operation of any magnitude (TrivialAugment) and --random-erasing."""
    flip: Literal["none", "horizontal", "both"] = "horizontal"
    """Random flips: none, left-right, or left-right and top-bottom."""
    mixup: float = 0.0
    """Blend each training picture, and its label, with another one (Zhang et al. 2018): alpha of the Beta distribution
    of the shares, for example 0.2; 0 = off. None in head-only epochs with --cache-features."""
    cutmix: float = 0.0
    """Paste a box of another training picture, and its share of the label (Yun et al. 2019): alpha, for example 1.0;
    0 = off. With --mixup too, each picture gets one of the two."""
    sampling: SamplingName = "shuffle"
    """Which images an epoch takes, as many in all: shuffle = each once; balanced = as many of every class; sqrt = in
    proportion to the root of its images (Kang et al. 2020). Excludes --class-weights."""
    random_erasing: Optional[float] = None
    """Probability that a box of the picture is erased (Zhong et al. 2017); 0 = off. Default: 0.25 with --augment
    strong, else 0."""
    color: ColorName = "auto"
    """change = --augment medium and strong also change brightness, colours and contrast; keep = they move pixels only;
    auto = keep if the training pictures are grey."""
