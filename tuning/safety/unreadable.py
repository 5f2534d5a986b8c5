"""Pictures that can't be read, over all processes and all parts of a run: counted, listed, and bounded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from tuning.data.broken import Broken, Unreadable
from tuning.data.sources import Data
from tuning.errors import UserError
from tuning.tracking.run_folder import write_atomically

LIST = "unreadable.txt"
SHOWN = 10
_WORDS = {"train": "training", "eval": "evaluation"}


class UnreadablePictures:
    """What no process could read so far. All processes make it, and call `check` at the same moments.

    The run folder's `unreadable.txt` has one line a picture: ``train`` or ``eval``, row, name and reason, separated by
    tabs. Training takes another picture in place of one, evaluation leaves it out.

    Args:
        run_folder: where the list is written; None: nowhere.
        limit: share of the pictures of either part that may be unreadable; one always may.
        resumed: go on with the list of an earlier part of the run.

    Attributes:
        train, evaluation: for the feeds of this process to write into.
    """

    def __init__(
        self, accelerator: Accelerator, run_folder: Path | None, data: Data, limit: float, *, resumed: bool
    ) -> None:
        self._accelerator, self._limit = accelerator, limit
        self._list = run_folder / LIST if run_folder else None
        self._images = {"train": len(data.train), "eval": len(data.eval)}
        self.train, self.evaluation = (Unreadable(data.folder, check=self.check) for _ in range(2))
        self._found = {"train": self.train.found, "eval": self.evaluation.found}
        self._known = self._earlier(resumed)
        self._unsaid: list[str] = []

    @property
    def counts(self) -> dict[str, int]:
        """Pictures that could not be read, of ``train`` and of ``eval``."""
        return {part: len(known) for part, known in self._known.items()}

    def news(self) -> list[str]:
        """Names and reasons of the pictures found since the last call, for a person to see."""
        unsaid, self._unsaid = self._unsaid, []
        return unsaid

    def check(self) -> None:
        """Put together what all processes found, and write the list when it grew. All processes take part.

        Costs one number over all processes while there is nothing new.

        Raises:
            UserError: more than the limit are unreadable, on every process; shows the first.
        """
        fresh = [
            (part, broken)
            for part, found in self._found.items()
            for broken in found.values()
            if broken.row not in self._known[part]
        ]
        for found in self._found.values():
            found.clear()
        count = torch.tensor(len(fresh), device=self._accelerator.device)
        if int(self._accelerator.reduce(count, reduction="sum")) == 0:
            return
        for part, broken in sorted(set(gather_object(fresh))):
            if broken.row not in self._known[part]:  # two processes may differ in the reason
                self._known[part][broken.row] = broken
                self._unsaid.append(str(broken))
        self._write()
        for part in self._known:
            self._refuse_too_many(part)

    def _earlier(self, resumed: bool) -> dict[str, dict[int, Broken]]:
        known = _empty()
        if self._list is not None and self._accelerator.is_main_process:  # the others may not have the run folder
            if resumed:
                known = _read_list(self._list)
            else:
                self._list.unlink(missing_ok=True)
        return broadcast_object_list([known])[0]  # type: ignore[no-any-return]

    def _write(self) -> None:
        if self._list is None or not self._accelerator.is_main_process:
            return
        lines = [_line(part, broken) for part, known in self._known.items() for _, broken in sorted(known.items())]
        try:
            write_atomically(self._list, "".join(lines))
        except OSError as error:  # a full disk must not cost the run; the next list holds these too
            self._unsaid.append(f"{self._list} can't be written: {error.strerror}")

    def _refuse_too_many(self, part: str) -> None:
        known, images = self._known[part], self._images[part]
        if len(known) <= max(1, self._limit * images + 1e-6):
            return
        raise UserError(
            f"{len(known):,} of {images:,} {_WORDS[part]} pictures can't be read, more than --max-unreadable "
            f"{self._limit:g} allows:{shown(map(str, known.values()))}\n"
            + (f"All that were seen are in {self._list}. " if self._list else "")
            + "Repair them and start a new run, or go on with a higher --max-unreadable."
        )


def shown(names: Iterable[str]) -> str:
    """The first of *names*, one a line, and how many follow."""
    listed = list(names)
    more = f"\n  and {len(listed) - SHOWN:,} more" if len(listed) > SHOWN else ""
    return "".join(f"\n  {name}" for name in listed[:SHOWN]) + more


def _empty() -> dict[str, dict[int, Broken]]:
    return {part: {} for part in _WORDS}


def _line(part: str, broken: Broken) -> str:
    return "\t".join((part, str(broken.row), _printable(broken.name), _printable(broken.reason))) + "\n"


def _printable(text: str) -> str:
    """Without tabs, line ends and other control characters, which the name of a file may hold."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _read_list(path: Path) -> dict[str, dict[int, Broken]]:
    """The list of an earlier part of the run; lines that make no sense are left out."""
    known = _empty()
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for line in lines:
        part, _, rest = line.partition("\t")
        row, _, rest = rest.partition("\t")
        name, _, reason = rest.partition("\t")
        if part in known and row.isdecimal() and reason:
            known[part][int(row)] = Broken(int(row), name, reason)
    return known
