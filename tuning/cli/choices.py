"""What is chosen where the user leaves it to the tool, with the reasons. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from typing import Any

from tuning.flags import Flags

OF_THE_HEAD = {"head_init", "freeze_epochs", "freeze_lr", "cache_features", "unfreeze", "loss"}


def choose(flags: Flags, given: Set[str], listed: list[Any] | None) -> tuple[Flags, tuple[str, ...]]:
    """*flags* with what ``--max-minutes`` leaves open, and a sentence for every choice.

    Args:
        given: flags that the user typed, or that a preset names.
        listed: the stages of a preset: these say all there is to say.
    """
    if flags.run.max_minutes is None or listed is not None:
        return flags, ()
    if flags.model.weights == "none" or given & OF_THE_HEAD:
        return flags, ()
    model = dataclasses.replace(flags.model, head_init="fitted")
    staging = dataclasses.replace(flags.staging, freeze_epochs=0)
    return dataclasses.replace(flags, model=model, staging=staging), (
        "chosen: --head-init fitted --freeze-epochs 0; the head at its optimum costs one look at every image, "
        "head-only epochs cost one each.",
    )
