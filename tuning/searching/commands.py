"""The command of a trial: the words of the search space with its macros replaced, as W&B's agent replaces them."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuning.cli.command_line import Command, parse_command
from tuning.errors import UserError
from tuning.searching.spaces import ARGS, Space
from tuning.tracking.summary import contenders

RECIPE = "recipes/finetune.py"
LAUNCH = ("accelerate", "launch")


@dataclass(frozen=True)
class Trials:
    """What the commands of all trials have in common.

    Attributes:
        program: path of ``recipes/finetune.py``.
        config: YAML file with the flags of every trial, which the space does not search.
        launcher: words for ``accelerate launch``.
    """

    space: Space
    program: Path
    config: Path
    launcher: tuple[str, ...] = ()

    def words(self, values: Mapping[str, Any], *others: str) -> list[str]:
        """The command of a trial: launcher, program, *others*, and *values* as flags."""
        before = [word for word in self.space.command[: self._place] if word != "${env}"]
        if tuple(before[:2]) == LAUNCH:  # this environment's, whatever PATH says
            before[:2] = [sys.executable, "-m", "accelerate.commands.launch"]
        before = [sys.executable if word == "${interpreter}" else word for word in before]
        return [*before, *self.launcher, str(self.program), *self._flags(values, *others)]

    def parsed(self, values: Mapping[str, Any]) -> Command:
        """What `recipes/finetune.py` will make of it.

        Raises:
            UserError, SystemExit: the flags can't work; nothing was launched.
        """
        return parse_command(self._flags(values), RECIPE, "", self.program.parent / "presets")

    @property
    def _place(self) -> int:
        return self.space.command.index("${program}")

    def _flags(self, values: Mapping[str, Any], *others: str) -> list[str]:
        """The words after the program. Those with ``${envvar:...}`` are the agent's alone: here flags are typed."""
        listed = ["--config", str(self.config), *others]
        for word in self.space.command[self._place + 1 :]:
            if word in ARGS:
                listed += as_flags({**self.space.fixed, **values}, word)
            elif "${envvar:" not in word:
                listed.append(word)
        return listed


def as_flags(values: Mapping[str, Any], macro: str) -> list[str]:
    """*values* as words of a command line, as W&B's agent writes them for *macro*."""
    if macro == "${args}":
        return [f"--{name}={value}" for name, value in values.items()]
    return [
        f"--{name}" if value is True else f"--{name}={value}" for name, value in values.items() if value is not False
    ]


def launcher_words(text: str, space: Space) -> tuple[str, ...]:
    """``--launcher`` as words.

    Raises:
        UserError: unbalanced quotes, or a space that doesn't use ``accelerate launch``.
    """
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise UserError(f"--launcher {text}: {error}.") from None
    if words and tuple(word for word in space.command if word != "${env}")[:2] != LAUNCH:
        raise UserError(f"--launcher {text}: the command in {space.where} does not begin with accelerate launch.")
    return words


def check_edges(trials: Trials, config: str) -> None:
    """Parse the edges of the space, one flag at a time, so that a value that can't work is known before any is tried.

    Args:
        config: text of the YAML file to come.

    Raises:
        UserError, SystemExit: from the parser of `recipes/finetune.py`.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(config, encoding="utf-8")
        for values in edges(trials.space):
            try:
                dataclasses.replace(trials, config=path).parsed(values)
            except UserError as error:
                told = str(error).replace(str(path), "the preset")
                raise UserError(
                    f"{trials.space.where}: {' '.join(as_flags(values, ARGS[0]))} can't work: {told}"
                ) from None


def edges(space: Space) -> list[dict[str, Any]]:
    """All parameters at their first value, and each in turn at its others."""
    first = {name: parameter.edges[0] for name, parameter in space.searched.items()}
    return [first] + [{**first, n: v} for n, p in space.searched.items() for v in p.edges[1:]]


def whose(command: Command) -> str:
    """Whose evaluations show how a trial goes: ``eval_ema`` where an EMA may choose its weights, else ``eval``.

    Not those of SWA, which come at its end.
    """
    flags = command.flags
    chosen = contenders(flags.run.best_of, flags.regularisation.ema_decay, flags.averages.swa_epochs)
    return "eval_ema" if "eval_ema" in chosen else "eval"
