"""Mixup (Zhang et al. 2018, arXiv:1710.09412) and CutMix (Yun et al. 2019, arXiv:1905.04899), once per micro-batch.

Drawn on the host as a function of counters, carried out on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tuning.data.sampling import Rows, uniform

WHICH, DOWN, ACROSS = range(10, 13)  # streams of `uniform`; 0 to 2 are those of crops and flips
MIXUP, CUTMIX = 1, 2  # streams of `betas`


class Mix(NamedTuple):
    """How every picture of a micro-batch is mixed with another one of it.

    Attributes:
        partners: place of the other one in the micro-batch, ``(B,)`` int64.
        blend: factor of the picture itself outside of its box, ``(B,)`` float32; the partner has the rest.
        boxes: top, bottom, left and right of what the partner covers, in pixels, ``(B, 4)`` int64; may be empty.
        shares: of the picture itself in the result, and of its label in the loss, ``(B,)`` float32.
    """

    partners: Tensor
    blend: Tensor
    boxes: Tensor
    shares: Tensor


@dataclass(frozen=True)
class Mixing:
    """Draws a `Mix` for any micro-batch; with both methods each picture gets one of them, with equal probability.

    Attributes:
        mixup: alpha of the Beta(alpha, alpha) distribution of the share; 0 = off.
        cutmix: the same for CutMix.
        seed: of the run.
        images: in the training data.
    """

    mixup: float
    cutmix: float
    seed: int
    images: int

    def draw(self, epoch: int, rows: Rows, real: np.ndarray, size: int) -> Mix:
        """The draws for the pictures: shares and boxes by (seed, epoch, `Item.draw`), partners by the order.

        A picture's partner is the next real one of the micro-batch, whose order is random already; the last one's is
        the first. A single real one, and filler, stay as they are.

        Args:
            rows: `Item.draw` of the pictures, their rows where each comes once, ``(B,)``.
            real: False for filler, ``(B,)``.
            size: side of the pictures in pixels.
        """
        places = np.flatnonzero(real)
        partners = np.arange(len(rows))
        partners[places] = np.roll(places, -1)
        cuts = np.full(len(rows), self.mixup == 0)
        if self.mixup and self.cutmix:
            cuts = uniform(self.seed, epoch, rows, WHICH) < 0.5
        own = np.where(cuts, self._betas(self.cutmix, epoch, CUTMIX, rows), self._betas(self.mixup, epoch, MIXUP, rows))
        own[partners == np.arange(len(rows))] = 1.0
        centres = [uniform(self.seed, epoch, rows, stream) for stream in (DOWN, ACROSS)]
        boxes = clipped_boxes(np.where(cuts, own, 1.0), size, *centres)
        blend = np.where(cuts, 1.0, own)
        area = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])
        shares = blend - area / size**2
        return Mix(
            torch.from_numpy(partners),
            torch.from_numpy(blend).float(),
            torch.from_numpy(boxes),
            torch.from_numpy(shares).float(),
        )

    def _betas(self, alpha: float, epoch: int, stream: int, rows: Rows) -> np.ndarray:
        return betas(self.images, self.seed, epoch, alpha, stream)[rows] if alpha else np.ones(len(rows))


@lru_cache(maxsize=4)
def betas(images: int, seed: int, epoch: int, alpha: float, stream: int) -> np.ndarray:
    """Draws from Beta(alpha, alpha) for one epoch, one for every row of the data, ``(images,)``."""
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, stream]))
    return generator.beta(alpha, alpha, images)


def clipped_boxes(own: np.ndarray, size: int, down: np.ndarray, across: np.ndarray) -> Rows:
    """Squares of ``(1 - own) * size^2`` pixels, rounded down to whole sides, as far as they lie in the picture.

    Args:
        own: share that the picture itself is to keep, ``(B,)``.
        size: side of the picture in pixels.
        down, across: the centre as fractions of the side, in [0, 1), ``(B,)``.

    Returns:
        ``(B, 4)``: top, bottom, left, right; the second and fourth are the first pixels beyond.
    """
    side = (size * np.sqrt(1 - own)).astype(np.int64)
    edges = []
    for centre in ((down * size).astype(np.int64), (across * size).astype(np.int64)):
        low = centre - side // 2
        edges += [low.clip(0, size), (low + side).clip(0, size)]
    boxes: Rows = np.stack(edges, axis=1)
    return boxes


def mixed(pictures: Tensor, mix: Mix) -> Tensor:
    """``(B, 3, S, S)`` with each picture mixed with its partner, channels-last; *mix* is on the same device."""
    places = torch.arange(pictures.shape[-1], device=pictures.device)
    top, bottom, left, right = mix.boxes[:, :, None].unbind(1)
    rows, columns = (places >= top) & (places < bottom), (places >= left) & (places < right)
    own = torch.where(rows[:, None, :, None] & columns[:, None, None, :], 0.0, mix.blend[:, None, None, None])
    # lerp is exact at 0 and at 1: pasted and untouched pixels keep every bit.
    return torch.lerp(pictures[mix.partners], pictures, own).contiguous(memory_format=torch.channels_last)
