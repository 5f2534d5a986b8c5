"""The usual suspects when a model can't learn one small batch: pure functions from what was seen to what it means."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from tuning.data.folders import shorten
from tuning.depth import head_names

NORMAL_MEAN = 2.3  # no picture normalised with ImageNet's values has a mean beyond -2.12 ... 2.64
NORMAL_STD = (0.05, 4.0)
SAME = 1e-6  # spread over the batch below which inputs are the same
QUARTER = 4
RECENT_SHARE = 0.1  # of the whole fall of the loss, in the last quarter: above it the loss still falls
HARDLY = 1e-3  # relative change of the loss
NAMES_SHOWN = 3


@dataclass(frozen=True)
class Suspect:
    """One thing that looks wrong.

    Attributes:
        kind: short name for scripts, such as ``contradictory-labels``.
        text: what was found, with its values, and the remedy.
        decisive: the batch can't be learned with it, or learning it would show nothing.
    """

    kind: str
    text: str
    decisive: bool = False


@dataclass(frozen=True)
class Picture:
    """One readable picture of the batch, as the model sees it.

    Attributes:
        row: of the training data in use.
        name: its path, or its row where it has none.
        label: index of its class.
        digest: of its normalised pixels; equal pictures have equal ones.
        mean, square: mean of its normalised pixels, and of their squares, of every channel.
        finite: the untrained model's outputs for it are finite.
    """

    row: int
    name: str
    label: int
    digest: str
    mean: tuple[float, ...]
    square: tuple[float, ...]
    finite: bool


def of_pictures(
    pictures: Sequence[Picture], unreadable: Sequence[str], outputs: int, target: float, chosen: bool = False
) -> list[Suspect]:
    """What can be seen in the batch before anything is trained.

    Args:
        unreadable: names and reasons of the pictures of the batch that can't be read.
        outputs: classes that the model tells apart.
        target: loss to be reached.
        chosen: a person chose the pictures, who may have wanted a single class.
    """
    found = _unreadable(unreadable, len(pictures))
    if pictures:
        found += _labels(pictures, outputs, chosen)
        found += _inputs(pictures)
        found += _contradictions(pictures, target)
        found += _outputs(pictures)
    return found


def _unreadable(names: Sequence[str], readable: int) -> list[Suspect]:
    if not names:
        return []
    total = len(names) + readable
    text = f"{len(names)} of the {total} pictures can't be read: {shorten(names, NAMES_SHOWN)}. Repair or remove them"
    text += "." if readable == 0 else "; the others of the batch take their place."
    return [Suspect("unreadable", text, decisive=readable == 0)]


def _labels(pictures: Sequence[Picture], outputs: int, chosen: bool) -> list[Suspect]:
    beyond = [p for p in pictures if not 0 <= p.label < outputs]
    if beyond:
        seen = shorten((f"{p.label} of {p.name}" for p in beyond), NAMES_SHOWN)
        text = f"{len(beyond)} of {len(pictures)} labels are outside 0 ... {outputs - 1}, the model's outputs: {seen}."
        return [Suspect("labels-out-of-range", f"{text} Check the label column and the class map.", decisive=True)]
    labels = {p.label for p in pictures}
    if len(labels) > 1 or len(pictures) == 1:
        return []
    text = f"all {len(pictures)} labels are {labels.pop()}: a constant answer would do. Check the labels."
    return [Suspect("labels-equal", text, decisive=not chosen)]


def _inputs(pictures: Sequence[Picture]) -> list[Suspect]:
    if len(pictures) > 1 and len({p.digest for p in pictures}) == 1:
        text = f"all {len(pictures)} pictures are the same to the model, pixel by pixel. Check how they are read."
        return [Suspect("inputs-equal", text)]
    mean, std = _moments(pictures)
    within = [_moments([picture])[1] for picture in pictures]
    if math.isfinite(mean) and abs(mean) <= NORMAL_MEAN and NORMAL_STD[0] <= std <= NORMAL_STD[1]:
        flat = sum(spread < SAME for spread in within)
        text = f"{flat} of {len(pictures)} pictures are one flat colour. Look at them."
        return [Suspect("flat-pictures", text)] if flat > len(pictures) / 2 else []
    text = f"the normalised pixels have mean {mean:.3g} and standard deviation {std:.3g}, far from 0 and 1: "
    text += "pixels that are not scaled to 0 ... 1, or mean and std of another unit in the model's configuration."
    return [Suspect("normalisation", text)]


def _moments(pictures: Sequence[Picture]) -> tuple[float, float]:
    """Mean over all pixels, and their standard deviation within a channel: channels of one value each don't vary."""
    means = [statistics.fmean(channel) for channel in zip(*(p.mean for p in pictures), strict=True)]
    squares = [statistics.fmean(channel) for channel in zip(*(p.square for p in pictures), strict=True)]
    variance = statistics.fmean(square - mean**2 for mean, square in zip(means, squares, strict=True))
    return statistics.fmean(means), math.sqrt(max(variance, 0.0))


