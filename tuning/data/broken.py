"""Pictures that can't be read: what is known of each, and whether their folder is still there at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple


class Broken(NamedTuple):
    """One picture that can't be read.

    Attributes:
        row: of its part of the data; names need not be unique, rows are.
        name: its path, or ``row N``.
        reason: why, without the name.
    """

    row: int
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def _nothing() -> None:
    """Without a limit there is nothing to check."""


@dataclass(frozen=True)
class Unreadable:
    """Where a feed puts what it could not read.

    Attributes:
        folder: that all pictures lie in as files; None where they don't.
        found: by row, growing, on this process.
        check: called by feeds on every process at the same moments, to end a run that can't read too many.
    """

    folder: str | None = None
    found: dict[int, Broken] = field(default_factory=dict)
    check: Callable[[], None] = _nothing


def why_gone(folder: str) -> str | None:
    """Why nothing in *folder* can be read, as where its disk was unmounted; None while something can."""
    try:
        with os.scandir(folder) as entries:
            return None if next(entries, None) else "it is empty"
    except OSError as error:
        return error.strerror or type(error).__name__
