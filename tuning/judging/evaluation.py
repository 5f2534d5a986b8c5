"""Exact evaluation on any number of processes: every image counts once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tuning.averaging.norm_statistics import NormStatistics
from tuning.data.loader import Micro
from tuning.entering import Entered
from tuning.errors import UserError
from tuning.judging.gathering import gathered
from tuning.judging.metrics import classification_metrics, rank_classes
from tuning.losses import cross_entropy
from tuning.open_part import Part
from tuning.safety.agreement import average_statistics
from tuning.safety.out_of_memory import InParts

# A loss changes little between two. Unlike `calibration.fit_temperature`, this needs no logits of all images at once.
TEMPERATURES = tuple(10 ** (tenth / 10) for tenth in range(-15, 31))


class Judged(NamedTuple):
    """Weights to evaluate.

    Attributes:
        whose: their name in the curves: ``eval``, ``eval_ema`` or ``eval_swa``.
        model: the raw model that has them.
        part: what to evaluate: `model`, or its open part where the features are cached.
    """

    whose: str
    model: nn.Module
    part: nn.Module


def judges(
    accelerator: Accelerator,
    entered: Entered,
    part: nn.Module,
    averages: Mapping[str, nn.Module],
    anew: NormStatistics,
    image_size: int,
) -> Iterator[Judged]:
    """The trained weights and their averages, one after the other, the same on every process while it is looked at.

    Running statistics that training moves are averaged over processes; where that was asked for, and always for SWA,
    they are taken anew until the next one is asked for. Training goes on with its own.

    Args:
        part: the raw model, or its open part on cached features.
        averages: models with averaged weights by name.
        image_size: that it is evaluated at, in pixels.
    """
    moved = list(entered.statistics)
    for name, model in {"": entered.model, **averages}.items():
        buffers = dict(model.named_buffers())
        average_statistics(accelerator, [buffers[statistic] for statistic in moved])
        of_average = part.of(model) if isinstance(part, Part) else model
        judged = Judged(f"eval_{name}", model, of_average) if name else Judged("eval", model, part)
        with anew.estimated(model, moved if anew.wanted or name == "swa" else (), image_size):
            yield judged


def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    feed: Iterable[Micro],
    images: int,
    classes: int,
    statistics: Iterable[Tensor] = (),
) -> dict[str, float]:
    """Metrics over all *images* images, the same numbers on every process; leaves the model in evaluation mode.

    The loss is plain cross-entropy, so that runs with different smoothing compare. Pictures that can't be read are
    left out; ``images`` in the result is the number that counted.

    Args:
        model: the raw model (or its open part on cached features).
        feed: this process's part, as dealt out by `EvalOrder`: equally long on every process, filler at weight 0.
        images: images of the whole evaluation set.
        statistics: running statistics of *model* that training has moved apart; averaged over processes first.

    Raises:
        UserError: not one picture could be read.
    """
    average_statistics(accelerator, statistics)
    loss = cross_entropy()

    def taken(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return rank_classes(logits), labels, loss(logits, labels)

    ranked, labels, losses = every_image(accelerator, model, feed, images, taken)
    return {**classification_metrics(ranked, labels, losses, classes), "images": len(labels)}


def evaluate_calibrated(
    accelerator: Accelerator,
    model: nn.Module,
    feed: Iterable[Micro],
    images: int,
    classes: int,
    class_weights: Tensor | None,
    statistics: Iterable[Tensor] = (),
) -> tuple[dict[str, float], Tensor]:
    """The metrics of `evaluate`, and the loss of every image at the best temperature for all (Guo et al. 2017).

    That is what was learned, without how boldly it is said: at the best temperature a model that tells nothing apart
    has a loss of ln(classes), however large or small its logits are.

    Args: as for `evaluate`.

    Returns:
        the metrics; the losses ``(N,)`` float64 on the CPU in the order of the dataset. The same on every process.
    """
    average_statistics(accelerator, statistics)
    plain, loss = cross_entropy(), cross_entropy(class_weights=class_weights)

    def taken(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        tempered = torch.stack([loss(logits / temperature, labels) for temperature in TEMPERATURES], dim=1)
        return rank_classes(logits), labels, plain(logits, labels), tempered

    ranked, labels, losses, tempered = every_image(accelerator, model, feed, images, taken)
    calibrated = tempered[:, tempered.double().mean(dim=0).argmin()].double()
    return {**classification_metrics(ranked, labels, losses, classes), "images": len(labels)}, calibrated


def every_image(
    accelerator: Accelerator,
    model: nn.Module,
    feed: Iterable[Micro],
    images: int,
    taken: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """What *taken* makes of ``(logits (B, K) float32, labels (B,))``, one row an image that could be read.

    Args: otherwise as for `evaluate`.

    Returns:
        one tensor ``(N, ...)`` for each of *taken*, on the CPU, in the order of the dataset, on every process.

    Raises:
        UserError: not one picture could be read.
    """
    model.eval()
    forward, parts = InParts(model), list[tuple[Tensor, ...]]()
    with torch.inference_mode(), accelerator.autocast():
        for micro in feed:
            logits = forward(micro.inputs).float()
            index = micro.rows.to(logits.device, non_blocking=True)
            parts.append((*taken(logits, micro.labels), micro.weights, index))
    (*columns, seen), dealt = gathered(accelerator, parts)
    assert dealt == images, f"{dealt} of {images} images were evaluated"
    if not len(seen):
        raise UserError(f"none of the {images} evaluation pictures could be read; check --data.")
    return tuple(columns)
