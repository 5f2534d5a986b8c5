"""What a search searches: flags and their values, the metric, the command of a trial. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tuning.cli.coerce import as_key
from tuning.errors import UserError

ARGS = ("${args}", "${args_no_boolean_flags}")
DEFAULT_COMMAND = ("${env}", "accelerate", "launch", "${program}", "${args}")


@dataclass(frozen=True)
class Choice:
    """One of some values; of a single one, a fixed flag."""

    values: tuple[Any, ...]

    @property
    def edges(self) -> tuple[Any, ...]:
        """All values."""
        return self.values

    def __str__(self) -> str:
        return " | ".join(map(str, self.values))


@dataclass(frozen=True)
class Range:
    """Numbers from *low* to *high*, both included; whole numbers when both are.

    Attributes:
        log: uniform in the logarithm.
        step: between neighbouring values, counted from *low*; None = any number.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def edges(self) -> tuple[Any, ...]:
        """The lowest and the highest value."""
        return (self.low, self.high)

    def __str__(self) -> str:
        step = f", in steps of {self.step:g}" if self.step else ""
        return f"{self.low:g} to {self.high:g}{', log' if self.log else ''}{step}"


Parameter = Choice | Range


@dataclass(frozen=True)
class Stopper:
    """When a trial that is behind the others ends early; counted in evaluations.

    Attributes:
        kind: ``hyperband`` or ``median``.
        first: number of the evaluation at which a trial can be stopped first.
        eta: hyperband looks again at every *eta* times as many, and lets one of *eta* trials pass.
    """

    kind: str
    first: int
    eta: int = 3


@dataclass(frozen=True)
class Space:
    """What is searched, and how.

    Attributes:
        where: the file, for messages.
        metric: as in ``metrics.jsonl``, such as ``eval/balanced_accuracy``.
        parameters: ``{flag: its values}``.
        command: words of a trial's command with W&B's macros.
        run_cap: trials after which the search ends, if the file says so.
    """

    where: str
    method: str
    metric: str
    parameters: Mapping[str, Parameter]
    command: tuple[str, ...] = DEFAULT_COMMAND
    stopper: Stopper | None = None
    run_cap: int | None = None

    @property
    def best_by(self) -> str:
        """The metric by the name that ``--best-by`` takes."""
        return self.metric.rpartition("/")[2]

    @property
    def fixed(self) -> dict[str, Any]:
        """Flags with one value."""
        return {name: p.edges[0] for name, p in self.parameters.items() if _is_fixed(p)}

    @property
    def searched(self) -> dict[str, Parameter]:
        """Flags with several."""
        return {name: p for name, p in self.parameters.items() if not _is_fixed(p)}

    def described(self) -> dict[str, str]:
        """What must stay as it is for a search to go on."""
        values = {name: str(parameter) for name, parameter in self.parameters.items()}
        return {"method": self.method, "metric": self.metric, "early_terminate": str(self.stopper), **values}

    def without(self, names: Iterable[str]) -> Space:
        """The space when some flags are given otherwise.

        Raises:
            UserError: nothing is left to search.
        """
        left = {name: p for name, p in self.parameters.items() if name not in {*names}}
        space = dataclasses.replace(self, parameters=left)
        if not space.searched:
            raise UserError(f"{self.where}: nothing is left to search; all of its parameters are typed or fixed.")
        return space


def _is_fixed(parameter: Parameter) -> bool:
    return isinstance(parameter, Choice) and len(parameter.values) == 1


def typed_names(argv: Iterable[str]) -> set[str]:
    """The flags on a command line, ``--no-`` and the values left out."""
    words = (word.partition("=")[0] for word in argv if word.startswith("--"))
    return {as_key(word[2:]).removeprefix("no_") for word in words}
