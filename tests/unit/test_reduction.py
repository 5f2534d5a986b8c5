"""How small a picture may be kept: every later crop is still made smaller or left as it is."""

from __future__ import annotations

import math

import numpy as np
import PIL
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pictures import encode, noise
from PIL import Image
from torchvision.transforms import v2

from tuning.data.images import decode
from tuning.data.reduction import Reduction
from tuning.data.resizing import INTERPOLATIONS, resize
from tuning.data.transforms import CROP_AREA, Crop, random_box

SIDES = st.integers(8, 900)


def boxes(height: int, width: int, share: float, draws: int = 40) -> list[tuple[int, int]]:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return [random_box(height, width, (share, 1.0), generator)[2:] for _ in range(draws)]


@settings(max_examples=150, deadline=None)
@given(
    height=SIDES,
    width=SIDES,
    size=st.integers(8, 400),
    share=st.sampled_from([low for low, _ in CROP_AREA.values()]),
    crop_pct=st.floats(0.5, 1.0),
)
@example(height=375, width=500, size=224, share=0.7, crop_pct=0.875)
@example(height=200, width=900, size=64, share=0.08, crop_pct=0.95)
@example(height=309, width=309, size=224, share=0.7, crop_pct=1.0)
def test_no_crop_of_a_kept_picture_is_enlarged(
    height: int, width: int, size: int, share: float, crop_pct: float
) -> None:
    """Unless the picture is kept as it is. The share of the smallest crops is that of all of them here."""
    crop = Crop(size, "bicubic", crop_pct)
    kept = Reduction("bicubic", crop.shorter_side, ((size, share),), size).kept_size(height, width)
    assert kept[0] <= height
    assert kept[1] <= width
    if kept == (height, width):
        return
    assert min(kept) >= crop.shorter_side >= size
    assert all(min(box) >= size for box in boxes(*kept, share))
    assert kept[0] / kept[1] == pytest.approx(height / width, abs=1.5 / min(kept) * max(1, height / width))


def test_photos_get_smaller_by_what_their_smallest_crop_allows() -> None:
    def kept(strength: str, size: int = 224, height: int = 375, width: int = 500) -> tuple[int, int]:
        share = CROP_AREA[strength][0]
        return Reduction("bicubic", math.floor(size / 0.875), ((size, share),), size).kept_size(height, width)

    assert kept("light") == (268, 357)
    assert kept("medium") == kept("strong") == (375, 500)
    assert kept("strong", 128, 1200, 1600) == (453, 604)
    assert kept("light", 224, 200, 1000) == (200, 1000)  # its crops are enlarged in any case


def test_several_sizes_and_strengths_the_largest_decides() -> None:
    small, large = ((96, 0.7),), ((224, 0.35),)
    both = Reduction("bicubic", 256, (*small, *large), 224)
    assert both.kept_size(1000, 1200) == Reduction("bicubic", 256, large, 224).kept_size(1000, 1200)
    assert min(both.kept_size(1000, 1200)) > min(Reduction("bicubic", 256, small, 224).kept_size(1000, 1200))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(375, 500), (500, 375), (300, 300), (90, 400), (30, 20), (256, 256), (257, 256)])
@pytest.mark.parametrize("crop_pct", [0.875, 0.95, 1.0])
def test_evaluation_pixels_are_those_without_a_cache(
    interpolation: str, shape: tuple[int, int], crop_pct: float
) -> None:
    picture = torch.from_numpy(np.array(noise(shape[1], shape[0], 3)))
    crop = Crop(128, interpolation, crop_pct)
    reduced = Reduction(interpolation, crop.shorter_side, (), crop.size)(picture)
    assert torch.equal(crop.center(reduced), crop.center(picture))
    assert min(reduced.shape[:2]) == min(*shape, crop.shorter_side)


def test_small_pictures_are_kept_to_the_bit() -> None:
    picture = torch.from_numpy(np.array(noise(250, 200, 3)))
    reduction = Reduction("bicubic", 256, ((224, 0.7),), 224)
    assert reduction(picture) is picture


def test_a_jpeg_beyond_16_megapixels_keeps_what_its_crops_need() -> None:
    encoded = encode(noise(5200, 3600), "JPEG")
    for random in ((), ((128, 0.7),), ((224, 0.08),)):
        reduction = Reduction("bicubic", 146, random, 128)
        least = reduction.kept_size(3600, 5200)
        height, width, _ = decode(encoded, min_side=reduction.min_side).shape
        assert (height, width) < (3600, 5200)
        assert height >= least[0]
        assert width >= least[1] - 1


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resizing_is_pillows(interpolation: str) -> None:
    """Noise is the hardest: every value is rounded twice. What is cut out of a larger picture, too.

    Tall pictures that get wider are resized in the order of Pillow 13, rows first. Earlier ones began with the columns:
    there each direction is asked for by itself.
    """
    generator, mode = np.random.default_rng(0), Image.Resampling[interpolation.upper()]
    for shape in [(375, 500), (500, 375), (300, 290), (300, 150), (230, 600), (90, 120), (120, 90), (300, 300)]:
        whole = torch.from_numpy(generator.integers(0, 256, (*shape, 3), dtype=np.uint8))
        part = whole[3:-5, 2:-1]
        picture = Image.fromarray(part.numpy())
        if int(PIL.__version__.split(".")[0]) < 13 and picture.height > 224 > picture.width:
            picture = picture.resize((picture.width, 224), mode)
        wanted = np.asarray(picture.resize((224, 224), mode), np.float64)
        error = np.square(resize(part, 224, 224, INTERPOLATIONS[interpolation]).numpy() - wanted).mean()
        assert error < 255**2 / 10**6.2, (shape, 10 * np.log10(255**2 / error))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resizing_into_a_batch_is_torchvisions(interpolation: str) -> None:
    """To the bit, where rows come first: whole pictures and parts of them, smaller and larger."""
    generator, mode = np.random.default_rng(0), INTERPOLATIONS[interpolation]
    for shape in [(375, 500), (40, 30), (75, 225), (64, 64)]:
        whole = torch.from_numpy(generator.integers(0, 256, (*shape, 3), dtype=np.uint8))
        for part in (whole, whole[3:-5, 2:-1]):
            wanted = v2.functional.resize(part.permute(2, 0, 1), [64, 48], mode, antialias=True).permute(1, 2, 0)
            batch = torch.zeros(3, 64, 48, 3, dtype=torch.uint8)
            assert torch.equal(resize(part, 64, 48, mode, out=batch[1]), wanted)
            assert torch.equal(batch[1], wanted)
            assert not batch[0].any()
            assert not batch[2].any()
            assert torch.equal(resize(part, 64, 48, mode), wanted)


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 700), width=st.integers(1, 700), strength=st.sampled_from(sorted(CROP_AREA)))
@example(height=1, width=700, strength="light")
@example(height=700, width=3, strength="strong")
def test_random_boxes_are_torchvisions(height: int, width: int, strength: str) -> None:
    """The same draws from a generator of their own, the fallback for slim pictures included."""
    theirs = v2.RandomResizedCrop(32, scale=CROP_AREA[strength], antialias=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(height)
        wanted = [theirs.make_params([torch.empty(3, height, width)]) for _ in range(5)]
    generator = torch.Generator().manual_seed(height)
    assert [random_box(height, width, CROP_AREA[strength], generator)._asdict() for _ in range(5)] == wanted
