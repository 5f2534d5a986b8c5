"""Random operations on a cropped picture, beyond crop and flip: torchvision's, at two strengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor
from torchvision.transforms import v2

from tuning.data.transforms import CROP_AREA
from tuning.flags import AugmentName
from tuning.stages import Stage

MAGNITUDE = 9  # of 0 to 30: rotation by 9 degrees, brightness and the like changed by 27 %
GEOMETRIC = ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")


@dataclass(frozen=True)
class Operations:
    """One random operation a picture.

    Attributes:
        strength: ``medium`` = RandAugment (Cubuk et al. 2019, arXiv:1909.13719), at a fixed magnitude; ``strong`` =
            TrivialAugment Wide (Müller & Hutter 2021, arXiv:2103.10158), of any magnitude in a wider range.
        color: also those that change pixel values (brightness, colour, contrast, sharpness, posterise, solarise, auto
            contrast, equalise); else those that move pixels alone.
        fill: of what is moved into the picture, red, green and blue in 0 to 255.
    """

    strength: AugmentName
    color: bool
    fill: tuple[float, ...]

    def __call__(self, picture: Tensor) -> Tensor:
        """``(3, S, S)`` uint8 to the same; drawn from torch's generator of the CPU."""
        done: Tensor = _transform(self)(picture)
        return done


@lru_cache(maxsize=8)
def _transform(operations: Operations) -> v2.Transform:
    how = {"interpolation": v2.InterpolationMode.BILINEAR, "fill": list(operations.fill)}
    made = (
        v2.RandAugment(num_ops=1, magnitude=MAGNITUDE, **how)
        if operations.strength == "medium"
        else v2.TrivialAugmentWide(**how)
    )
    if not operations.color:  # torchvision has no argument for it
        made._AUGMENTATION_SPACE = {name: made._AUGMENTATION_SPACE[name] for name in GEOMETRIC}
    return made


def stage_operations(stage: Stage, mean: tuple[float, ...]) -> Operations | None:
    """What the stage does to its training pictures after the crop; None = nothing.

    Args:
        mean: of the model's input, in [0, 1]: what is moved in becomes 0.
    """
    if stage.augment not in ("medium", "strong"):
        return None
    return Operations(stage.augment, stage.color != "keep", tuple(round(255 * value) for value in mean))


def augmentation_sentences(stages: Sequence[Stage]) -> list[str]:
    """One sentence for each way in which stages augment; none on cached features."""
    told: dict[str, list[str]] = {}
    for stage in stages:
        told.setdefault(_sentence(stage), []).append(stage.name)
    return [f"{sentence} ({', '.join(names)})" for sentence, names in told.items()]


def _sentence(stage: Stage) -> str:
    if stage.cache_features and stage.feature_views == 1:
        return "none: features are computed once"
    parts = ["the evaluation crop"]
    if stage.augment != "none":
        low, high = CROP_AREA[stage.augment]
        parts = [f"crops of {low:.0%} to {high:.0%} of the area".replace("%", " %")]
    if stage.augment in ("medium", "strong"):
        kept = ", moving pixels only (grey pictures, or --color keep)" if stage.color == "keep" else ""
        parts.append(f"{'RandAugment' if stage.augment == 'medium' else 'TrivialAugment'}{kept}")
    parts += [
        f"{key} {value:g}" for key, value in (("mixup", stage.mixup), ("cutmix", stage.cutmix)) if value and stage.mixes
    ]
    parts += [f"random erasing {stage.erases:g}"] if stage.erases else []
    parts += [f"{stage.feature_views} views of every picture, drawn once"] if stage.cache_features else []
    return f"{stage.augment}: {', '.join(parts)}"
