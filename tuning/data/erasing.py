"""Random erasing (Zhong et al. 2017, arXiv:1708.04896) as timm has it, once per micro-batch.

Drawn on the host as a function of counters, carried out on the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tuning.data.sampling import Rows, uniform

# timm's defaults (timm.data.RandomErasing, one box, mode const).
AREA = (0.02, 1 / 3)  # of the picture's
ASPECT = (0.3, 1 / 0.3)  # height / width; its logarithm is uniform
ATTEMPTS = 10  # at a box that fits; else the picture stays whole
WHETHER, DOWN, ACROSS, ATTEMPT = 30, 31, 32, 40  # streams of `uniform`; two for each attempt


@dataclass(frozen=True)
class Erasing:
    """Draws the boxes of any micro-batch.

    Attributes:
        probability: that a picture gets a box.
        seed: of the run.
    """

    probability: float
    seed: int

    def boxes(self, epoch: int, index: Rows, size: tuple[int, int]) -> Rows:
        """Top, bottom, left and right of every box by (seed, epoch, index), ``(B, 4)``; all 0 = none.

        Args:
            index: `Item.draw` of the pictures, ``(B,)``.
            size: height and width of the pictures in pixels.
        """
        area, heights, widths = size[0] * size[1], np.zeros(len(index), np.int64), np.zeros(len(index), np.int64)
        waiting = uniform(self.seed, epoch, index, WHETHER) < self.probability
        for attempt in range(ATTEMPTS):
            if not waiting.any():
                break
            part, shape = (uniform(self.seed, epoch, index, ATTEMPT + 2 * attempt + which) for which in (0, 1))
            target = area * (AREA[0] + part * (AREA[1] - AREA[0]))
            aspect = np.exp(math.log(ASPECT[0]) + shape * math.log(ASPECT[1] / ASPECT[0]))
            height, width = (np.rint(np.sqrt(sides)).astype(np.int64) for sides in (target * aspect, target / aspect))
            fits = waiting & (height < size[0]) & (width < size[1])
            heights, widths = np.where(fits, height, heights), np.where(fits, width, widths)
            waiting &= ~fits
        top, left = (
            (uniform(self.seed, epoch, index, stream) * (side - taken + 1)).astype(np.int64) * (taken > 0)
            for stream, side, taken in ((DOWN, size[0], heights), (ACROSS, size[1], widths))
        )
        boxes: Rows = np.stack([top, top + heights, left, left + widths], axis=1)
        return boxes


def erased(pictures: Tensor, boxes: Tensor) -> Tensor:
    """Normalised ``(B, 3, H, W)`` with 0, the mean colour, in the *boxes* ``(B, 4)``, which are on the same device."""
    down, across = (torch.arange(side, device=pictures.device) for side in pictures.shape[-2:])
    top, bottom, left, right = boxes[:, :, None].unbind(1)
    rows, columns = (down >= top) & (down < bottom), (across >= left) & (across < right)
    return torch.where(rows[:, None, :, None] & columns[:, None, None, :], 0.0, pictures)
