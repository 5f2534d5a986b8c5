"""A folder of JPEGs with about the detail of photos: 500 x 375 pixels, noise of all scales, made on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 10
SIZE = (500, 375)
QUALITY = 90


def write_photos(folder: Path, train: int, val: int) -> Path:
    """`folder/{train,val}/<class>/<number>.jpg`, so many of either, each another window of one of four textures."""
    generator = np.random.default_rng(0)
    textures = [texture(generator) for _ in range(4)]
    for part, count in (("train", train), ("val", val)):
        for number in range(count):
            path = folder / part / f"class{number % CLASSES}" / f"{number:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = textures[int(generator.integers(len(textures)))]
            top, left = (
                int(generator.integers(side - shown)) for side, shown in zip(whole.shape, SIZE[::-1], strict=False)
            )
            Image.fromarray(whole[top : top + SIZE[1], left : left + SIZE[0]]).save(path, quality=QUALITY)
    return folder


def texture(generator: np.random.Generator, height: int = 800, width: int = 1000) -> np.ndarray:
    """Noise whose amplitude falls with the frequency as in photos (Field 1987), ``(height, width, 3)`` uint8."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    planes = []
    for contrast in (45.0, 12.0, 12.0):  # brightness, then two of colour
        spectrum = np.fft.rfft2(generator.normal(size=(height, width))) / np.maximum(frequency, 1 / width)
        plane = np.fft.irfft2(spectrum, s=(height, width))
        planes.append(contrast * (plane - plane.mean()) / plane.std())
    brightness, red, blue = planes
    colours = np.stack((brightness + red, brightness - 0.5 * (red + blue), brightness + blue), axis=-1)
    return np.clip(colours + 120, 0, 255).astype(np.uint8)
