"""``metrics.jsonl``: one JSON object a line, written so that a full disk stops nothing and read so that nothing breaks.

The records of a run are in the order of `order`, and a run that goes on writes again, bit for bit, what `keep_until`
cut off.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuning.tracking.run_folder import write_atomically

TRAINING, EVALUATION, OF_AVERAGE, FINDER, OTHER = 0, 1, 2, 3, 4
LARGEST_STEP = 2**63 - 1


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records in a ``metrics.jsonl``, oldest first; whatever is no record, such as a torn line, is passed over.

    A file that is missing or can't be read has none. NaN and infinity, which are no JSON, are read as None.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return []
    return [record for record in map(_parsed, lines) if record is not None]


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The record that *line* holds: an object whose ``step`` is a whole number from 0."""
    try:
        record = json.loads(line.decode("utf-8"), parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    return record if 0 <= record["step"] <= LARGEST_STEP else None


def number(value: object) -> float | None:
    """*value* as a finite float; None when it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number beyond 1e308
        return None


def order(record: Mapping[str, Any]) -> tuple[int, int, int]:
    """Place of a record in the run: its step; training, evaluation, that of averaged weights, LR finder, anything else;
    its number among those of an LR finder."""
    step: int = record["step"]
    if "train/loss" in record:
        return step, TRAINING, 0
    if type(number := record.get("lr_finder/number")) is int:
        return step, FINDER, number
    for kind, prefix in ((EVALUATION, "eval/"), (OF_AVERAGE, "eval_ema/")):
        if any(key.startswith(prefix) for key in record):
            return step, kind, 0
    return step, OTHER, 0


def keep_until(path: Path, step: int) -> None:
    """Cut a ``metrics.jsonl`` down to what a run has written that goes on from *step*; the rest it writes again.

    Kept are the records of earlier steps and the training record of *step* itself, and nothing at all for step 0.

    Raises:
        OSError: the file can't be read or replaced; it is as it was.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    kept = b"".join(line + b"\n" for line in content.split(b"\n") if _is_before(_parsed(line), step))
    if kept != content:
        write_atomically(path, kept.decode("utf-8"))


def _is_before(record: Mapping[str, Any] | None, step: int) -> bool:
    return record is not None and step > 0 and order(record) <= (step, TRAINING, 0)


class RecordFile:
    """Appends records to a file, one process alone; a line is there for any reader when `append` returns.

    While the file can't be written (disk full, quota, read-only), lines wait in memory and are written as soon as that
    works again. It is said once on stderr.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None
        self._end: int | None = None  # of the last whole line; None before the file was opened
        self._waiting: list[bytes] = []
        self._told = False

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record, or keep it for later.

        Raises:
            ValueError: a value is NaN or infinite, which JSON has no name for.
        """
        self._waiting.append(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._write_waiting()

    def sync(self) -> None:
        """Put what has been written on the disk: after a power cut it must not be older than a checkpoint.

        Another thread may call it than the one that appends.
        """
        file = self._file
        if file is not None:
            try:
                os.fsync(file.fileno())
            except ValueError:  # closed meanwhile, because it can't be written
                return
            except OSError as error:
                self._tell(error)

    def close(self) -> None:
        """Try a last time; say on stderr how many records are lost, if any are."""
        self._write_waiting()
        self.sync()
        self._give_up_file()
        if self._waiting:
            _warn(f"{len(self._waiting)} records are missing from {self._path}, which could not be written.")
            self._waiting.clear()

    def _write_waiting(self) -> None:
        try:
            while self._waiting:
                self._write_line(self._waiting[0])
                self._waiting.pop(0)
        except OSError as error:
            self._tell(error)
            self._give_up_file()

    def _write_line(self, line: bytes) -> None:
        if self._file is None:
            self._file = self._path.open("ab", buffering=0)
            self._end = self._file.tell() if self._end is None else self._end
            self._file.truncate(self._end)
        assert self._end is not None
        rest = memoryview(line)
        while rest:  # a disk that is nearly full takes a part
            rest = rest[self._file.write(rest) :]
        self._end += len(line)

    def _give_up_file(self) -> None:
        """Close, without the torn line where that is possible; else it is cut off at the next attempt."""
        file, self._file = self._file, None
        if file is None:
            return
        with contextlib.suppress(OSError):
            file.truncate(self._end)
        try:
            file.close()
        except OSError as error:
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        if not self._told:
            self._told = True
            reason = error.strerror or str(error)
            _warn(f"{self._path} can't be written ({reason}). The run goes on and writes its records later.")


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
