"""Exact evaluation on any number of processes: every image counts once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tuning.agreement import average_statistics
from tuning.checkpoint import ema_statistics
from tuning.data.loader import Micro
from tuning.entering import Entered, HeadOnly
from tuning.errors import UserError
from tuning.gathering import gathered
from tuning.losses import cross_entropy
from tuning.metrics import classification_metrics, rank_classes
from tuning.out_of_memory import InParts

TEMPERATURES = tuple(10 ** (tenth / 10) for tenth in range(-15, 31))  # a loss changes little between two


def judges(
    entered: Entered, judged: nn.Module, ema: nn.Module | None
) -> Iterator[tuple[str, nn.Module, Iterable[Tensor]]]:
    """Whose metrics are taken: name, what to evaluate, and the running statistics to average over processes first.

    Args:
        judged: the raw model, or its head on cached features.
        ema: the model with averaged weights, where there is one.
    """
    yield "eval", judged, entered.statistics.values()
    if ema is not None:
        averaged = HeadOnly(ema) if entered.stage.cache_features else ema
        yield "eval_ema", averaged, ema_statistics(ema, entered).values()


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
        model: the raw model (or a head on cached features).
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
