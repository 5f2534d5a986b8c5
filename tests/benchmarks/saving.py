"""What a checkpoint costs: a step loop that saves, against the same loop that doesn't, in turns within one run.

    python -m tests.benchmarks.saving

Prints the extra time a checkpoint takes from training (copying the state, and what the writing thread takes from the
steps beside it) as a share of 100 optimizer steps. Full fine-tuning with AdamW on a batch that lies in memory.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path

import timm
import torch
from torch import Tensor

from tuning import session
from tuning.cli.command_line import parse_command
from tuning.clipping import clipping
from tuning.data.loader import FeatureFeed
from tuning.data.sampling import TrainOrder
from tuning.engine import train_steps
from tuning.entering import Entered, enter_stage
from tuning.losses import cross_entropy
from tuning.plan import make_plan
from tuning.progress import Progress
from tuning.safety.saving import Saver

EVERY = 100


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--window", type=int, default=20, help="steps in a window; a save is at its start, or not")
    parser.add_argument("--pairs", type=int, default=5)
    given = parser.parse_args()
    accelerator = session.start(None, "auto", 10.0)
    flags = ["--data", ".", "--weights", "none", "--freeze-epochs", "0", "--epochs", "1", "--clip-norm", "1"]
    (stage,) = parse_command([*flags, "--batch-size", str(given.batch_size)], "", "", Path()).stages
    model = timm.create_model(given.model, num_classes=2).to(accelerator.device)
    images = given.batch_size * given.window * (2 * given.pairs + 1)
    (planned,) = make_plan(
        [stage], model, train_images=images, world_size=1, micro_batch=given.batch_size, image_size=given.image_size
    )
    entered = enter_stage(accelerator, model, planned)
    feed = Resident(TrainOrder(images, 0, planned.batch, 0), given.image_size, accelerator.device)
    with tempfile.TemporaryDirectory() as folder, Saver(accelerator, Path(folder), 2, {}) as saver:
        plain, saving, staging = measure(accelerator, entered, feed, saver, given.window)
        size = sum(file.stat().st_size for file in newest(Path(folder)).iterdir()) / 1e6
    step = statistics.median(plain) / given.window
    extra = statistics.median(b - a for a, b in zip(plain, saving, strict=True))
    share = extra / (EVERY * step)
    print(
        f"{given.model}, {given.image_size} px, batch {given.batch_size}; {host()}, {torch.get_num_threads()} threads"
    )
    print(f"checkpoint {size:.0f} MB; step {1e3 * step:.0f} ms, medians of {len(plain)} pairs")
    print(f"extra time a checkpoint {1e3 * extra:.0f} ms, of it copying {1e3 * statistics.median(staging):.0f} ms")
    print(f"saving every {EVERY} steps costs {share:.2%} of the time")


class Resident(FeatureFeed):
    """One micro-batch in memory, again and again."""

    def __init__(self, order: TrainOrder, size: int, device: torch.device) -> None:
        super().__init__(torch.zeros(0), torch.zeros(0), order)
        images = order.batch.micro_batch
        picture = torch.randn(images, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
        self._features, self._labels = picture, torch.arange(images, device=device) % 2

    def epoch(self, epoch: int, first_step: int = 0, run_step: int = 0):  # type: ignore[no-untyped-def]
        """The same batch for every step."""
        from tuning.data.loader import Micro

        weights = torch.ones(len(self._labels), device=self._labels.device)
        while True:
            yield Micro(self._features, self._labels, weights, torch.arange(len(self._labels)))


def measure(
    accelerator: session.Accelerator, entered: Entered, feed: Resident, saver: Saver, window: int
) -> tuple[list[float], list[float], list[float]]:
    """Seconds of the windows without a save, with one, and of the call to `Saver.save`; the first window warms up."""
    times: list[float] = []
    staging: list[float] = []
    progress, started = Progress(), time.perf_counter()
    for step in train_steps(accelerator, entered, feed, cross_entropy(), clipping(1.0, None, None), progress, 0):
        if step.step % window:
            continue
        wait_for(step.loss)
        saver.wait()  # a save belongs to its window
        times.append(time.perf_counter() - started)
        started = time.perf_counter()
        if len(times) % 2 == 0:
            saver.save(entered, progress)
            staging.append(time.perf_counter() - started)
    return times[1::2], times[2::2], staging


def wait_for(value: Tensor) -> None:
    """Return when the device has computed *value*."""
    value.item()


def newest(folder: Path) -> Path:
    """The newest checkpoint of the run in *folder*."""
    return max((folder / "checkpoints").iterdir())


def host() -> str:
    """The processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
