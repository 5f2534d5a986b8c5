"""What fits into a number of seconds: how large pictures, how many layers, epochs and images. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

MOST_EPOCHS = 40  # of stages that are made longer than they were
ENOUGH_EPOCHS = 6  # only what is left then goes into larger pictures
FEW_EPOCHS = 3  # of all layers; if not even these fit, half of the layers stay closed
SMALLEST = 4 / 7  # of the side that the weights were trained at: 128 pixels of 224


@dataclass(frozen=True)
class Costs:
    """What a run takes, in seconds, as timed at its start.

    Attributes:
        trained: by stage, of an image in an optimizer step; 0 for the head on cached features.
        passes: by stage, forward passes over the training images before its first step.
        looked: of an image in a forward pass, with its loading.
        fitted: of a training image in the fit of the head, after its features; 0 without.
        judged: evaluation images times evaluations of each (raw and averaged weights).
        before: of what comes before the first step whatever the lengths.
        after: of what comes after the last evaluation.
        saved: of a checkpoint, one an epoch.
        judging: by stage, of an evaluation image that costs less than `looked`, on cached features; empty = none does.
        sets: of weights that an evaluation judges, raw and averaged.
    """

    trained: tuple[float, ...]
    passes: tuple[int, ...]
    looked: float
    fitted: float
    judged: int
    before: float
    after: float
    saved: float = 0.0
    judging: tuple[float, ...] = ()
    sets: int = 1

    def at_area(self, times: float) -> Costs:
        """With pictures of *times* the pixels, to whose number the work of a network is proportional."""
        trained, judging = (tuple(each * times for each in some) for some in (self.trained, self.judging))
        return replace(self, trained=trained, looked=self.looked * times, judging=judging)

    def seconds(self, epochs: Sequence[int], images: float) -> float:
        """Of the whole run.

        Args:
            epochs: of every stage.
            images: training images.
        """
        judging = self.judging or tuple(self.looked for _ in self.trained)
        once = self.judged / self.sets * self.looked  # every evaluation image through the whole model
        total = self.before + once + self.after  # the last look at model/
        if self.fitted:
            look = judging[0] if self.passes[0] == 1 else self.looked  # several views are augmented; the fit sees none
            total += images * (look + self.fitted) + self.judged * judging[0]
        for each, judge, passes, length in zip(self.trained, judging, self.passes, epochs, strict=True):
            total += passes * images * self.looked + (passes > 0) * once
            total += length * (images * each + self.judged * judge + self.saved) if each else 0.0
        return total


def epochs_that_fit(
    outline: Sequence[int], costs: Costs, images: int, seconds: float, most: int = MOST_EPOCHS
) -> list[int]:
    """Epochs of every stage, in the proportions of *outline*: as many as fit, one each at least.

    The head on cached features keeps its own. What is made longer than the outline has *most* epochs at most.

    Args:
        outline: epochs of every stage as described.
        images: training images.
        seconds: that the whole run may take.
    """
    epochs = [1 if each else length for each, length in zip(costs.trained, outline, strict=True)]
    timed = [number for number, each in enumerate(costs.trained) if each]
    most = max(most, sum(outline[number] for number in timed))
    while timed and sum(epochs[number] for number in timed) < most:
        behind = min(timed, key=lambda number: ((epochs[number] + 1) / outline[number], -number))
        epochs[behind] += 1
        if costs.seconds(epochs, images) > seconds:
            epochs[behind] -= 1
            break
    return epochs


def images_that_fit(epochs: Sequence[int], costs: Costs, images: int, seconds: float) -> int:
    """Of *images* training images, as many as fit with these *epochs*; 0 if none."""
    without = costs.seconds(epochs, 0)
    share = (seconds - without) / (costs.seconds(epochs, images) - without)
    return max(0, min(images, int(share * images)))


def smaller_sizes(own: int, stride: int) -> tuple[int, ...]:
    """Sides in pixels, ascending: multiples of *stride* from `SMALLEST` of the model's *own* side up to that itself."""
    return (*range(stride * math.ceil(SMALLEST * own / stride - 1e-9), own, stride), own)


def size_that_fits(sizes: Sequence[int], costs: Costs, images: int, seconds: float) -> int:
    """The largest of *sizes* at which `ENOUGH_EPOCHS` fit, else the smallest.

    Args:
        sizes: sides in pixels, ascending.
        costs: of one stage, at the smallest size.
    """
    for size in reversed(sizes[1:]):
        if costs.at_area((size / sizes[0]) ** 2).seconds([ENOUGH_EPOCHS], images) <= seconds:
            return size
    return sizes[0]
