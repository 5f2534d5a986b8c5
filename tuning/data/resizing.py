"""Antialiased resizing of one uint8 picture, straight into the memory of its batch."""

from __future__ import annotations

import platform

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

INTERPOLATIONS = {"bilinear": v2.InterpolationMode.BILINEAR, "bicubic": v2.InterpolationMode.BICUBIC}
_KERNELS = {
    v2.InterpolationMode.BILINEAR: torch.ops.aten._upsample_bilinear2d_aa.out,
    v2.InterpolationMode.BICUBIC: torch.ops.aten._upsample_bicubic2d_aa.out,
}


def mode_of(interpolation: str) -> v2.InterpolationMode:
    """The model's own interpolation; bicubic for what is neither."""
    return INTERPOLATIONS.get(interpolation, v2.InterpolationMode.BICUBIC)


def resize(picture: Tensor, height: int, width: int, mode: v2.InterpolationMode, out: Tensor | None = None) -> Tensor:
    """``(H, W, 3)`` -> ``(height, width, 3)``, uint8, by torchvision's kernel in the order of Pillow.

    The kernel is called without torchvision's wrapping, which costs as much as half of it and can't write into *out*.
    It scales rows first and rounds in between. Pillow (13) scales columns first where they lose more than twice as many
    pixels; as it does, the two differ by 1 in few values, else in every fifth (72 and 55 dB).

    Args:
        picture: contiguous, or a part of such a picture.
        out: contiguous ``(height, width, 3)`` to write into.
    """
    if out is None:
        out = torch.empty((height, width, 3), dtype=torch.uint8)
    if picture.shape == out.shape:
        return out.copy_(picture)
    if not _in_uint8(mode):
        return out.copy_(F.resize(picture.permute(2, 0, 1), [height, width], mode, antialias=True).permute(1, 2, 0))
    before, across = picture.shape[:2]
    if across != width and before - height > 2 * max(0, across - width):
        picture = resize(picture, height, across, mode)
    source, target = (part.permute(2, 0, 1)[None] for part in (picture, out))  # in channels-last order, no copy
    _KERNELS[mode](source, [height, width], False, None, None, out=target)
    return out


def _in_uint8(mode: v2.InterpolationMode) -> bool:
    """Whether torchvision resizes in uint8 on this CPU; elsewhere it does so in float32."""
    has_kernel = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return mode == v2.InterpolationMode.BICUBIC or has_kernel or platform.machine() in ("aarch64", "arm64")
