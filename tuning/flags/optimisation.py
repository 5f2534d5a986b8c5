"""Flags of the group optimisation."""

from dataclasses import dataclass
from typing import Literal, Optional

from tuning.flags.names import ScheduleName


@dataclass(frozen=True)
class OptimisationFlags:
    optimizer: str = "adamw"
    """Any optimizer of timm's factory: adamw, sgd (with momentum), lamb, lion, ..."""
    lr: Optional[float | Literal["auto"]] = None
    """Peak learning rate of the head; lower layers follow from --lr-ratio or --layer-decay. Default: 3e-4; SGD 1e-2,
    Lion 3e-5, LAMB 1e-3, LARS 1. auto = what the LR finder says; without a confident answer the default, on a
    transformer 1e-4, Lion 1e-5."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """Multiply --lr by batch size / --lr-batch (Goyal et al. 2017), or by its square root."""
    lr_batch: int = 256
    """Batch size in images that --lr was tuned for; used by --lr-scaling."""
    weight_decay: Optional[float] = None
    """Weight decay of weight matrices; norms and biases get none. Default: 0.05; SGD 1e-4, Lion 0.5, LAMB and Adan
    0.02, Adam 0; all others: docs/optimizers.md."""
    momentum: float = 0.9
    """Momentum of SGD, or beta1 where the optimizer calls it momentum."""
    layer_decay: Optional[float] = None
    """Learning rate factor from one layer to the next lower one. Excludes --lr-ratio."""
    lr_ratio: Optional[float] = None
    """Learning rate of the stem divided by that of the head: the same meaning for every depth. Excludes
    --layer-decay. Default without either: 0.1 with pretrained weights, 1 without."""
    schedule: ScheduleName = "cosine"
    """Shape of the learning rate over a stage, counted in optimizer steps. plateau = constant, and times --step-gamma
    whenever evaluations stop improving (--plateau-patience)."""
    warmup_epochs: Optional[float] = None
    """Linear warm-up at the start of every stage, epochs. Default: none; a tenth of the stage, at most an epoch,
    where a stage names another optimizer than the one before."""
    cycle_epochs: Optional[float] = None
    """Length of the first sgdr cycle, or of a triangular cycle (up and down), epochs. Default: the stage."""
    cycle_mult: int = 2
    """Each sgdr cycle is this many times as long as the one before."""
    cycle_decay: float = 1.0
    """Each sgdr restart peaks at this factor of the one before."""
    step_epochs: Optional[float] = None
    """Epochs between the drops of the step schedule. Default: a third of the stage."""
    step_gamma: float = 0.1
    """Factor of each drop of the step and plateau schedules."""
    lr_floor: float = 0.0
    """Lowest learning rate of cosine, sgdr, triangular and plateau, fraction of the peak."""
    clip_norm: float = 1.0
    """Clip the gradient to this norm once per optimizer step; 0 = off. --clip-value or --clip-agc take its place."""
    clip_value: Optional[float] = None
    """Clip every gradient element to this magnitude instead."""
    clip_agc: Optional[float] = None
    """Adaptive gradient clipping instead (Brock et al. 2021): largest ratio of gradient norm to weight norm, per
    unit; the head is left out."""
    patience: Optional[int] = None
    """End a stage after this many evaluations (ends of epochs) in a row without a better --best-by. Default: never."""
    plateau_patience: int = 2
    """Drop the learning rate of --schedule plateau after this many such evaluations."""
