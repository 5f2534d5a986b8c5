"""Small pictures and folders of them, made on the spot for tests."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def noise(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """A smooth colourful picture, different for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The picture as bytes of a file of this kind."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_classes(root: Path, counts: Mapping[str, int], suffix: str = ".jpg") -> Path:
    """Make `root/<class>/<number><suffix>`, as many as *counts* says, each picture different."""
    seed = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            noise(16, 16, seed).save(root / name / f"{index:03d}{suffix}")
            seed += 1
    return root
