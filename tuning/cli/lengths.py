"""How long the stages of a command are and what they train, taken out of it and put in anew. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuning.cli.checks import flat
from tuning.cli.command_line import MINUTES_PRESET, Command, with_flags

CHOSEN = ("freeze_epochs", "epochs", "limit_train", "image_size", "augment", "flip")
AUGMENTATION = ("augment", "flip")
PART = {"open", "cache_features", "lr"}


def augments_by_length(command: Command) -> bool:
    """Whether the epochs decide about augmentation: the flags are those of `MINUTES_PRESET`, and none was typed."""
    return is_unsaid(command, *AUGMENTATION)


def is_unsaid(command: Command, *names: str) -> bool:
    """Whether the time may settle these flags: their values are those of `MINUTES_PRESET`, and none was typed."""
    return Path(command.where).stem == MINUTES_PRESET and command.typed.isdisjoint(names)


@dataclass(frozen=True)
class Lengths:
    """Epochs and images of a run, and what else the time decides.

    Attributes:
        flags: values of the flags in `CHOSEN`.
        listed: epochs of every stage of a list; empty without one.
        part: keys of the one stage that trains a part of the depth; empty = what the flags say.
    """

    flags: Mapping[str, Any]
    listed: tuple[int, ...] = ()
    part: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, command: Command, epochs: Sequence[int], **others: Any) -> Lengths:
        """Those of *command* with other *epochs* of its stages, and *others* of its flags."""
        values = {name: value for name, value in flat(command.flags).items() if name in CHOSEN} | others
        if command.listed is not None:
            return cls(values, tuple(epochs))
        frozen = epochs[0] if values["freeze_epochs"] else 0
        return cls(values | {"freeze_epochs": frozen, "epochs": sum(epochs) - frozen})


def lengths_in(config: Mapping[str, Any], command: Command) -> Lengths:
    """Those of a run, from its ``config.yaml``; where it has none that *command* could take, those of *command*.

    A size or an augmentation that *command* says itself stays, for the run to refuse to go on with another.
    """
    own = Lengths.of(command, [stage.epochs for stage in command.stages])
    said = set[str]() if augments_by_length(command) else {*AUGMENTATION}
    said |= {"image_size"} if command.flags.model.image_size is not None else set()
    values = {name: value if name in said else config.get(name, value) for name, value in own.flags.items()}
    stages = list[dict[str, Any]](config.get("stages") or [])
    if command.listed is None and len(stages) == 1 and {"open", "epochs"} <= set(stages[0]) <= {"epochs", *PART}:
        return Lengths(values, (), {key: stages[0][key] for key in stages[0] if key in PART - command.typed})
    if len(stages) != len(own.listed):  # of another run, which will be refused
        return own
    return Lengths(values, tuple(stage.get("epochs", values["epochs"]) for stage in stages))


def with_lengths(command: Command, lengths: Lengths) -> Command:
    """*command* as if it had been typed with these *lengths*."""
    listed = command.listed
    if lengths.part:
        listed = [{**lengths.part, "epochs": lengths.flags["epochs"]}]
    elif listed is not None:
        listed = [{**stage, "epochs": epochs} for stage, epochs in zip(listed, lengths.listed, strict=True)]
    return with_flags(command, lengths.flags, listed, "--max-minutes")
