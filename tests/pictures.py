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


def write_colours(root: Path, train: int, val: int, strength: int) -> Path:
    """Train and val folders of three classes that differ in colour, under noise, so many pictures of each.

    Args:
        strength: of a class's own colour channel, 0 to 255; the others are at 60, the noise has the deviation 40.
    """
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for channel, name in ((2, "blue"), (1, "green"), (0, "red")):
            colour = [strength if channel == place else 60 for place in range(3)]
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(generator.normal(colour, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root
