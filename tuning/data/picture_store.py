"""Decoded pictures in a file that loader workers, processes and runs share: found by number, added by whoever has one.

Pixels are appended to one file under a lock; a record in a second file, written afterwards, says where they lie. Both
the record and the pixels carry a checksum that is looked at whenever they are read. So whatever is killed at whatever
moment, the process or the machine, a picture is either whole or not there.

Not for Windows, which lacks the locks: who makes a store asks `locks_are_there` first.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Pixels = npt.NDArray[np.uint8]
Stamp = tuple[int, int]
_RECORD = struct.Struct("<QIIqqQ")  # and the checksum of these, 8 bytes
RECORD_BYTES = _RECORD.size + 8


class Files(NamedTuple):
    """Paths of the two files of a store."""

    records: str
    pixels: str


class _Record(NamedTuple):
    """Where a picture lies.

    Attributes:
        offset: of its first byte.
        stamp: size and time of change of the file that it was decoded from.
        digest: of its pixels.
    """

    offset: int
    height: int
    width: int
    stamp: Stamp
    digest: int

    @property
    def end(self) -> int:
        """Byte behind its pixels."""
        return self.offset + self.height * self.width * 3

    def packed(self, number: int) -> bytes:
        """As it stands in the file of records."""
        content = _RECORD.pack(self.offset, self.height, self.width, *self.stamp, self.digest)
        return content + xxhash.xxh3_64_digest(content, seed=number)


def locks_are_there() -> bool:
    """Whether this system has the locks that a store needs."""
    return fcntl is not None


class PictureStore:
    """Pictures ``(H, W, 3)`` uint8 by number. Forked processes may share it; pickled, it opens its files anew.

    Args:
        files: made where they aren't there.
        pictures: how many there may be.
        most_bytes: of pixels, beyond which nothing is added; None = until the disk is full.
        holds: open files that *files* names by number, kept open as long as the store.
    """

    def __init__(self, files: Files, pictures: int, most_bytes: int | None = None, holds: tuple[FileIO, ...] = ()):
        self._files, self._pictures, self._most, self._holds = files, pictures, most_bytes, holds
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {"_files": self._files, "_pictures": self._pictures, "_most": self._most, "_holds": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def _open(self) -> None:
        self._records, self._pixels = (
            FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+") for path in self._files
        )
        size = max(1, self._pictures) * RECORD_BYTES
        if os.fstat(self._records.fileno()).st_size < size:
            os.truncate(self._records.fileno(), size)
        self._table = mmap.mmap(self._records.fileno(), size, prot=mmap.PROT_READ)  # type: ignore[call-arg,attr-defined]
        self._map: mmap.mmap | bytes = b""
        self._full = False

    @property
    def bytes_used(self) -> int:
        """Of the file of pixels."""
        return os.fstat(self._pixels.fileno()).st_size

    def find(self, number: int, stamp: Stamp | None) -> Pixels | None:
        """A picture, in memory that is shared and must not be written to; None where it isn't there, or not whole.

        Args:
            stamp: what it must have been added with; None = any.
        """
        record = self._record(number)
        if record is None or (stamp is not None and record.stamp != stamp):
            return None
        if record.end > len(self._map):
            self._map = _mapped(self._pixels)
        if record.end > len(self._map):
            return None
        pixels = np.frombuffer(self._map, np.uint8, record.end - record.offset, record.offset)
        if xxhash.xxh3_64_intdigest(pixels.data) != record.digest:
            return None
        return pixels.reshape(record.height, record.width, 3)

    def add(self, number: int, stamp: Stamp, pixels: Pixels) -> None:
        """Keep a picture, unless another process was faster or there is no room; that is told once, on stderr."""
        if self._full:
            return
        try:
            with _locked(self._records):
                if self.find(number, stamp) is None:
                    self._append(number, stamp, pixels)
        except OSError as error:
            self._give_up(error.strerror or str(error))

    def _append(self, number: int, stamp: Stamp, pixels: Pixels) -> None:
        offset = self.bytes_used
        if self._most is not None and offset + pixels.nbytes > self._most:
            self._give_up(f"its limit of {self._most / 1e9:.3g} GB is reached")
            return
        height, width, _ = pixels.shape
        record = _Record(offset, height, width, stamp, xxhash.xxh3_64_intdigest(pixels.data))
        try:
            _write(self._pixels, pixels.data.cast("B"), offset)
            _write(self._records, memoryview(record.packed(number)), number * RECORD_BYTES)
        except OSError:
            os.truncate(self._pixels.fileno(), offset)
            raise

    def _record(self, number: int) -> _Record | None:
        content = self._table[number * RECORD_BYTES : (number + 1) * RECORD_BYTES]
        fields, check = content[: _RECORD.size], content[_RECORD.size :]
        if xxhash.xxh3_64_digest(fields, seed=number) != check:
            return None
        offset, height, width, size, changed, digest = _RECORD.unpack(fields)
        return _Record(offset, height, width, (size, changed), digest)

    def _give_up(self, why: str) -> None:
        self._full = True
        print(
            f"warning: no more pictures are added to the cache {self._files.pixels}: {why}. The others are decoded "
            "anew in every epoch.",
            file=sys.stderr,
            flush=True,
        )


def _mapped(file: FileIO) -> mmap.mmap | bytes:
    size = os.fstat(file.fileno()).st_size
    return mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) if size else b""  # type: ignore[call-arg,attr-defined]


def _write(file: FileIO, content: memoryview, offset: int) -> None:
    """All of it: a single call may write less than it is asked for."""
    while content:
        written = os.pwrite(file.fileno(), content, offset)  # type: ignore[attr-defined]
        content, offset = content[written:], offset + written


@contextmanager
def _locked(file: FileIO) -> Iterator[None]:
    """Hold the lock of a file, which belongs to this process alone and ends with it, however that ends."""
    fcntl.lockf(file.fileno(), fcntl.LOCK_EX)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        fcntl.lockf(file.fileno(), fcntl.LOCK_UN)  # type: ignore[attr-defined]
