"""What the precision of the weights costs: updates that vanish, and where a small run ends.

    python -m tests.benchmarks.precision_levels --seeds 0 1 2

Handwritten digits (scikit-learn, 1,797 of 8x8: 512 to train on, the rest to judge by), a small ViT from random weights,
AdamW under a cosine, batches of 32. Everything else is the same for all levels.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence

import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from sklearn.datasets import load_digits
from torch import Tensor, nn

from tests.plain_stages import plain_stage
from tuning.clipping import clipping
from tuning.data.loader import FeatureFeed
from tuning.data.sampling import TrainOrder
from tuning.engine import train_steps
from tuning.entering import enter_stage
from tuning.losses import cross_entropy
from tuning.plan import make_plan
from tuning.precision import ACCELERATE_NAMES, Level, cast_weights, remember
from tuning.progress import Progress

LEVELS: tuple[Level, ...] = ("fp32", "bf16", "bf16-master", "bf16-pure")


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures ``(N, 3, 32, 32)`` and labels to train on, and the same to judge by."""
    found = load_digits()
    pictures = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    pictures = nn.functional.interpolate(pictures, size=32, mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    labels, held = torch.tensor(found.target), torch.arange(len(pictures)) >= 512
    return pictures[~held], labels[~held], pictures[held], labels[held]


def run(level: Level, seed: int, lr: float, epochs: int) -> tuple[float, float, float]:
    """Train once: share of the updates that vanish, mean loss of the last epoch, accuracy on what was held out."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision=ACCELERATE_NAMES[level])
    remember(accelerator, level)
    images, labels, held, truth = digits()
    torch.manual_seed(seed)
    model = cast_weights(timm.create_model("test_vit", num_classes=10, img_size=32), level)
    stage = plain_stage(epochs=epochs, lr=lr, optimizer="adamw", schedule="cosine", batch_size=32)
    (planned,) = make_plan([stage], model, train_images=len(images), world_size=1, micro_batch=32, image_size=32)
    entered = enter_stage(accelerator, model, planned)
    feed = FeatureFeed(images, labels, TrainOrder(len(images), seed, planned.batch, 0))
    vanished, counted, losses = 0, 0, list[float]()
    before = flat(model)
    for step in train_steps(accelerator, entered, feed, cross_entropy(), clipping(1.0, None, None), Progress(), seed):
        after = flat(model)
        vanished, counted = vanished + int((after == before).sum()), counted + len(after)
        losses.append(float(step.loss))
        before = after
    model.eval()
    with torch.inference_mode(), accelerator.autocast():
        accuracy = float((model(held).argmax(1) == truth).float().mean())
    return vanished / counted, sum(losses[-planned.steps_per_epoch :]) / planned.steps_per_epoch, accuracy


def flat(model: nn.Module) -> Tensor:
    """All weights in one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def main(argv: Sequence[str] | None = None) -> None:
    """Run all levels and print one row a level: mean over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--epochs", type=int, default=8)
    asked = parser.parse_args(argv)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, seeds {asked.seeds}, lr {asked.lr:g}"
    )
    print(f"{'level':12} {'vanished':>9} {'loss':>22} {'accuracy':>22}")
    for level in LEVELS:
        shares, losses, hits = zip(*(run(level, seed, asked.lr, asked.epochs) for seed in asked.seeds), strict=True)
        print(f"{level:12} {sum(shares) / len(shares):>8.1%}  {shown(losses):>22} {shown(hits):>22}", flush=True)


def shown(values: Sequence[float]) -> str:
    """Every value, and their mean."""
    return " ".join(f"{value:.3f}" for value in values) + f" = {sum(values) / len(values):.4f}"


if __name__ == "__main__":
    main()