def _contradictions(pictures: Sequence[Picture], target: float) -> list[Suspect]:
    """Equal pictures under different labels; the best possible loss is their labels' entropy."""
    groups: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        groups[picture.digest].append(picture)
    apart = [group for group in groups.values() if len({p.label for p in group}) > 1]
    if not apart:
        return []
    floor = sum(_entropy([p.label for p in group]) * len(group) for group in apart) / len(pictures)
    first = apart[0][0]
    other = next(p for p in apart[0] if p.label != first.label)
    text = (
        f"{sum(map(len, apart))} pictures have a twin with another label, such as {first.name} ({first.label}) and "
        f"{other.name} ({other.label}); the loss can't fall below {floor:.3f}. Correct the labels."
    )
    return [Suspect("contradictory-labels", text, decisive=floor > target)]


def _entropy(labels: Sequence[int]) -> float:
    shares = [count / len(labels) for count in Counter(labels).values()]
    return -sum(share * math.log(share) for share in shares)


def _outputs(pictures: Sequence[Picture]) -> list[Suspect]:
    bad = [p.name for p in pictures if not p.finite]
    if not bad:
        return []
    text = f"the model's outputs are not finite for {len(bad)} of {len(pictures)} pictures before any training: "
    return [Suspect("not-finite", f"{text}{shorten(bad, NAMES_SHOWN)}. Check --weights, and --precision.")]


def of_head(model: nn.Module) -> list[Suspect]:
    """A head that doesn't train."""
    parameters = dict(model.named_parameters())
    closed = sorted(name for name in head_names(model) if not parameters[name].requires_grad)
    if not closed:
        return []
    text = f"the head is closed ({shorten(closed, NAMES_SHOWN)}): it keeps the values it began with. Open it."
    return [Suspect("closed-head", text, decisive=True)]


def of_outputs(trainable: bool) -> list[Suspect]:
    """Outputs that depend on no open parameter (detached, or computed without gradients)."""
    if trainable:
        return []
    text = "the model's outputs depend on no open parameter: nothing can train. Look for detach() and no_grad()."
    return [Suspect("no-gradient", text, decisive=True)]


def of_gradients(largest: Mapping[str, float | None], layers: Mapping[str, str], steps: int) -> list[Suspect]:
    """Open parameters that no gradient has reached in *steps* steps.

    Zero counts from the third step on: behind a head or a residual branch that starts at zero, it is right at first.

    Args:
        largest: largest magnitude of the gradient of every open parameter; None = it never had one.
        layers: layer of each, such as ``layer07``.
    """
    missing = {name for name, size in largest.items() if size is None}
    zero = {name for name, size in largest.items() if size == 0} if steps >= 3 else set()
    return [
        *_silent("no-gradient", "have no gradient at all: the loss doesn't depend on them", missing, largest, layers),
        *_silent("zero-gradient", "have a gradient of exactly zero in every step", zero, largest, layers),
    ]


