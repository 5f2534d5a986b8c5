"""Every picture of both parts is looked at once, shared out over all processes and their workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from tuning.data.sources import Data
from tuning.data.streamed import StreamedRows
from tuning.data.tables import Table
from tuning.preflight.pictures import Facts, examine_all
from tuning.preflight.suspects import Split
from tuning.session import cpu_cores

WORTH_WORKERS = {True: 64, False: 2_000}  # pictures, decoded or not: with fewer a worker costs more than it saves


def read_pictures(
    accelerator: Accelerator,
    data: Data,
    *,
    image_size: int,
    in_full: bool,
    workers: int | Literal["auto"],
    progress: Callable[[int, int], None],
) -> dict[Split, list[Facts]]:
    """What is known of every picture, by part and row; the same on every process. All processes take part.

    Args:
        image_size: side of the model's input, pixels.
        in_full: decode every picture.
        workers: per process; auto = one a CPU core.
        progress: told how many of how many pictures of this process are done.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    shares = {"train": _share(data.train, rank, world), "eval": _share(data.eval, rank, world)}
    total, done = sum(map(len, shares.values())), 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        progress(done, total)

    found: dict[Split, list[Facts]] = {}
    splits: tuple[Split, ...] = ("train", "eval")
    for split in splits:
        table, rows = (data.train if split == "train" else data.eval), shares[split]
        processes = _workers(workers, len(rows), in_full)
        mine = examine_all(table, rows, image_size=image_size, in_full=in_full, workers=processes, progress=count)
        found[split] = sorted(gather_object(list(mine)))
    return found


def _share(rows: Table, rank: int, world: int) -> range:
    """Rows for one process: every so many; of streamed rows those that lie together."""
    if not isinstance(rows, StreamedRows):
        return range(rank, len(rows), world)
    return range(len(rows) * rank // world, len(rows) * (rank + 1) // world)


def _workers(asked: int | Literal["auto"], pictures: int, in_full: bool) -> int:
    if asked != "auto":
        return asked
    if pictures < WORTH_WORKERS[in_full]:
        return 0
    return max(1, cpu_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def picture_facts(facts: Mapping[Split, Sequence[Facts]]) -> dict[str, Any]:
    """Numbers of all pictures together, as `json` can write them."""
    sound = [one for part in facts.values() for one in part if one.problem is None]
    told: dict[str, Any] = {"pictures": {split: len(part) for split, part in facts.items()}, "readable": len(sound)}
    if sound:
        for name, values in (("width", [s.width for s in sound]), ("height", [s.height for s in sound])):
            low, middle, high = np.percentile(values, [0, 50, 100])
            told[name] = {"smallest": int(low), "median": float(middle), "largest": int(high)}
        told["megabytes"] = round(sum(one.size for one in sound) / 1e6, 3)
    return told
