"""Arithmetic of batches: one optimizer step = processes x accumulation x micro-batch images."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tuning.errors import UserError

LARGEST_AUTO_MICRO_BATCH = 64  # on a CPU, which seldom says in time that memory runs out; larger is no faster there
LARGEST_AUTO_ON_GPU = 1024  # where `auto` begins on a GPU: larger forward passes are no faster
SMALLEST_AUTO_MICRO_BATCH = 8


@dataclass(frozen=True)
class BatchPlan:
    """How the images of one optimizer step are shared out.

    Attributes:
        batch_size: images per optimizer step over all processes.
        micro_batch: images per forward pass per process.
        world_size: processes.
    """

    batch_size: int
    micro_batch: int
    world_size: int

    @property
    def accumulation(self) -> int:
        """Forward passes of one process in a full optimizer step."""
        return self.batch_size // (self.micro_batch * self.world_size)

    def micro_steps(self, images: int) -> int:
        """Forward passes of one process in an optimizer step over *images* images (a short last window has fewer)."""
        return math.ceil(images / (self.micro_batch * self.world_size))

    def steps_per_epoch(self, images: int) -> int:
        """Optimizer steps that see each of *images* images once; the last one may be short."""
        return math.ceil(images / self.batch_size)

    @property
    def smaller(self) -> BatchPlan | None:
        """The same optimizer steps in smaller forward passes: half the images, or the next divisor where that is odd.

        None when a forward pass has one image already.
        """
        if self.micro_batch == 1:
            return None
        odd = self.micro_batch % 2
        return self.at_most(self.micro_batch - 1) if odd else replace(self, micro_batch=self.micro_batch // 2)

    def at_most(self, micro_batch: int) -> BatchPlan:
        """The same optimizer steps in the largest forward passes of *micro_batch* images or fewer."""
        share = self.batch_size // self.world_size
        limit = max(1, min(self.micro_batch, micro_batch))
        return replace(self, micro_batch=max(d for d in _divisors(share) if d <= limit))


def largest_auto_micro_batch(device_type: str) -> int:
    """Where ``--micro-batch auto`` begins on this kind of device, in images."""
    return LARGEST_AUTO_MICRO_BATCH if device_type == "cpu" else LARGEST_AUTO_ON_GPU


def plan_batch(
    batch_size: int,
    micro_batch: int | str,
    world_size: int,
    train_images: int,
    largest_auto: int = LARGEST_AUTO_MICRO_BATCH,
) -> BatchPlan:
    """Split a global batch over processes and forward passes.

    Args:
        largest_auto: images that ``auto`` doesn't go beyond.

    Raises:
        UserError: when the division leaves a remainder or the batch exceeds the data.
    """
    if batch_size > train_images:
        raise UserError(
            f"--batch-size {batch_size} is larger than the training data ({train_images} images). "
            f"Choose at most {train_images}."
        )
    share, rest = divmod(batch_size, world_size)
    if rest:
        below, above = share * world_size, (share + 1) * world_size
        choice = f"{below} or {above}" if below else str(above)
        raise UserError(
            f"--batch-size {batch_size} (images per optimizer step over all processes) doesn't divide by "
            f"{world_size} processes. Choose {choice}."
        )
    if micro_batch == "auto":
        micro = max(d for d in _divisors(share) if d <= largest_auto)
        if micro < SMALLEST_AUTO_MICRO_BATCH <= share:
            raise UserError(
                f"--batch-size {batch_size} leaves {share} images to each process, which divide only into forward "
                f"passes of {micro}. Choose a --batch-size that is a multiple of {8 * world_size}, or --micro-batch."
            )
    else:
        micro = int(micro_batch)
        if share % micro:
            fitting = ", ".join(map(str, _divisors(share)))
            raise UserError(
                f"--micro-batch {micro} doesn't divide the {share} images of each process "
                f"(--batch-size {batch_size} / {world_size} processes). Choose one of {fitting}."
            )
    return BatchPlan(batch_size, micro, world_size)


def scaled_lr(lr: float, scaling: str, batch_size: int, lr_batch: int) -> float:
    """The LR for *batch_size* images when *lr* was tuned for *lr_batch* (linear: Goyal et al. 2017)."""
    ratio = batch_size / lr_batch
    return {"none": lr, "linear": lr * ratio, "sqrt": lr * math.sqrt(ratio)}[scaling]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
