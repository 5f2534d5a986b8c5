"""Every flag of every recipe: name, type, unit and default. Imports no torch, so `--help` is instant.

Precedence: defaults < preset or config file < command line. A preset, a `config.yaml` and the command line all use
the same flat names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tuning.recipe_flags import (
    CheckFlags,
    EvaluateFlags,
    ExportFlags,
    FinderFlags,
    OpenedFlags,
    OverfitFlags,
    PredictFlags,
)

ScheduleName = Literal["sgdr", "cosine", "one-cycle", "step", "triangular", "constant"]
InitName = Literal["default", "kaiming", "xavier", "orthogonal", "zero"]
LossName = Literal["cross-entropy", "bce", "focal"]


@dataclass(frozen=True)
class DataFlags:
    data: str = "demo"
    """A folder with train/ and val/ class folders; a folder of class folders; a Hugging Face dataset id; a folder of
    parquet, arrow or webdataset shards; or the word demo (photos of solar cells from the package elpv-dataset)."""
    image_column: str | None = None
    """Column of the images in a dataset with columns (found by itself when there is one)."""
    label_column: str | None = None
    """Column of the labels in a dataset with columns (found by itself when there is one)."""
    train_split: str | None = None
    """Name of the training split or sub-folder."""
    eval_split: str | None = None
    """Name of the evaluation split or sub-folder."""
    val_fraction: float = 0.25
    """Fraction of the images held out when the data has no evaluation split (seeded by --seed, stratified by class)."""
    limit_train: int | None = None
    """Use at most this many training images."""
    limit_eval: int | None = None
    """Use at most this many evaluation images."""


@dataclass(frozen=True)
class ModelFlags:
    model: str = "tf_efficientnet_lite0"
    """Any timm model name, or local-dir:PATH for a folder in timm's format."""
    weights: str = "pretrained"
    """pretrained, none, or the path of a weight file (.safetensors, .pth)."""
    head_init: Literal["default", "kaiming", "xavier", "orthogonal", "zero", "fitted"] = "default"
    """How the weights of the new head start. default = timm's own; fitted = logistic regression on features computed
    once, its L2 penalty chosen by cross-validation."""
    init: InitName = "default"
    """The same for the whole network; with --weights none only."""
    drop_rate: float | None = None
    """Dropout before the head, probability in [0, 1). Default: the model's own, mostly 0."""
    drop_path_rate: float | None = None
    """Stochastic depth (Huang et al. 2016), probability in [0, 1) of dropping the deepest block. Default: the
    model's own."""
    image_size: int | None = None
    """Side of the square input in pixels. Default: the size the weights were trained at."""
    crop_pct: float | None = None
    """Share of the picture's shorter side that the evaluation crop keeps, in (0, 1]. Default: the model's own."""


@dataclass(frozen=True)
class BatchFlags:
    batch_size: int = 64
    """Images per optimizer step over all processes: the number the learning rate belongs to."""
    micro_batch: int | Literal["auto"] = "auto"
    """Images per forward pass per process. auto = the largest divisor of a process's share of --batch-size, up to 64 on
    a CPU and 1024 on a GPU. Where memory runs out it is halved, a number given here too, and the run goes on: the batch
    of an optimizer step and the learning rate stay."""
    workers: int | Literal["auto"] = "auto"
    """Loader processes per training process; 0 = none. auto = CPU cores per training process less one, 1 to 8; none
    when training itself runs on two CPU cores or fewer."""


