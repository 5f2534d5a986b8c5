"""Flags of the group stage."""

from dataclasses import dataclass
from typing import Literal, Optional

from tuning.flags.names import ForwardName


@dataclass(frozen=True)
class StageFlags:
    freeze_epochs: int = 3
    """Epochs in which only the head is open, before --epochs. 0 = none. Where no flag says so, a head that begins
    fitted has none (--head-init)."""
    freeze_lr: Optional[float] = None
    """Peak learning rate of the head while all else is closed. Default: --lr where that is given
    and --epochs is 0; else 1e-3; SGD 0.1, Lion 1e-4, LAMB 3e-3, LARS 3."""
    cache_features: bool = False
    """Compute the input of the head once per image and fit the head on that: head-only epochs cost almost nothing,
    and augmentation is off in them. As a key of a stage: the input of its lowest open layer."""
    epochs: int = 10
    """Epochs after --freeze-epochs. 0 = head only."""
    batch_norm: Literal["auto", "frozen", "train", "sync"] = "auto"
    """Statistics of BatchNorm in open layers: frozen keeps those of the weights, train follows the batches of each
    process, sync those of all. auto = frozen with pretrained weights, train without. Closed layers are always
    frozen."""
    batch_norm_images: Optional[int] = None
    """Take them anew from this many training images for every evaluation and model/; training goes on with its own.
    Default: none, but 2048 for averages of --swa-epochs and --snapshots."""
    unfreeze: Literal["all", "gradual", "norms", "norms-biases"] = "all"
    """Open everything at once, or from the top in four equal parts; or, beside the head, normalisation layers alone, or
    these and all biases (Ben Zaken et al. 2022)."""
    rollback: bool = False
    """A stage that did not better the best evaluation so far is undone before the next one begins."""
    feature_views: int = 1
    """Passes over the images with --cache-features: 1 = the evaluation crop; more = so many augmented views, and the
    epochs take turns with them."""
    frozen_forward: ForwardName = "auto"
    """Numbers and layout of the weights in which head-only stages run the closed layers. auto = timed at the start of a
    stage that is long enough, unless --precision is given."""
