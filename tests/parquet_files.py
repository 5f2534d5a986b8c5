"""Parquet shards of small pictures, made on the spot for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Image
from pictures import encode, noise

CLASSES = ("cat", "dog", "emu")


def picture_table(
    labels: Sequence[int], first: int = 0, classes: Sequence[str] = CLASSES, strength: int = 0
) -> pa.Table:
    """Rows as `datasets` writes them: a struct of bytes and path, and a ClassLabel.

    Args:
        first: number of the first picture, which names and paints it.
        strength: of the colour that a class has; 0 = classes look alike.
    """
    features = Features({"image": Image(), "label": ClassLabel(names=list(classes))})
    pictures = [
        {"bytes": encode(_painted(first + n, label, strength)), "path": f"{first + n:05d}.png"}
        for n, label in enumerate(labels)
    ]
    return pa.table({"image": pictures, "label": pa.array(labels, pa.int64())}, schema=features.arrow_schema)


def _painted(seed: int, label: int, strength: int) -> PIL.Image.Image:
    picture = noise(16, 16, seed)
    if not strength:
        return picture
    pixels = np.asarray(picture).astype(int) // 4
    pixels[:, :, label] += strength
    return PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_shards(
    root: Path, counts: Mapping[str, Sequence[int]], row_group: int = 5, *, sort: bool = False, strength: int = 0
) -> Path:
    """``root/<split>-0000N.parquet`` with so many pictures each, in row groups of *row_group*.

    Args:
        sort: classes one after the other instead of mixed.
    """
    root.mkdir(parents=True, exist_ok=True)
    generator, first = np.random.default_rng(0), 0
    for split, sizes in counts.items():
        labels = generator.integers(0, len(CLASSES), sum(sizes))
        if sort:
            labels = np.sort(labels)
        for number, part in enumerate(np.split(labels, np.cumsum(sizes)[:-1])):
            table = picture_table(part.tolist(), first, strength=strength)
            pq.write_table(table, root / f"{split}-{number:05d}.parquet", row_group_size=row_group)
            first += len(part)
    return root