@dataclass(frozen=True)
class OptimisationFlags:
    optimizer: str = "adamw"
    """Any optimizer of timm's factory: adamw, sgd (with momentum), lamb, lion, ..."""
    lr: float | Literal["auto"] = 3e-4
    """Peak learning rate of the head; lower layers follow from --lr-ratio or --layer-decay. auto = what the LR finder
    says; without a confident answer 3e-4 (1e-4 on a transformer), SGD 1e-2, Lion 3e-5 (1e-5)."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """Multiply --lr by batch size / --lr-batch (Goyal et al. 2017), or by its square root."""
    lr_batch: int = 256
    """Batch size in images that --lr was tuned for; used by --lr-scaling."""
    weight_decay: float = 0.05
    """Weight decay of weight matrices; norms and biases get none."""
    momentum: float = 0.9
    """Momentum of SGD, or beta1 where the optimizer calls it momentum."""
    layer_decay: float | None = None
    """Learning rate factor from one layer to the next lower one. Excludes --lr-ratio."""
    lr_ratio: float | None = None
    """Learning rate of the stem divided by that of the head: the same meaning for every depth. Excludes
    --layer-decay. Default without either: 0.1 with pretrained weights, 1 without."""
    schedule: ScheduleName = "cosine"
    """Shape of the learning rate over a stage, counted in optimizer steps."""
    warmup_epochs: float = 0.0
    """Linear warm-up at the start of every stage, epochs."""
    cycle_epochs: float | None = None
    """Length of the first sgdr cycle, or of a triangular cycle (up and down), epochs. Default: the stage."""
    cycle_mult: int = 2
    """Each sgdr cycle is this many times as long as the one before."""
    cycle_decay: float = 1.0
    """Each sgdr restart peaks at this factor of the one before."""
    step_epochs: float | None = None
    """Epochs between the drops of the step schedule. Default: a third of the stage."""
    step_gamma: float = 0.1
    """Factor of each drop of the step schedule."""
    lr_floor: float = 0.0
    """Lowest learning rate of cosine, sgdr and triangular, fraction of the peak."""
    clip_norm: float = 1.0
    """Clip the gradient to this norm once per optimizer step; 0 = off. --clip-value or --clip-agc take its place."""
    clip_value: float | None = None
    """Clip every gradient element to this magnitude instead."""
    clip_agc: float | None = None
    """Adaptive gradient clipping instead (Brock et al. 2021): largest ratio of gradient norm to weight norm, per
    unit; the head is left out."""


@dataclass(frozen=True)
class StageFlags:
    freeze_epochs: int = 3
    """Epochs in which only the head is open, before --epochs. 0 = none."""
    freeze_lr: float = 1e-3
    """Peak learning rate of the head while all else is closed."""
    cache_features: bool = False
    """Compute the input of the head once per image and fit the head on that: head-only epochs cost almost nothing,
    and augmentation is off in them."""
    epochs: int = 10
    """Epochs after --freeze-epochs. 0 = head only."""
    unfreeze: Literal["all", "gradual"] = "all"
    """Open everything at once, or from the top in four equal parts."""
    batch_norm: Literal["auto", "frozen", "train"] = "auto"
    """Statistics of BatchNorm in open layers: frozen keeps those of the weights, train follows the batches. auto =
    frozen with pretrained weights, train without. Closed layers are always frozen."""


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
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights with this decay per optimizer step, in (0, 1), for example
    0.999; it warms up from 0. Evaluated beside the raw weights, as eval_ema/... Default: none."""
    augment: Literal["none", "light", "medium"] = "light"
    """none = the evaluation crop; light = random crops of 70-100 % of the area; medium = 35-100 %."""
    flip: Literal["none", "horizontal", "both"] = "horizontal"
    """Random flips: none, left-right, or left-right and top-bottom."""
    mixup: float = 0.0
    """Blend each training picture, and its label, with another one (Zhang et al. 2018): alpha of the Beta distribution
    of the shares, for example 0.2; 0 = off. None in head-only epochs with --cache-features."""
    cutmix: float = 0.0
    """Paste a box of another training picture, and its share of the label (Yun et al. 2019): alpha, for example 1.0;
    0 = off. With --mixup too, each picture gets one of the two."""


