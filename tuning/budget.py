"""`--max-minutes`: as many epochs, as large pictures and as many layers as fit, from a few timed steps of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator

from tuning import sharding
from tuning.cli.command_line import Command
from tuning.cli.lengths import AUGMENTATION, Lengths, augments_by_length, is_unsaid, lengths_in, with_lengths
from tuning.data.sources import Data
from tuning.errors import UserError
from tuning.flags import RegularisationFlags
from tuning.image_sizes import stride
from tuning.minutes import (
    ENOUGH_EPOCHS,
    FEW_EPOCHS,
    MOST_EPOCHS,
    Costs,
    epochs_that_fit,
    images_that_fit,
    size_that_fits,
    smaller_sizes,
)
from tuning.models.build import check_image_size
from tuning.plan import StagePlan
from tuning.preparing import Setup, data_and_model, plan_stages
from tuning.run_costs import run_costs, with_stages
from tuning.safety import resuming

MARGIN = 0.05  # of the minutes, for what the timing did not see
PART = 0.5  # of the depth that is open where too few epochs of all layers fit
PART_LR = 8e-4  # of `MINUTES_PRESET` for that part on features (docs/minutes.md)
SAME_PICTURES = 10  # epochs on cached features at most: the pictures never change
FEATURES = 2e9  # bytes of them at most, on every process
LONG = 8  # epochs from which all layers are worth more than the upper ones, and augmentation more than nothing
UPPER = f" Only the upper {PART:.0%} of the depth is trained"
DON_T_FIT = "epochs of all layers don't fit."


def within_minutes(accelerator: Accelerator, setup: Setup) -> Setup:
    """The run with stages as long as ``--max-minutes`` allows; as it is without. All processes take part.

    The minutes count from the start of the process. A run that goes on keeps what it began with. What was chosen stands
    in ``config.yaml`` as if it had been typed, so `--config` repeats the run without timing anything.

    The model is trained for some steps and put back, bit for bit, or built anew for another image size.

    Raises:
        UserError: not even an optimizer step of every stage fits; or the model is to be split (FSDP2).
    """
    command, data, model, info, _ = setup
    if command.flags.run.max_minutes is None:
        return setup
    config, note = resuming.earlier_config(command.flags.run), "--max-minutes: the run keeps the epochs it began with."
    if config is None:
        lengths, note = _timed(accelerator, setup)
    else:
        lengths = lengths_in(config, command)
    asked, command = command.flags, with_lengths(command, lengths)
    if (command.flags.model, command.flags.data) != (asked.model, asked.data):
        data, model, info = data_and_model(accelerator, command.flags, command.stages)
    data = replace(data, notes=(*setup.data.notes, note))
    return Setup(command, data, model, info, plan_stages(accelerator, command, data, model, info))


def _timed(accelerator: Accelerator, setup: Setup) -> tuple[Lengths, str]:
    """What fits by rank 0's clock, and some sentences about it."""
    if sharding.asked():
        raise UserError("--max-minutes times a model that is whole on every device; under FSDP2 give --epochs.")
    command, data = setup.command, setup.data
    minutes = command.flags.run.max_minutes or 0.0
    seconds, images = 60 * minutes * (1 - MARGIN), len(data.train)
    shape, costs, why = _shape(accelerator, setup, seconds)
    outline = [each.stage.epochs for each in setup.stages]
    most = SAME_PICTURES if shape.part.get("cache_features") else MOST_EPOCHS
    epochs, kept = epochs_that_fit(outline, costs, images, seconds, most), images
    if costs.seconds(epochs, images) > seconds:
        kept = images_that_fit(epochs, costs, images, seconds)
        _refuse_few(kept, setup.stages, data, costs, epochs, minutes)
    others, more = ({}, "") if shape.part.get("cache_features") else _for_long(command, epochs)
    if kept < images:
        others["limit_train"] = kept
    lengths = Lengths.of(command, epochs, **others, image_size=shape.image_size)
    said = _said(command, setup.stages, epochs, (kept, images), costs)
    return replace(lengths, part=shape.part), said + why + more


def _for_long(command: Command, epochs: Sequence[int]) -> tuple[dict[str, Any], str]:
    """What `MINUTES_PRESET` doesn't augment, as it is for a few epochs, is augmented in many; flags, and the reason."""
    usual = RegularisationFlags()
    if sum(epochs) < LONG or not augments_by_length(command):
        return {}, ""
    reason = f" --augment {usual.augment} --flip {usual.flip}: pictures are seen {LONG} times or more."
    return {name: getattr(usual, name) for name in AUGMENTATION}, reason


class Shape(NamedTuple):
    """What a run trains, where the time decides: side of the pictures in pixels, and keys of its one stage.

    None, and no keys, is as the flags, or the model, have it.
    """

    image_size: int | None = None
    part: Mapping[str, Any] = {}


