"""What streaming reads, what it costs, and how well it shuffles.

    python tests/benchmarks/streaming.py [--folder DIR] [--pictures 5000]

Writes parquet shards of random JPEGs (about 15 kB each, row groups of 100) into a temporary folder and prints the
bytes that are read for every byte of pictures, over an epoch of training and an evaluation, by processes and workers;
images per second beside the same rows from the Arrow cache; and, by arithmetic alone, how the classes of an optimizer
step differ from a full shuffle where data of the size of ImageNet lies sorted by class.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import ClassLabel, Features, Image
from PIL import Image as Pillow

from tuning.data import streamed
from tuning.data.loader import EvalFeed, TrainFeed
from tuning.data.local_order import Blocks, LocalOrder, train_order
from tuning.data.sampling import EvalOrder, TrainOrder
from tuning.data.sources import Data, open_data
from tuning.data.transforms import Crop, Normalise
from tuning.sizes import BatchPlan

CLASSES, ROW_GROUP, PER_SHARD = 100, 100, 1000
READ = multiprocessing.Value("q", 0)
CROP, NORMALISE, CPU = Crop(64, "bilinear", 1.0), Normalise((0.5,) * 3, (0.5,) * 3), torch.device("cpu")


class Counting(io.FileIO):
    """A file that adds what is read to a number that worker processes share."""

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        with READ.get_lock():
            READ.value += count or 0
        return count

    def read(self, size: int = -1) -> bytes:
        content = super().read(size)
        with READ.get_lock():
            READ.value += len(content)
        return content


@contextmanager
def counted(base: str, path: str) -> Iterator[pq.ParquetFile]:
    """In place of `streamed.parquet_file`."""
    with Counting(path) as source, pq.ParquetFile(pa.PythonFile(source, mode="r"), pre_buffer=True) as file:
        yield file


def write(folder: Path, pictures: int) -> int:
    """Shards of so many pictures; returns the bytes of the pictures."""
    generator, total = np.random.default_rng(0), 0
    features = Features({"image": Image(), "label": ClassLabel(names=[f"c{n:03d}" for n in range(CLASSES)])})
    for shard in range(pictures // PER_SHARD):
        rows = []
        for _ in range(PER_SHARD):
            small = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Pillow.fromarray(small).resize((160, 120), Pillow.Resampling.BICUBIC).save(buffer, "JPEG", quality=97)
            rows.append({"bytes": buffer.getvalue(), "path": None})
            total += len(rows[-1]["bytes"])
        labels = generator.integers(0, CLASSES, PER_SHARD)
        table = pa.table({"image": rows, "label": labels}, schema=features.arrow_schema)
        pq.write_table(table, folder / f"train-{shard:05d}.parquet", row_group_size=ROW_GROUP)
    return total


def opened(folder: Path, **changes: Any) -> Data:
    """All pictures, as training and as evaluation data."""
    nothing = dict.fromkeys(("image_column", "label_column", "train_split", "eval_split", "limit_train", "limit_eval"))
    return open_data(str(folder), **nothing, val_fraction=0.25, seed=0, hold_out=False, **changes)


def training(rows: Any, blocks: Blocks | None, world: int, rank: int, workers: int) -> int:
    """An epoch of one process; its forward passes."""
    order = train_order(len(rows), 0, BatchPlan(64, min(32, 64 // world), world), rank, blocks)
    feed = TrainFeed(rows, order, CROP, NORMALISE, augment="light", flip="horizontal", workers=workers, device=CPU)
    return sum(1 for _ in feed.epoch(0))


def evaluation(rows: Any, world: int, rank: int, workers: int) -> int:
    """The evaluation of one process; its forward passes."""
    order = EvalOrder(len(rows), 64, rank, world, together=True)
    return sum(1 for _ in EvalFeed(rows, order, CROP, NORMALISE, workers=workers, device=CPU))


def amplification(folder: Path, total: int, shuffle_gb: float) -> None:
    """Bytes read by bytes of pictures, footers included."""
    rows = opened(folder, streaming=True, shuffle_gb=shuffle_gb).train
    order = LocalOrder(len(rows), 0, BatchPlan(64, 32, 1), 0, blocks=rows.blocks)
    print(
        f"\nbytes read / bytes of the pictures ({len(rows.blocks)} row groups, {order.lanes} lanes of {order.window}):"
    )
    for world, workers in ((1, 0), (1, 1), (1, 2), (2, 0), (2, 2), (8, 0)):
        READ.value = 0
        for rank in range(world):
            training(rows, rows.blocks, world, rank, workers)
        trained, READ.value = READ.value, 0
        for rank in range(world):
            evaluation(rows, world, rank, workers)
        shares = f"epoch {trained / total:.3f}, evaluation {READ.value / total:.3f}"
        print(f"  {world} processes, {workers} workers: {shares}", flush=True)


def speed(folder: Path, cache: Path) -> None:
    """Images per second of an epoch: streamed, and from the Arrow cache of `datasets`."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = cache
    begun = time.perf_counter()
    live = opened(folder, streaming=True, shuffle_gb=0.05).train
    opening = time.perf_counter() - begun
    begun = time.perf_counter()
    cached = opened(folder).train
    print(f"\nopening: streamed {opening:.2f} s, through the cache {time.perf_counter() - begun:.2f} s (once)")
    for workers in (0, 2):
        rates: dict[str, list[float]] = {"streamed": [], "cached": []}
        for _ in range(3):
            for name, rows, blocks in (("streamed", live, live.blocks), ("cached", cached, None)):
                begun = time.perf_counter()
                training(rows, blocks, 1, 0, workers)
                rates[name].append(len(rows) / (time.perf_counter() - begun))
        print(f"images/s, {workers} workers: " + ", ".join(f"{n} {np.median(r):,.0f}" for n, r in rates.items()))


