"""What follows from the data and the model where no flag says it (docs/defaults.md). Imports no torch."""

from __future__ import annotations

import math
from typing import Any

from tuning.cli.command_line import Command, with_flags

FEWEST_STEPS = 10  # optimizer steps an epoch of few images
SMALLEST = 8  # images in one
MOST_TO_FIT = 50_000  # images; the fit grows with them, and head-only epochs see enough
ABOUT_ITS_STAGE = {"freeze_epochs", "freeze_lr", "cache_features", "feature_views", "frozen_forward"}


def derived(command: Command, images: int, processes: int, fits: bool) -> tuple[Command, tuple[str, ...]]:
    """*command* with what follows from the data and the model, as if it had been typed, and a sentence for each.

    Args:
        images: training images.
        fits: the model is pretrained and has a head that `models.head_fit` can fit.
    """
    chosen = dict[str, Any]()
    reasons = []
    if fits and images <= MOST_TO_FIT and _begins_by_default(command):
        chosen |= {"head_init": "fitted", "freeze_epochs": 0}
        reasons.append(
            "--head-init fitted --freeze-epochs 0: the head begins as a logistic regression on what the pretrained "
            "model makes of the images; epochs of the head alone would only approach it."
        )
    batch = command.flags.batch
    fitting = fitting_batch(images, processes * (1 if batch.micro_batch == "auto" else int(batch.micro_batch)))
    open_to_change = "batch_size" not in command.typed and (images < batch.batch_size or not command.where)
    if open_to_change and fitting < batch.batch_size:
        chosen["batch_size"], steps = fitting, math.ceil(images / fitting)
        reasons.append(f"--batch-size {fitting}: {steps} optimizer steps an epoch of {images} training images.")
    return with_flags(command, chosen, command.listed, "the data") if chosen else command, tuple(reasons)


def fitting_batch(images: int, unit: int) -> int:
    """The largest that leaves `FEWEST_STEPS` optimizer steps an epoch, `SMALLEST` images at least where there are any.

    *unit* times a power of two: what divides among the processes and their forward passes.
    """
    share = max(1, max(min(SMALLEST, images), images // FEWEST_STEPS) // unit)
    return int(unit * 2 ** (share.bit_length() - 1))


def _begins_by_default(command: Command) -> bool:
    """No file and no flag says that the head begins otherwise, and something is trained after it at a known rate.

    A search for the rate sees more from a head that is not converged (docs/lr-finder.md).
    """
    fitted = "head_init" not in command.typed or command.flags.model.head_init == "fitted"
    by_default = not command.where and fitted and command.typed.isdisjoint(ABOUT_ITS_STAGE)
    return by_default and command.flags.staging.epochs > 0 and command.flags.optimisation.lr != "auto"
