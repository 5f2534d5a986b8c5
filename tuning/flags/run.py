"""Flags of the group run."""

from dataclasses import dataclass
from typing import Literal, Optional

from tuning.flags.names import TrackerName


@dataclass(frozen=True)
class RunFlags:
    output: Optional[str] = None
    """Folder of the run, or of what another recipe writes. Default: runs/<time>-<model>-<data>. recipes/predict.py: a
    file that ends in .csv, .jsonl or .parquet; default: predictions.csv."""
    run_name: Optional[str] = None
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
    stop_after: Optional[float] = None
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
    tracker: TrackerName = "wandb"
    """Where curves go besides metrics.jsonl. Without a login W&B runs offline."""
    project: str = "fine-tuning"
    """Project of the tracker."""
    best_by: Literal["top1", "balanced_accuracy", "macro_f1", "loss"] = "balanced_accuracy"
    """Evaluation metric that chooses the weights in model/."""
    best_of: Optional[Literal["raw", "ema", "swa", "any"]] = None
    """Whose evaluation chooses model/, and whose weights are kept there; any = whoever is best. Default: any with
    --swa-epochs, ema with --ema-decay, else raw."""
    max_steps: Optional[int] = None
    """Stop after this many optimizer steps; the schedule is not shortened."""
    max_minutes: Optional[float] = None
    """Minutes that the whole run may take. Epochs are what fits, timed at the start, in the proportions of the stages,
    and the schedule ends; image size and depth, too, where nothing says them (docs/minutes.md). Without --preset and
    with pretrained weights: --preset quick."""
    precision: Optional[Literal["fp32", "bf16", "fp16", "bf16-master", "bf16-pure"]] = None
    """Overrides `accelerate launch --mixed_precision`. bf16 and fp16 = autocast; bf16-master = weights in bf16 beside
    float32 ones; bf16-pure = bf16 alone, which loses small updates (docs/precision.md)."""
    threads: int | Literal["auto"] = "auto"
    """CPU threads per process for training on a CPU. auto = CPU cores / processes on this machine."""
    dry_run: bool = False
    """Print the plan, write plots/schedule.png and stop. recipes/export.py: say what would be written and uploaded."""
    preset: Optional[str] = None
    """Name of a file in recipes/presets/ or path of a YAML file with flag values and a list of stages."""
    config: Optional[str] = None
    """config.yaml of an earlier run: repeat it."""
    print_config: bool = False
    """Print the resolved flags as YAML and stop."""
