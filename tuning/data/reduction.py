"""How small a decoded picture may be kept, so that whatever is cut out of it later is never enlarged for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from tuning.data.resizing import mode_of, resize
from tuning.data.transforms import ASPECT, at_shorter_side


@dataclass(frozen=True)
class Reduction:
    """Scales a picture once, before it is kept: whatever is cut out of it later is still made smaller.

    A picture is kept as it is where even the smallest of the crops would be enlarged anyway.

    Attributes:
        interpolation: ``bilinear`` or ``bicubic``, the model's own.
        shorter_side: to which the evaluation crop scales a picture, in pixels. A picture that is kept at this size
            has the pixels that it would have had without a cache.
        random: size in pixels of random crops and the smallest share of the area that they take, of every kind of them.
        image_size: side of the evaluation crop in pixels.
    """

    interpolation: str
    shorter_side: int
    random: tuple[tuple[int, float], ...]
    image_size: int

    def __call__(self, picture: Tensor) -> Tensor:
        """``(H, W, 3)`` uint8 to the same, smaller or itself."""
        height, width = self.kept_size(picture.shape[0], picture.shape[1])
        if (height, width) == picture.shape[:2]:
            return picture
        return resize(picture, height, width, mode_of(self.interpolation))

    def kept_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width at which such a picture is kept."""
        if min(height, width) <= self.shorter_side:
            return height, width
        kept = at_shorter_side(height, width, self.shorter_side)
        for size, share in self.random:
            scale = size / smallest_side(height, width, share)
            if scale >= 1:
                return height, width
            if scale * min(height, width) > self.shorter_side:
                least = math.ceil(scale * height - 1e-6), math.ceil(scale * width - 1e-6)
                kept = max(kept, least, key=math.prod)
        return kept

    @property
    def min_side(self) -> int:
        """What `images.decode` must keep of a picture that it decodes at a reduced scale: half a shorter side."""
        needed = [size / math.sqrt(share * ASPECT[0]) for size, share in self.random]
        return max(self.image_size, *(math.ceil(side / 2) for side in needed)) if needed else self.image_size


def smallest_side(height: int, width: int, share: float) -> float:
    """A lower bound of the sides of `random_box` in such a picture, in pixels.

    Args:
        share: of the area that a crop takes at least.
    """
    return min(math.sqrt(share * height * width * ASPECT[0]), height, width)
