"""An export against the model it was made from, on real pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from tuning.data.pictures import Pictures
from tuning.data.sampling import Item
from tuning.data.transforms import Crop, Normalise
from tuning.errors import UserError
from tuning.exporting.formats import Network, inputs_for
from tuning.exporting.preprocessing import prepare
from tuning.models.build import ModelInfo

BATCHES = (1, 3, 32)  # images of the first batches; the last one stands for all further ones


@dataclass(frozen=True)
class Comparison:
    """How far an export is from the original, both fed the same pixels, and how far with pictures read by Pillow.

    Attributes:
        images: pictures that were compared; unreadable ones are left out.
        largest_logit_difference: over all pictures and classes; NaN where one of the two isn't finite.
        original_top1, export_top1: share of the pictures whose label is the most probable class.
        same_class: share of the pictures for which both name the same class.
        pillow_largest_logit_difference, pillow_same_class, pillow_top1: the export fed by ``preprocessing.py`` (Pillow)
            against the original on pictures read as in training and evaluation.
        pillow_images: pictures that Pillow could read, too.
    """

    images: int
    largest_logit_difference: float
    original_top1: float
    export_top1: float
    same_class: float
    pillow_images: int
    pillow_largest_logit_difference: float
    pillow_top1: float
    pillow_same_class: float

    def within(self, tolerance: float) -> bool:
        """Whether the logits differ by at most *tolerance*; never where one isn't finite."""
        return self.largest_logit_difference <= tolerance


def compare(
    model: nn.Module,
    export: Network,
    rows: Dataset,
    labels: Tensor,
    info: ModelInfo,
    uint8: bool,
    settings: dict[str, Any],
) -> Comparison:
    """Run both on every picture of *rows*, in batches of several sizes.

    Args:
        model: the original, raw, on the CPU, in evaluation mode.
        rows: encoded pictures, as `open_data` gives them.
        labels: of all of them as outputs of the model, ``(N,)``.
        settings: content of ``preprocessing.json``.

    Raises:
        UserError: not one picture could be read.
    """
    original, exported, by_pillow, kept, seen = _outputs(model, export, rows, info, uint8, settings)
    truth = labels[seen]
    return Comparison(
        len(truth),
        _largest_difference(original, exported),
        _share(original.argmax(1) == truth),
        _share(exported.argmax(1) == truth),
        _share(original.argmax(1) == exported.argmax(1)),
        len(by_pillow),
        _largest_difference(original[kept], by_pillow),
        _share(by_pillow.argmax(1) == truth[kept]),
        _share(by_pillow.argmax(1) == original[kept].argmax(1)),
    )


def _outputs(
    model: nn.Module, export: Network, rows: Dataset, info: ModelInfo, uint8: bool, settings: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits ``(N, K)`` of the original and of the export, and ``(P, K)`` of the export on pictures read by Pillow.

    Then which of the N those P are, ``(N,)`` bool, and the rows of the N, ``(N,)``.
    """
    wanted, got, seen, pillow, read = [], [], [], [], []
    with torch.inference_mode():
        for images, numbers, pictures in _batches(rows, info):
            wanted.append(model(Normalise(info.mean, info.std)(images)).float())
            got.append(export(inputs_for(images, info, uint8)).clone())
            seen.append(numbers)
            for picture in pictures:
                inputs = _prepared(picture, settings)
                read.append(inputs is not None)
                if inputs is not None:
                    pillow.append(export(inputs).clone())
    if not seen:
        raise UserError(f"none of the {len(rows)} pictures that the export would be compared on could be read.")
    exported = torch.cat(got)
    by_pillow = torch.cat(pillow) if pillow else exported[:0]
    return torch.cat(wanted), exported, by_pillow, torch.tensor(read), torch.cat(seen)


def _batches(rows: Dataset, info: ModelInfo) -> Iterator[tuple[Tensor, Tensor, list[Any]]]:
    """(uint8 images as evaluation sees them, their rows, the encoded pictures) of the readable rows."""
    crop = Crop(info.input_size, info.interpolation, info.crop_pct)
    pictures = Pictures(rows, crop, "none", 0, replace_unreadable=False)
    start, sizes = 0, iter(BATCHES)
    while start < len(rows):
        stop = min(len(rows), start + next(sizes, BATCHES[-1]))
        batch = pictures.__getitems__([Item(0, row, 1.0) for row in range(start, stop)])
        kept = batch.weights > 0
        numbers = batch.index[kept]
        if len(numbers):
            yield batch.images[kept], numbers, [rows[row]["image"] for row in numbers.tolist()]
        start = stop


def _prepared(picture: dict[str, Any], settings: dict[str, Any]) -> Tensor | None:
    source = io.BytesIO(picture["bytes"]) if picture["bytes"] is not None else picture["path"]
    try:
        return torch.from_numpy(prepare(source, settings))
    except Exception:  # Pillow raises nearly every type; what only the training decoder reads is counted
        return None


def _largest_difference(first: Tensor, second: Tensor) -> float:
    if not first.numel():
        return 0.0
    difference = (first - second).abs().max().item()
    return difference if math.isfinite(difference) else math.nan


def _share(right: Tensor) -> float:
    return right.float().mean().item() if len(right) else 0.0