@dataclass(frozen=True)
class RunFlags:
    output: str | None = None
    """Folder of the run, or of what another recipe writes. Default: runs/<time>-<model>-<data>. recipes/predict.py: a
    file that ends in .csv, .jsonl or .parquet; default: predictions.csv."""
    run_name: str | None = None
    """Name in the tracker. Default: the name of the output folder."""
    seed: int = 0
    """Seed of the split, the head, the order of the images and every random draw."""
    resume: str = "never"
    """never; auto = go on from the newest good checkpoint in --output if there is one; or the path of a checkpoint.
    Flags that change the optimisation must stay as they were."""
    save_every: int | Literal["auto"] = "auto"
    """Optimizer steps between checkpoints, besides the end of every epoch. auto = whenever five minutes have passed;
    0 = ends of epochs only."""
    save_errors: Literal["continue", "stop"] = "continue"
    """When a checkpoint can't be written (disk full, quota): train on with the earlier ones, or end the run."""
    keep: int = 2
    """Checkpoints kept, newest first; the one with the best evaluation is kept besides."""
    stop_after: float | None = None
    """Minutes after which to save and stop, resumable. So do SIGTERM, SIGUSR1, Ctrl-C and a file named STOP in the run
    folder."""
    max_skipped: int = 10
    """Optimizer steps in a row that may be left out because the loss or a gradient is not finite."""
    max_unreadable: float = 0.01
    """Share of the training or evaluation pictures that may be unreadable (one always may), in [0, 1]. Beyond it the
    run ends with their list."""
    timeout: float = 10.0
    """Minutes that processes wait for one another before the run ends and names the one that hangs."""
    log_every: int = 10
    """Optimizer steps between writes of the per-step curves; every step is logged."""
    tracker: Literal["wandb", "tensorboard", "none"] = "wandb"
    """Where curves go besides metrics.jsonl. Without a login W&B runs offline."""
    project: str = "fine-tuning"
    """Project of the tracker."""
    best_by: Literal["top1", "balanced_accuracy", "loss"] = "balanced_accuracy"
    """Evaluation metric that chooses the weights in model/."""
    best_of: Literal["raw", "ema"] | None = None
    """Whose evaluation chooses model/, and whose weights are kept there. Default: ema with --ema-decay, else raw."""
    max_steps: int | None = None
    """Stop after this many optimizer steps; the schedule is not shortened."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Overrides `accelerate launch --mixed_precision`."""
    threads: int | Literal["auto"] = "auto"
    """CPU threads per process for training on a CPU. auto = CPU cores / processes on this machine."""
    dry_run: bool = False
    """Print the plan, write plots/schedule.png and stop. recipes/export.py: say what would be written and uploaded."""
    preset: str | None = None
    """Name of a file in recipes/presets/ or path of a YAML file with flag values and a list of stages."""
    config: str | None = None
    """config.yaml of an earlier run: repeat it."""
    print_config: bool = False
    """Print the resolved flags as YAML and stop."""


@dataclass(frozen=True)
class Flags:
    """All flags of a recipe, grouped as `--help` shows them."""

    data: DataFlags = field(default_factory=DataFlags)
    model: ModelFlags = field(default_factory=ModelFlags)
    batch: BatchFlags = field(default_factory=BatchFlags)
    optimisation: OptimisationFlags = field(default_factory=OptimisationFlags)
    staging: StageFlags = field(default_factory=StageFlags)
    regularisation: RegularisationFlags = field(default_factory=RegularisationFlags)
    overfit: OverfitFlags = field(default_factory=OverfitFlags)
    check: CheckFlags = field(default_factory=CheckFlags)
    export: ExportFlags = field(default_factory=ExportFlags)
    run: RunFlags = field(default_factory=RunFlags)
    finder: FinderFlags = field(default_factory=FinderFlags)
    opened: OpenedFlags = field(default_factory=OpenedFlags)
    evaluate: EvaluateFlags = field(default_factory=EvaluateFlags)
    predict: PredictFlags = field(default_factory=PredictFlags)
