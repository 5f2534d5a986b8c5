"""One picture to one uint8 square, and one uint8 batch to the model's input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from tuning.data.resizing import mode_of, resize
from tuning.data.sampling import uniform

# Area of a random crop as fractions of the picture's.
CROP_AREA = {"light": (0.7, 1.0), "medium": (0.35, 1.0), "strong": (0.08, 1.0)}
ASPECT = (3 / 4, 4 / 3)  # width / height of a random crop
_LOG_ASPECT = torch.log(torch.tensor(ASPECT)).tolist()
FLIP_LEFT_RIGHT, FLIP_TOP_BOTTOM, CROP = range(3)  # streams of `uniform`


class Box(NamedTuple):
    """A part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


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

    def center(self, image: Tensor, out: Tensor | None = None) -> Tensor:
        """Evaluation: shorter side to ``size / crop_pct``, then the centre. ``(H, W, 3)`` -> ``(3, size, size)``.

        Args:
            out: contiguous ``(size, size, 3)`` uint8 to write into; the result is a view of it.
        """
        height, width = at_shorter_side(image.shape[0], image.shape[1], self.shorter_side)
        scaled = image if image.shape[:2] == (height, width) else resize(image, height, width, self._mode)
        top, left = (round((side - self.size) / 2) for side in (height, width))
        return self._square(scaled[top : top + self.size, left : left + self.size], out)

    def random(self, image: Tensor, strength: str, seed: int, out: Tensor | None = None) -> Tensor:
        """Training: a random part of the picture (Szegedy et al. 2015). ``(H, W, 3)`` -> ``(3, size, size)``.

        The draws are a function of *seed*; this process's generators are left as they were.

        Args:
            out: as of `center`.
        """
        if self.operations is None:
            return self._random(image, strength, torch.Generator().manual_seed(seed), out)
        with torch.random.fork_rng(devices=[]):  # operations draw from torch's own generator
            cut = self.operations(self._random(image, strength, torch.manual_seed(seed)))
        return cut if out is None else out.copy_(cut.permute(1, 2, 0)).permute(2, 0, 1)

    def resized(self, images: Tensor, size: int) -> Tensor:
        """A batch of such squares at *size* pixels, uint8, on its device."""
        if images.shape[-1] == size:
            return images
        return F.resize(images, [size, size], self._mode, antialias=True)  # type: ignore[no-any-return]

    @property
    def shorter_side(self) -> int:
        """That to which the evaluation scales a picture, in pixels."""
        return math.floor(self.size / self.crop_pct)

    def _random(self, image: Tensor, strength: str, generator: torch.Generator, out: Tensor | None = None) -> Tensor:
        top, left, height, width = random_box(image.shape[0], image.shape[1], CROP_AREA[strength], generator)
        return self._square(image[top : top + height, left : left + width], out)

    def _square(self, part: Tensor, out: Tensor | None) -> Tensor:
        return resize(part, self.size, self.size, self._mode, out).permute(2, 0, 1)

    @property
    def _mode(self) -> v2.InterpolationMode:
        return mode_of(self.interpolation)


def at_shorter_side(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width of a picture whose shorter side is scaled to *side* pixels, as torchvision rounds them."""
    return (side, int(side * width / height)) if height <= width else (int(side * height / width), side)


def random_box(height: int, width: int, area: tuple[float, float], generator: torch.Generator) -> Box:
    """The part of a picture that torchvision's `RandomResizedCrop` takes, by the same draws from *generator*.

    Its own code draws from the generator of the whole process, and costs as much as the resizing.

    Args:
        area: bounds of the part's share of the picture's area.
    """
    for _ in range(10):
        pixels = height * width * torch.empty(1).uniform_(*area, generator=generator).item()
        aspect = torch.empty(1).uniform_(*_LOG_ASPECT, generator=generator).exp_().item()
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = (int(torch.randint(room + 1, (1,), generator=generator)) for room in (height - h, width - w))
            return Box(top, left, h, w)
    h = min(height, round(width / ASPECT[0]))  # the largest central part that is not too slim
    w = min(width, round(height * ASPECT[1]))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def crop_seeds(seed: int, epoch: int, index: np.ndarray) -> list[int]:
    """Seeds for `Crop.random` of images in one epoch, by their `Item.draw` in *index*."""
    return [int(drawn) for drawn in uniform(seed, epoch, index, CROP) * 2**53]


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
