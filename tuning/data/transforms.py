"""One picture to one uint8 square, and one uint8 batch to the model's input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from tuning.data.sampling import uniform

# Area of a random crop as fractions of the picture's.
CROP_AREA = {"light": (0.7, 1.0), "medium": (0.35, 1.0), "strong": (0.08, 1.0)}
FLIP_LEFT_RIGHT, FLIP_TOP_BOTTOM, CROP = range(3)  # streams of `uniform`
INTERPOLATIONS = {"bilinear": v2.InterpolationMode.BILINEAR, "bicubic": v2.InterpolationMode.BICUBIC}


@dataclass(frozen=True)
class Crop:
    """Cut a square of `size` pixels out of a picture and resize it with antialiasing, all in uint8.

    Attributes:
        size: side of the square in pixels.
        interpolation: ``bilinear`` or ``bicubic``, the model's own.
        crop_pct: share of the shorter side that the evaluation crop keeps.
        operations: what comes after a random crop, on ``(3, size, size)`` uint8; None = nothing.
    """

    size: int
    interpolation: str
    crop_pct: float
    operations: Callable[[Tensor], Tensor] | None = None

    def center(self, image: Tensor) -> Tensor:
        """Evaluation: shorter side to ``size / crop_pct``, then the centre. ``(H, W, 3)`` -> ``(3, size, size)``."""
        scaled = F.resize(_planes(image), [math.floor(self.size / self.crop_pct)], self._mode, antialias=True)
        return F.center_crop(scaled, [self.size, self.size])  # type: ignore[no-any-return]

    def random(self, image: Tensor, strength: str, seed: int) -> Tensor:
        """Training: a random part of the picture (Szegedy et al. 2015). ``(H, W, 3)`` -> ``(3, size, size)``.

        The draws are a function of *seed*; this process's generators are left as they were.
        """
        planes = _planes(image)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            crop = v2.RandomResizedCrop(self.size, scale=CROP_AREA[strength], interpolation=self._mode, antialias=True)
            cut = crop(planes)
            return cut if self.operations is None else self.operations(cut)

    def resized(self, images: Tensor, size: int) -> Tensor:
        """A batch of such squares at *size* pixels, uint8, on its device."""
        if images.shape[-1] == size:
            return images
        return F.resize(images, [size, size], self._mode, antialias=True)  # type: ignore[no-any-return]

    @property
    def _mode(self) -> v2.InterpolationMode:
        return INTERPOLATIONS.get(self.interpolation, v2.InterpolationMode.BICUBIC)


def _planes(image: Tensor) -> Tensor:
    """``(H, W, 3)`` seen as ``(3, H, W)`` in channels-last order, without a copy."""
    return image.permute(2, 0, 1)


def crop_seed(seed: int, epoch: int, index: int) -> int:
    """Seed for `Crop.random` of one image, with `Item.draw` *index*, in one epoch."""
    return int(uniform(seed, epoch, np.array([index]), CROP)[0] * 2**53)


def random_flips(
    images: Tensor, flip: Literal["none", "horizontal", "both"], seed: int, epoch: int, index: Tensor
) -> Tensor:
    """Flip each image of a batch with probability one half, on the batch's device.

    Args:
        images: ``(B, 3, S, S)``.
        index: `Item.draw` of each on the CPU, ``(B,)``; with *seed* and *epoch* they decide.
    """
    axes = {"none": {}, "horizontal": {FLIP_LEFT_RIGHT: 3}, "both": {FLIP_LEFT_RIGHT: 3, FLIP_TOP_BOTTOM: 2}}[flip]
    for stream, axis in axes.items():
        chosen = torch.from_numpy(uniform(seed, epoch, index.numpy(), stream) < 0.5)
        chosen = chosen.to(images.device, non_blocking=True)[:, None, None, None]
        images = torch.where(chosen, images.flip(axis), images)
    return images


@dataclass(frozen=True)
class Normalise:
    """uint8 in [0, 255] to float with the model's mean and standard deviation, per channel in [0, 1] units."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """``(B, 3, S, S)`` uint8 -> float32, channels-last."""
        scale = torch.tensor(self.std).mul_(255).reciprocal_().view(1, -1, 1, 1)
        shift = torch.tensor(self.mean).div(torch.tensor(self.std)).neg_().view(1, -1, 1, 1)
        device = images.device
        scaled = images.to(torch.float32).mul_(scale.to(device, non_blocking=True))
        return scaled.add_(shift.to(device, non_blocking=True)).contiguous(memory_format=torch.channels_last)

    def undone(self, inputs: Tensor) -> Tensor:
        """``(B, 3, S, S)`` as the model gets it -> float32 in [0, 1]; what lies outside, after mixing, is cut off."""
        mean, std = (torch.tensor(values, device=inputs.device).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (inputs.float() * std + mean).clamp(0, 1)
