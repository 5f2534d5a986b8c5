"""Flags of the group batch."""

from dataclasses import dataclass
from typing import Literal, Optional


@dataclass(frozen=True)
class BatchFlags:
    batch_size: int = 64
    """Images per optimizer step over all processes: the number the learning rate belongs to. Where no flag says it,
    fewer than 640 training images get a smaller one (docs/defaults.md)."""
    micro_batch: int | Literal["auto"] = "auto"
    """Images per forward pass per process. auto = the largest divisor of a process's share of --batch-size, up to 64 on
    a CPU and 1024 on a GPU. Where memory runs out it is halved, a number given here too, and the run goes on: the batch
    of an optimizer step and the learning rate stay."""
    grad_checkpointing: bool = False
    """Keep what enters a block of the network and compute the rest again in the backward pass: less memory, about one
    more forward pass of the open blocks a step, the same gradients (docs/memory.md)."""
    workers: int | Literal["auto"] = "auto"
    """Loader processes per training process; 0 = none. auto = CPU cores per training process less one, 1 to 8; none
    when training itself runs on two CPU cores or fewer."""
    batch_scaling: Literal["none", "area"] = "none"
    """area = a stage of smaller pictures than the last one takes a batch larger by the ratio of the areas, rounded to a
    whole multiple of --batch-size; --lr-scaling then applies to it."""
    cache: Literal["none", "ram", "disk"] = "none"
    """Keep decoded pictures, as small as all crops allow: ram = in memory, for the run; disk = in --cache-folder, also
    for later runs (docs/cache.md)."""
    cache_folder: Optional[str] = None
    """Folder for --cache disk, on a local disk. Default: ~/.cache/fine-tuning/pictures."""
