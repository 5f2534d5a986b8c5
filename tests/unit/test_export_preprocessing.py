"""`preprocessing.py`, which lies beside every export, against the path of training and evaluation."""

from __future__ import annotations

import ast
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import encode, noise
from PIL import Image

from tuning.data.images import decode
from tuning.data.transforms import Crop, Normalise
from tuning.exporting import preprocessing
from tuning.exporting.bundle import settings_for
from tuning.models.build import ModelInfo

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [(500, 375), (60, 90), (33, 201), (224, 224), (1000, 707), (45, 44), (30, 20)]
# Largest difference of a pixel, of 255, and share of the values that differ by more than 1: two roundings of the same
# resize. Dithered palettes are the hardest.
LARGEST, SHARE_ABOVE_1 = 4, 0.02


def info(size: int, crop_pct: float, interpolation: str = "bicubic") -> ModelInfo:
    return ModelInfo("m", "m", "", size, MEAN, STD, interpolation, crop_pct)


def settings(about: ModelInfo, uint8: bool = True, temperature: float = 1.0) -> dict[str, Any]:
    return settings_for(about, ("cat", "dog", "emu"), temperature, uint8)


def encoded(kind: str, width: int, height: int) -> bytes:
    picture = noise(width, height, seed=width)
    if kind == "EXIF":
        exif = Image.Exif()
        exif[0x112] = 6
        return encode(picture, "JPEG", exif=exif)
    if kind == "I;16":
        grey = np.asarray(picture.convert("L")).astype(np.uint16) * 257
        return encode(Image.fromarray(grey))
    if kind == "RGBA":
        layer = picture.convert("RGBA")
        layer.putalpha(noise(width, height, seed=height).convert("L"))
        return encode(layer)
    if kind == "CMYK":
        return encode(picture.convert("CMYK"), "JPEG")
    return encode(picture, "JPEG") if kind == "JPEG" else encode(picture.convert(kind))


@pytest.mark.parametrize("kind", ["JPEG", "EXIF", "CMYK", "RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
def test_pixels_are_those_of_the_evaluation(kind: str) -> None:
    for width, height in SIZES:
        for about in (info(32, 0.875), info(96, 1.0, "bilinear"), info(224, 0.95)):
            picture = encoded(kind, width, height)
            crop = Crop(about.input_size, about.interpolation, about.crop_pct)
            wanted = crop.center(decode(picture, min_side=about.input_size)).numpy().astype(int)
            got = preprocessing.prepare(io.BytesIO(picture), settings(about))
            assert (got.shape, got.dtype) == ((1, *wanted.shape), np.uint8)
            difference = np.abs(got[0] - wanted)
            assert difference.max() <= LARGEST, (width, height, about)
            assert (difference > 1).mean() <= SHARE_ABOVE_1, (width, height, about)


def test_floats_are_normalised_as_in_the_evaluation() -> None:
    about, picture = info(32, 0.875), encode(noise(70, 50))
    pixels = preprocessing.prepare(io.BytesIO(picture), settings(about))
    floats = preprocessing.prepare(io.BytesIO(picture), settings(about, uint8=False))
    assert floats.dtype == np.float32
    wanted = Normalise(MEAN, STD)(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(floats, wanted, rtol=0, atol=2e-6)


def test_another_filter_is_the_one_that_evaluation_takes_instead() -> None:
    assert settings(info(32, 1.0, "lanczos"))["interpolation"] == "bicubic"


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_an_agreed_range_are_refused(mode: str) -> None:
    picture = Image.fromarray(np.full((40, 40), 1e6, np.float32 if mode == "F" else np.int32))
    with pytest.raises(ValueError, match="save it with 8 or 16 bits"):
        preprocessing.prepare(io.BytesIO(encode(picture, "TIFF")), settings(info(32, 1.0)))


def test_probabilities_are_divided_by_the_temperature() -> None:
    logits = np.array([[1.0, 2.0, -1.0]], np.float32)
    cold, warm = (settings(info(32, 1.0), temperature=t) for t in (1.0, 2.5))
    wanted = torch.from_numpy(logits).double().div(2.5).softmax(1)
    np.testing.assert_allclose(preprocessing.probabilities(logits, warm), wanted, rtol=1e-12)
    assert preprocessing.answer(logits, warm) == ("dog", pytest.approx(float(wanted[0, 1])))
    assert preprocessing.answer(logits, cold)[1] > preprocessing.answer(logits, warm)[1]


def test_it_needs_numpy_and_pillow_alone() -> None:
    tree = ast.parse(Path(preprocessing.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} == {"__future__", "json", "pathlib", "typing", "numpy", "PIL"}