def _shape(accelerator: Accelerator, setup: Setup, seconds: float) -> tuple[Shape, Costs, str]:
    """How large pictures and how many layers the time is enough for; the costs of that, and the reason in words.

    Chosen only where pretrained weights are trained in one stage: without weights every layer has to learn, and a list
    of stages says itself what it trains.
    """
    only, flags, images = setup.stages[0].stage, setup.command.flags, len(setup.data.train)
    asked = Shape(flags.model.image_size)
    if len(setup.stages) > 1 or only.open != "all" or setup.command.listed or flags.model.weights == "none":
        return asked, run_costs(accelerator, setup), ""
    own, sizes = setup.info.input_size, _sizes(setup)
    smallest = asked if sizes[0] == own else Shape(sizes[0])
    costs = run_costs(accelerator, _shaped(accelerator, setup, smallest))
    part, sizes, why = _depth(accelerator, setup, smallest, sizes, costs, seconds)
    if part:
        smallest = smallest._replace(part=part)
        costs = with_stages(accelerator, _shaped(accelerator, setup, smallest), costs)
    size = size_that_fits(sizes, costs, images, seconds)
    shape = smallest if size == sizes[0] else Shape(size if size < own else asked.image_size, part)
    if shape != smallest:
        costs = run_costs(accelerator, _shaped(accelerator, setup, shape))
    if size < own:
        why = f" {size} pixels instead of {own}: at more, {ENOUGH_EPOCHS} epochs{why and ' of it'} don't fit." + why
    return shape, costs, why


def _depth(
    accelerator: Accelerator, setup: Setup, smallest: Shape, sizes: tuple[int, ...], costs: Costs, seconds: float
) -> tuple[dict[str, Any], tuple[int, ...], str]:
    """Keys of the stage if a part of the depth is trained, the sizes at which that is possible, the reason in words.

    Args:
        costs: of all layers, at the smallest size.
    """
    images = len(setup.data.train)
    if costs.seconds([LONG], images) <= seconds:
        return {}, sizes, ""
    part, stored = _on_features(accelerator, setup, smallest)
    if part:
        fitting = tuple(size for size in sizes if stored * (size / sizes[0]) ** 2 <= FEATURES)
        return part, fitting, f"{UPPER}, on what the rest makes of every image, computed once: {LONG} {DON_T_FIT}"
    if costs.seconds([FEW_EPOCHS], images) <= seconds:
        return {}, sizes, ""
    return {"open": PART}, sizes, f"{UPPER}: {FEW_EPOCHS} {DON_T_FIT}"


def _on_features(accelerator: Accelerator, setup: Setup, shape: Shape) -> tuple[dict[str, Any], int]:
    """Keys of a stage of the upper part on features, and their bytes.

    Without keys where pictures change from epoch to epoch, the model can't be taken apart or the features are too many.
    """
    only, flags = setup.stages[0].stage, setup.command.flags
    changes = flags.regularisation.flip != "none" or only.augment != "none" or only.mixes or only.erases or only.varies
    if changes or flags.batch.grad_checkpointing:
        return {}, 0
    rate = {"lr": PART_LR} if is_unsaid(setup.command, "lr") else {}
    part = {"open": PART, "cache_features": True, **rate}
    try:
        (planned,) = _shaped(accelerator, setup, shape._replace(part=part)).stages
    except UserError:  # its layers don't run one after the other
        return {}, 0
    return (part if planned.feature_bytes <= FEATURES else {}), planned.feature_bytes


def _sizes(setup: Setup) -> tuple[int, ...]:
    """Sides in pixels to choose from, ascending: one where a flag says it or the model takes no other."""
    model, info = setup.model, setup.info
    if setup.command.flags.model.image_size is not None or setup.stages[0].stage.varies:
        return (info.input_size,)
    sizes = smaller_sizes(info.input_size, stride(model))
    try:
        check_image_size(model, info.name, sizes[0])
    except UserError:
        return (info.input_size,)
    return sizes


def _shaped(accelerator: Accelerator, setup: Setup, shape: Shape) -> Setup:
    """The run in another shape, to be timed: the model itself is built anew only when all is chosen."""
    command, data, model, info, stages = setup
    lengths = Lengths.of(command, [each.stage.epochs for each in stages], image_size=shape.image_size)
    command = with_lengths(command, replace(lengths, part=shape.part))
    info = replace(info, input_size=shape.image_size or info.input_size)
    return Setup(command, data, model, info, plan_stages(accelerator, command, data, model, info))


def _said(
    command: Command, plan: Sequence[StagePlan], epochs: Sequence[int], images: tuple[int, int], costs: Costs
) -> str:
    """What was chosen, in a sentence or two; *images* that are trained on, of how many."""
    kept, every = images
    each = [f"{n} of {planned.stage.name}" for n, planned in zip(epochs, plan, strict=True)]
    passes = f"epochs {' + '.join(each)}" if len(each) > 1 else f"{epochs[0]} epoch{'s' * (epochs[0] > 1)}"
    some = f"{kept:,} of the {every:,} images, as more don't fit into one epoch" if kept < every else "all images"
    rates = ", ".join(f"{1 / seconds:.0f}" for seconds in costs.trained if seconds) or "none"
    total, minutes = costs.seconds(epochs, kept), command.flags.run.max_minutes
    note = f"--max-minutes {minutes:g}: {passes} over {some}, about {total:.0f} s; timed {rates} images/s."
    return note + (f" What no flag says is from {Path(command.where).name}." if command.where else "")


def _refuse_few(
    kept: int, plan: Sequence[StagePlan], data: Data, costs: Costs, epochs: Sequence[int], minutes: float
) -> None:
    """Fewer images than a batch or than classes make no run."""
    least = max(len(data.classes), *(planned.batch.batch_size for planned in plan))
    if kept < least:
        needed = costs.seconds(epochs, least) / (1 - MARGIN) / 60
        raise UserError(
            f"--max-minutes {minutes:g} is too short: one epoch a stage over {least:,} images, and the evaluations of "
            f"{len(data.eval):,}, take about {needed:.1f} minutes here, {costs.before / 60:.1f} of them until now. "
            "Raise it, or lower --limit-eval."
        )