def shuffling() -> None:
    """1,000 classes one after the other, row groups of 100: classes of a step, and how slowly they change."""
    rows, classes, batch = 1_281_100, 1000, 256
    starts = np.append(np.arange(0, rows, 100), rows)
    plan = BatchPlan(batch, batch, 1)
    orders: dict[str, TrainOrder] = {
        f"{held:,} row groups held": LocalOrder(rows, 0, plan, 0, blocks=Blocks(starts, held))
        for held in (1, 16, 64, 180, 1000)
    }
    orders["full shuffle"] = TrainOrder(rows, 0, plan, 0)
    print(f"\n{rows:,} rows sorted by class, steps of {batch}: classes of a step, correlation of their counts later")
    for name, order in orders.items():
        micros = order.micro_batches(0, 1000)
        counts = np.array(
            [np.bincount([item.row * classes // rows for item in next(micros)], minlength=classes) for _ in range(400)]
        )
        distinct = (counts > 0).sum(axis=1).mean()
        centred = counts - counts.mean(axis=1, keepdims=True)
        near = [float((centred[:-n] * centred[n:]).mean() / centred.var()) for n in (1, 10, 100)]
        print(f"  {name:<24} {distinct:5.0f} classes; after 1, 10, 100 steps {', '.join(f'{c:6.3f}' for c in near)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--pictures", type=int, default=5_000)
    asked = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    torch.set_num_threads(1)
    shuffling()
    with tempfile.TemporaryDirectory(dir=asked.folder) as place:
        folder = Path(place) / "shards"
        folder.mkdir()
        total = write(folder, asked.pictures)
        print(f"\n{asked.pictures:,} pictures, {total / 1e6:.0f} MB")
        real, streamed.parquet_file = streamed.parquet_file, counted
        amplification(folder, total, shuffle_gb=total * 0.15 / 1e9)
        amplification(folder, total, shuffle_gb=total * 0.6 / 1e9)
        streamed.parquet_file = real
        speed(folder, Path(place) / "cache")


if __name__ == "__main__":
    main()
