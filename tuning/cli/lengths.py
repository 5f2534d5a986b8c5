"""How long the stages of a command are, taken out of it and put in anew. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tuning.cli.command_line import Command, dump, resolve_stages
from tuning.cli.optimizer_defaults import resolved


@dataclass(frozen=True)
class Lengths:
    """Epochs and images of a run.

    Attributes:
        freeze_epochs, epochs, limit_train: the flags.
        listed: epochs of every stage of a list; empty without one.
    """

    freeze_epochs: int
    epochs: int
    listed: tuple[int, ...]
    limit_train: int | None

    @classmethod
    def of(cls, command: Command, epochs: Sequence[int], limit_train: int | None) -> Lengths:
        """Those of *command* with other *epochs* of its stages."""
        staging = command.flags.staging
        if command.listed is not None:
            return cls(staging.freeze_epochs, staging.epochs, tuple(epochs), limit_train)
        frozen = epochs[0] if staging.freeze_epochs else 0
        return cls(frozen, sum(epochs) - frozen, (), limit_train)


def lengths_in(config: Mapping[str, Any], command: Command) -> Lengths:
    """Those of a run, from its ``config.yaml``; where it has none that *command* could take, those of *command*."""
    own = Lengths.of(command, [stage.epochs for stage in command.stages], command.flags.data.limit_train)
    epochs = config.get("epochs", own.epochs)
    listed = tuple(stage.get("epochs", epochs) for stage in config.get("stages") or ())
    if len(listed) != len(own.listed):  # of another run, which will be refused
        return own
    return Lengths(config.get("freeze_epochs", own.freeze_epochs), epochs, listed, config.get("limit_train"))


def with_lengths(command: Command, lengths: Lengths) -> Command:
    """*command* as if it had been typed with these *lengths*."""
    flags = command.asked
    staging = dataclasses.replace(flags.staging, freeze_epochs=lengths.freeze_epochs, epochs=lengths.epochs)
    data = dataclasses.replace(flags.data, limit_train=lengths.limit_train)
    flags = dataclasses.replace(flags, staging=staging, data=data)
    listed = command.listed
    if listed is not None:
        listed = [{**stage, "epochs": epochs} for stage, epochs in zip(listed, lengths.listed, strict=True)]
    stages = resolve_stages(flags, listed, command.where)
    return dataclasses.replace(
        command, flags=resolved(flags), stages=stages, config=dump(flags, listed), asked=flags, listed=listed
    )
