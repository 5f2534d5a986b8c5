"""A picture as the model was evaluated on it, and an answer from its logits. Needs numpy and Pillow, nothing else.

This file lies beside every export, with the numbers it works by in ``preprocessing.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def read_settings(folder: Path = Path(__file__).parent) -> dict[str, Any]:
    """The content of ``preprocessing.json`` in *folder*, or beside this file."""
    settings: dict[str, Any] = json.loads((folder / "preprocessing.json").read_text(encoding="utf-8"))
    return settings


def prepare(picture: Any, settings: dict[str, Any]) -> npt.NDArray[Any]:
    """The model's input ``(1, 3, S, S)`` for one *picture*: a path, or an open file.

    uint8 RGB where the export normalises by itself, else float32 with the mean and deviation of the settings.
    """
    pixels = np.asarray(crop(upright_rgb(picture), settings)).transpose(2, 0, 1)[None]
    if settings["input"]["dtype"] == "uint8":
        return np.ascontiguousarray(pixels)
    mean, std = (np.array(settings[key], np.float32).reshape(1, 3, 1, 1) for key in ("mean", "std"))
    return np.asarray((pixels / np.float32(255) - mean) / std, np.float32)


def upright_rgb(picture: Any) -> Image.Image:
    """The first frame, turned as its camera was held; transparency on white, 16-bit grey as 8-bit grey."""
    with Image.open(picture) as opened:
        upright = ImageOps.exif_transpose(opened)
    if upright.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; save it with 8 or 16 bits a channel")
    if upright.mode.startswith("I"):
        grey = (np.asarray(upright).astype(np.int64) + 128) // 257
        if grey.min() < 0 or grey.max() > 255:
            raise ValueError("32-bit integer pixels have no agreed range; save it with 8 or 16 bits a channel")
        upright = Image.fromarray(grey.astype(np.uint8))
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    return upright.convert("RGB")


def crop(image: Image.Image, settings: dict[str, Any]) -> Image.Image:
    """Resize the shorter side with antialiasing, then cut the square out of the centre."""
    side, short = settings["crop"], settings["resize_shorter_side"]
    long = int(short * max(image.size) / min(image.size))
    size = (short, long) if image.width <= image.height else (long, short)
    resized = image.resize(size, FILTERS[settings["interpolation"]])
    left, top = (int(round((length - side) / 2)) for length in size)  # noqa: RUF046 (rounds to even, as torchvision)
    return resized.crop((left, top, left + side, top + side))


def probabilities(logits: Any, settings: dict[str, Any]) -> npt.NDArray[np.float64]:
    """Softmax of the logits ``(..., K)`` over the temperature that calibrates them (1 where none was fitted)."""
    scaled = np.asarray(logits, np.float64) / (settings["temperature"] or 1.0)
    shares = np.exp(scaled - scaled.max(-1, keepdims=True))
    return np.asarray(shares / shares.sum(-1, keepdims=True))


def answer(logits: Any, settings: dict[str, Any]) -> tuple[str, float]:
    """The most probable class of one picture's logits, ``(1, K)`` or ``(K,)``, and its probability."""
    shares = probabilities(logits, settings).reshape(-1)
    best = int(shares.argmax())
    return settings["classes"][best], float(shares[best])
