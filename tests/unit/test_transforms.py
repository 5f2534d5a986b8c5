"""Crops, flips and normalisation: timm's own evaluation, and draws that depend on (seed, epoch, index) alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pictures import noise
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import functional as tv

from tuning.data.transforms import CROP_AREA, Crop, Normalise, crop_seeds, random_flips

SHAPES = [(300, 300), (500, 375), (375, 500), (64, 48), (1000, 200), (129, 131), (224, 224), (40, 90)]


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth picture with some grain, as a camera would take it."""
    smooth = np.asarray(noise(width, height, seed), dtype=np.int16)
    grain = np.random.default_rng(seed).integers(-6, 7, smooth.shape)
    return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures."""
    error = (a.double() - b.double()).square().mean()
    return float("inf") if error == 0 else float(10 * torch.log10(255**2 / error))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("size", "interpolation", "crop_pct"), [(128, "bicubic", 0.875), (224, "bicubic", 0.95), (96, "bilinear", 1.0)]
)
def test_the_evaluation_crop_is_timms(shape: tuple[int, int], size: int, interpolation: str, crop_pct: float) -> None:
    picture = photo(*shape)
    transform = create_transform(
        (3, size, size), is_training=False, interpolation=interpolation, crop_pct=crop_pct, normalize=False
    )
    theirs = transform(picture)
    ours = Crop(size, interpolation, crop_pct).center(as_tensor(picture))
    assert ours.shape == (3, size, size)
    assert ours.dtype == theirs.dtype == torch.uint8
    assert psnr(ours, theirs) > 55


def test_unknown_interpolations_are_bicubic() -> None:
    picture = as_tensor(photo(200, 150))
    assert torch.equal(Crop(64, "random", 0.9).center(picture), Crop(64, "bicubic", 0.9).center(picture))
    assert not torch.equal(Crop(64, "bilinear", 0.9).center(picture), Crop(64, "bicubic", 0.9).center(picture))


@pytest.mark.parametrize("strength", ["light", "medium"])
def test_a_random_crop_is_a_function_of_its_seed(strength: str) -> None:
    crop, picture = Crop(48, "bicubic", 0.9), as_tensor(photo(160, 120))
    torch.manual_seed(1)
    first = [crop.random(picture, strength, seed) for seed in range(20)]
    torch.manual_seed(2)
    again = [crop.random(picture, strength, seed) for seed in range(20)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(crop.shape == (3, 48, 48) and crop.dtype == torch.uint8 for crop in first)
    assert len({crop.numpy().tobytes() for crop in first}) == 20


def test_a_random_crop_leaves_the_generators_alone() -> None:
    before = torch.get_rng_state()
    numpy_before = np.random.get_state()[1].copy()
    Crop(32, "bicubic", 0.9).random(as_tensor(photo(60, 50)), "medium", 5)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


@pytest.mark.parametrize("strength", ["light", "medium"])
def test_random_crops_keep_the_announced_area(strength: str) -> None:
    """On a picture whose columns and rows count up, a crop's range of values tells its width and height."""
    side = 256
    ramp = torch.arange(side, dtype=torch.uint8)
    picture = torch.stack([ramp.expand(side, side), ramp[:, None].expand(side, side), torch.zeros(side, side)], dim=2)
    areas = []
    for seed in range(200):
        crop = Crop(64, "bilinear", 1.0).random(picture.to(torch.uint8), strength, seed).double()
        width, height = (crop[n].max() - crop[n].min() + 1 for n in (0, 1))
        areas.append(float(width * height) / side**2)
    least, most = CROP_AREA[strength]
    assert least - 0.06 < min(areas) < least + 0.1
    assert most - 0.1 < max(areas) <= most


def test_crop_seeds_differ_between_images_epochs_and_runs() -> None:
    seeds = {seed for s in range(5) for e in range(5) for seed in crop_seeds(s, e, np.arange(100))}
    assert len(seeds) == 2500
    assert crop_seeds(3, 2, np.array([1])) == crop_seeds(3, 2, np.arange(5))[1:2], "whatever else is in the batch"


def flipped(flip: str, seed: int, epoch: int, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which pictures of a batch were mirrored left-right, and which upside down."""
    picture = torch.arange(12, dtype=torch.uint8).view(3, 2, 2)
    batch = picture.expand(len(index), 3, 2, 2)
    result = random_flips(batch, flip, seed, epoch, index)  # type: ignore[arg-type]
    right, down = result[:, 0, 0, 0] % 2 == 1, result[:, 0, 0, 0] >= 2
    for axis, chosen in ((3, right), (2, down)):
        batch = torch.where(chosen[:, None, None, None], batch.flip(axis), batch)
    assert torch.equal(batch, result)
    return right, down


def test_half_are_flipped_and_the_axes_are_independent() -> None:
    right, down = flipped("both", 0, 0, torch.arange(4000))
    for part in (right, down, right ^ down):
        assert abs(part.double().mean() - 0.5) < 0.03
    right, down = flipped("horizontal", 0, 0, torch.arange(4000))
    assert abs(right.double().mean() - 0.5) < 0.03
    assert not down.any()
    right, down = flipped("none", 0, 0, torch.arange(4000))
    assert not right.any()
    assert not down.any()


def test_flips_depend_on_seed_epoch_and_index_alone() -> None:
    index = torch.arange(64)
    whole = flipped("both", 3, 4, index)
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for axis, part in zip(whole, flipped("both", 3, 4, index[shuffled]), strict=True):
        assert torch.equal(axis[shuffled], part)
    assert not torch.equal(whole[0], flipped("both", 3, 5, index)[0])
    assert not torch.equal(whole[0], flipped("both", 4, 4, index)[0])


@pytest.mark.parametrize(("mean", "std"), [((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,) * 3, (0.5,) * 3)])
def test_normalise_is_torchvisions(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(12).view(4, 3, 16, 16)
    ours = Normalise(mean, std)(images)
    theirs = tv.normalize(images.float() / 255, list(mean), list(std))
    assert ours.dtype == torch.float32
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, torch.arange(256, dtype=torch.uint8).repeat(12).view(4, 3, 16, 16))