def _silent(kind: str, what: str, names: set[str], every: Iterable[str], layers: Mapping[str, str]) -> list[Suspect]:
    if not names:
        return []
    alive = {layers[name] for name in every if name not in names}
    dead = sorted({layers[name] for name in names} - alive)
    first = [next(name for name in every if name in names and layers[name] == layer) for layer in dead]
    if dead:
        shown = ", ".join(f"{layer} ({name})" for layer, name in zip(dead, first, strict=True))
        total = len({layers[name] for name in every})
        return [Suspect(kind, f"{len(dead)} of {total} open layers {what}: {shown}.", decisive=True)]
    return [Suspect(kind, f"{len(names)} open parameters {what}: {shorten(sorted(names), NAMES_SHOWN)}.")]


def of_first_loss(loss: float, classes: int) -> list[Suspect]:
    """A loss before the first update far from that of guessing, ln(classes)."""
    guess = math.log(classes)
    if not math.isfinite(loss) or guess / 2 <= loss <= 2 * guess + 2:
        return []
    text = f"the loss starts at {loss:.3g}, far from ln({classes}) = {guess:.3g}, that of guessing: "
    text += "outputs that are far too large at the start." if loss > guess else "a head that knows the answers already."
    return [Suspect("initial-loss", text)]


def of_losses(losses: Sequence[float], target: float, lr: float, stuck: bool) -> list[Suspect]:
    """A learning rate that is too large or too small, from the losses of a model that has not learned.

    Args:
        losses: one a pass over the batch.
        lr: of the head.
        stuck: it was given up because no loss or gradient was finite any more.
    """
    bad = next((n for n, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if bad is not None:
        if bad == 0:
            text = "the loss is not finite in the first pass, before the learning rate can be at fault: check "
            return [Suspect("not-finite", f"{text}--weights, --precision and the pictures.", decisive=True)]
        text = f"the loss is not finite from pass {bad + 1} on. Lower --lr (the head's is {lr:.3g})."
        return [Suspect("exploding", text, decisive=True)]
    if stuck:
        text = "the gradients are not finite, though the loss is. Check --precision and --weights; lower --lr"
        return [Suspect("not-finite", f"{text} (the head's is {lr:.3g}).", decisive=True)]
    if len(losses) < 2 * QUARTER or min(losses) < target:
        return []
    return _exploding(losses, lr) or _too_slow(losses, target, lr)


def _exploding(losses: Sequence[float], lr: float) -> list[Suspect]:
    first, last, worst = losses[0], _mean_of_quarter(losses, 3), max(losses)
    if worst <= 2 * first + 1 and last <= 1.1 * first:
        return []
    text = (
        f"the loss rises, from {first:.3g} to {worst:.3g} in pass {losses.index(worst) + 1}, and ends at {last:.3g}: "
    )
    return [Suspect("exploding", f"{text}the learning rate is too large. Lower --lr (the head's is {lr:.3g}).")]


def _too_slow(losses: Sequence[float], target: float, lr: float) -> list[Suspect]:
    early, third, last = (_mean_of_quarter(losses, number) for number in (0, 2, 3))
    if max(losses) - min(losses) < HARDLY * losses[0]:
        text = f"the loss hardly moves: {losses[0]:.6g} at first, {losses[-1]:.6g} after {len(losses)} passes. "
        return [Suspect("lr-too-small", f"{text}Raise --lr tenfold or more (the head's is {lr:.3g}).")]
    if third - last <= RECENT_SHARE * (early - last) or last <= 0:
        return []
    passes = math.log(last / target) / math.log(third / last) * len(losses) / QUARTER
    text = f"the loss falls, but too slowly: {losses[0]:.3g} to {losses[-1]:.3g} in {len(losses)} passes, and at this "
    text += f"pace {passes:,.0f} more to {target:g}. Raise --lr (the head's is {lr:.3g}), or --overfit-steps."
    return [Suspect("lr-too-small", text)]


def _mean_of_quarter(losses: Sequence[float], number: int) -> float:
    length = len(losses) // QUARTER
    part = losses[-length:] if number == 3 else losses[number * length : (number + 1) * length]
    return sum(part) / len(part)
