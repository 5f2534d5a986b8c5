"""How many images fit into one forward and backward pass: measured on a GPU, estimated on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor

from tuning.clipping import Clip
from tuning.data.loader import FeatureFeed
from tuning.data.sampling import TrainOrder
from tuning.engine import train_steps
from tuning.entering import Entered
from tuning.losses import Loss
from tuning.plan import StagePlan
from tuning.progress import Progress
from tuning.sizes import BatchPlan

SMALL = 2  # images: of one, BatchNorm has no variance
MOST = 1024  # images in one forward pass; larger ones are no faster
OVERHEAD = 1.35  # of a CPU step over what it saves for the backward pass: gradients of activations, layout copies
MARGIN = 0.9  # of the memory that is free: other programs and the loaders take some, too
# Limit of a container and the name of what its programs hold, without the cache of files; versions 2 and 1.
_CONTAINERS = (("/sys/fs/cgroup/memory.max", "anon"), ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "rss"))


@dataclass(frozen=True)
class Memory:
    """What a forward and backward pass needs and may take, per process.

    Attributes:
        largest: power of two of images that fits, at most `MOST`; 0 when not even two do.
        needed: bytes beside what is held already, for the planned micro-batch; None when it was not reached.
        free: bytes, beside what is held already.
        measured: by trying; otherwise estimated.
    """

    largest: int
    needed: int | None
    free: int
    measured: bool


def fitting_micro_batch(
    accelerator: Accelerator, entered: Entered, planned: StagePlan, classes: int, loss: Loss, clip: Clip
) -> Memory:
    """The largest micro-batch of this stage. All processes take part; the model has trained on noise afterwards.

    Processes of one run never try what may fail for one of them alone: with several it is an estimate on a GPU, too.
    """

    def step(images: int) -> None:
        _one_step(accelerator, entered, planned.largest_size, classes, loss, clip, images)

    if accelerator.device.type == "cuda" and accelerator.num_processes == 1:
        return _measured(accelerator.device, step, planned.batch.micro_batch)
    with counted_activations(entered) as saved:
        step(SMALL)
    gradients = sum(p.numel() * p.element_size() for p in entered.model.parameters() if p.requires_grad)
    return estimate(saved() / SMALL, gradients, free_memory(accelerator), planned.batch.micro_batch)


def estimate(per_image: float, fixed: int, free: int, planned: int) -> Memory:
    """From the bytes that one image's forward pass saves, and those that any step takes."""

    def needed(images: int) -> int:
        return fixed + int(images * per_image * OVERHEAD)

    fitting = [2**power for power in range(1, MOST.bit_length()) if needed(2**power) <= MARGIN * free]
    return Memory(max(fitting, default=0), needed(planned), free, measured=False)


def largest_that_fits(attempt: Callable[[int], None], most: int = MOST) -> int:
    """The largest power of two from `SMALL` to *most* at which *attempt* doesn't run out of memory; 0 if none."""
    largest, images = 0, SMALL
    while images <= most:
        try:
            attempt(images)
        except torch.OutOfMemoryError:
            break
        largest, images = images, images * 2
    return largest


def _measured(device: torch.device, step: Callable[[int], None], planned: int) -> Memory:
    held = torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - held
    peaks: dict[int, int] = {}

    def attempt(images: int) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        step(images)
        torch.cuda.synchronize(device)
        peaks[images] = torch.cuda.max_memory_allocated(device) - held

    largest = largest_that_fits(attempt)
    torch.cuda.empty_cache()
    needed = peaks.get(planned)
    if needed is None and largest > SMALL:  # between two powers of two, or beyond: memory grows in a straight line
        slope = (peaks[largest] - peaks[largest // 2]) / (largest // 2)
        needed = int(peaks[largest] + slope * (planned - largest))
    return Memory(largest, needed, free, measured=True)


def _one_step(
    accelerator: Accelerator, entered: Entered, size: int, classes: int, loss: Loss, clip: Clip, images: int
) -> None:
    """One optimizer step of the engine on *images* pictures of noise a process."""
    world = accelerator.num_processes
    every = images * world
    noise = torch.randn(every, 3, size, size, generator=torch.Generator().manual_seed(0)).to(accelerator.device)
    labels = torch.arange(every, device=accelerator.device) % classes
    order = TrainOrder(every, 0, BatchPlan(every, images, world), accelerator.process_index)
    try:
        for _ in train_steps(accelerator, entered, _Whole(noise, labels, order), loss, clip, Progress(), 0):
            break
    finally:
        entered.optimizer.zero_grad()


class _Whole(FeatureFeed):
    """Batches that fit as they are or not at all: the engine would go on with smaller ones."""

    def shrink(self) -> bool:
        """Refuse, as memory does."""
        raise torch.OutOfMemoryError(f"{self.order.batch.micro_batch} pictures don't fit")


@contextmanager
def counted_activations(entered: Entered) -> Iterator[Callable[[], int]]:
    """Within it, count the bytes that forward passes save for their backward passes, each memory once.

    Parameters and buffers don't count: they are there anyway.
    """
    held = {t.untyped_storage().data_ptr() for t in (*entered.model.parameters(), *entered.model.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(sizes.values())


def free_memory(accelerator: Accelerator) -> int:
    """Bytes that this process may still take: its share of what the machine, or the container, has left."""
    if accelerator.device.type == "cuda":
        return int(torch.cuda.mem_get_info(accelerator.device)[0])
    return free_memory_of_machine() // int(accelerator.num_processes)


def free_memory_of_machine() -> int:
    """Bytes that the machine, or the container, has left."""
    contained = [_left_in_container(Path(limit), key) for limit, key in _CONTAINERS]
    return int(min([psutil.virtual_memory().available, *(value for value in contained if value is not None)]))


def _left_in_container(limit: Path, key: str) -> int | None:
    """None where there is no limit."""
    try:
        held = dict(line.split() for line in (limit.parent / "memory.stat").read_text().splitlines())
        return max(0, int(limit.read_text()) - int(held[key]))
    except (OSError, ValueError, KeyError):
        return None
