"""Rows of parquet shards that stay where they are: a row group is read when one of its pictures is wanted.

What is in memory for every row is its label. Looks like a `datasets.Dataset` of the columns `image` and `label` to
those who ask for its length and for single rows.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from tuning.data.local_order import Blocks
from tuning.data.sampling import Rows
from tuning.errors import UserError

KEPT_FOR_SINGLE_ROWS = 2  # row groups
LEAST_PLACES = 4  # row groups that a sample of the rows comes from
READING_FAILED = (OSError, pa.ArrowException, EOFError)


def filesystem(base: str) -> tuple[fs.FileSystem, str]:
    """The file system of a folder or URL, one for each process, and the place on it."""
    return _filesystem(base, os.getpid())


@lru_cache(maxsize=8)
def _filesystem(base: str, process: int) -> tuple[fs.FileSystem, str]:
    if "://" not in base:
        return fs.LocalFileSystem(), base
    try:
        found, path = fsspec.core.url_to_fs(base)
    except ImportError:  # pyarrow reads some by itself, S3 and GCS for example
        return fs.FileSystem.from_uri(base)  # type: ignore[no-any-return]
    return fs.PyFileSystem(fs.FSSpecHandler(found)), path


@contextmanager
def parquet_file(base: str, path: str) -> Iterator[pq.ParquetFile]:
    """One shard, opened; what can't be read raises one of `READING_FAILED`."""
    with filesystem(base)[0].open_input_file(path) as source, pq.ParquetFile(source, pre_buffer=True) as file:
        yield file


def why_unreadable(error: BaseException) -> str:
    """The first line of what a reader said."""
    if isinstance(error, FileNotFoundError):
        return "it is not there"
    text = getattr(error, "strerror", None) or str(error)
    return text.splitlines()[0] if text else type(error).__name__


@dataclass(frozen=True)
class Shards:
    """Where the pictures of one part of the data lie.

    Attributes:
        base: folder or URL; names the file system and the place below which the shards lie.
        paths: of the shards, on that file system.
        column: of the pictures.
        path_column: of the paths that the pictures had; None where there are none.
        shard, group: of every block, which is a row group: its shard and its number there, ``(G,)``.
        starts: first row of every block, and the number of rows at the end, ``(G + 1,)``.
        sizes: bytes of every block's pictures in memory, ``(G,)``.
    """

    base: str
    paths: tuple[str, ...]
    column: str
    path_column: str | None
    shard: Rows
    group: Rows
    starts: Rows
    sizes: Rows

    def name(self, block: int) -> str:
        """Such as ``train-00003.parquet: row group 7``, below the folder, which may move."""
        path = self.paths[self.shard[block]].removeprefix(filesystem(self.base)[1]).lstrip("/")
        return f"{path}: row group {self.group[block]}"

    def read(self, block: int) -> Pictures:
        """The pictures of a block, encoded.

        Raises:
            UserError: the shard is gone, cut short, or not what it was.
        """
        return Pictures(self._column(block, self.column))

    def read_names(self, block: int) -> list[str | None]:
        """The paths that a block's pictures had, without the pictures."""
        if self.path_column is None:
            return [None] * int(self.starts[block + 1] - self.starts[block])
        return Pictures(self._column(block, self.path_column)).paths.to_pylist()  # type: ignore[no-any-return]

    def _column(self, block: int, name: str) -> pa.ChunkedArray:
        path, rows = self.paths[self.shard[block]], self.starts[block + 1] - self.starts[block]
        try:
            with parquet_file(self.base, path) as file:
                if self.group[block] >= file.num_row_groups:
                    raise EOFError("it has fewer row groups")
                table = file.read_row_group(int(self.group[block]), columns=[name], use_threads=False)
        except READING_FAILED as error:
            raise UserError(_gone(path, why_unreadable(error))) from error
        if table.num_rows != rows or not table.num_columns:
            raise UserError(_gone(path, "it has other row groups"))
        return table.column(0)


def _gone(path: str, why: str) -> str:
    return (
        f"the shard {path} can't be read as it was when the data was opened: {why}. Bring it back and go on with "
        "--resume auto."
    )


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of pictures holds their paths alone."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


class Pictures:
    """Encoded pictures: bytes, paths, or a struct of both."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        nothing = pa.chunked_array([pa.nulls(len(column), pa.string())])
        if pa.types.is_struct(column.type):
            fields = [field.name for field in column.type]
            self.content = pc.struct_field(column, "bytes") if "bytes" in fields else nothing
            self.paths = pc.struct_field(column, "path") if "path" in fields else nothing
        elif is_text(column.type):
            self.content, self.paths = nothing, column
        else:
            self.content, self.paths = column, nothing

    def __getitem__(self, place: int) -> dict[str, Any]:
        return {"bytes": self.content[place].as_py(), "path": self.paths[place].as_py()}


class StreamedRows:
    """Rows `image` (`{'bytes', 'path'}`, never decoded) and `label` of shards, all of them or some.

    Args:
        labels: of every row of *shards*, indices into the class map.
        shuffle_bytes: of pictures that all processes together hold to shuffle.
        chosen: rows of *shards*, in this order; None = all.
    """

    def __init__(self, shards: Shards, labels: np.ndarray, shuffle_bytes: float, chosen: Rows | None = None) -> None:
        self.shards, self.shuffle_bytes = shards, shuffle_bytes
        self.labels = labels if chosen is None else labels[chosen]
        self._all_labels, self._chosen = labels, chosen
        if chosen is None:
            self.block_numbers, starts = np.arange(len(shards.sizes)), shards.starts
        else:
            blocks = np.searchsorted(shards.starts, chosen, side="right") - 1
            bounds = np.flatnonzero(np.diff(blocks, prepend=-1))
            self.block_numbers, starts = blocks[bounds], np.append(bounds, len(chosen))
        held = shuffle_bytes // max(1.0, float(shards.sizes[self.block_numbers].mean())) if len(starts) > 1 else 1
        self.blocks = Blocks(starts, max(1, int(held)))
        self._read: OrderedDict[int, Pictures] = OrderedDict()

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_read": OrderedDict()}

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        block, place = self.locate(row)
        if block not in self._read:
            self._read[block] = self.shards.read(block)
        self._read.move_to_end(block)
        while len(self._read) > KEPT_FOR_SINGLE_ROWS:
            self._read.popitem(last=False)
        return self.content(row, self._read[block], place)

    def locate(self, row: int) -> tuple[int, int]:
        """The block of a row, and its place there."""
        there = row if self._chosen is None else int(self._chosen[row])
        block = int(np.searchsorted(self.shards.starts, there, side="right")) - 1
        return block, there - int(self.shards.starts[block])

    def content(self, row: int, pictures: Pictures, place: int) -> dict[str, Any]:
        """A row whose block has been read."""
        return {"image": pictures[place], "label": int(self.labels[row])}

    def take(self, indices: Rows) -> StreamedRows:
        """The rows *indices*, in that order."""
        chosen = indices if self._chosen is None else self._chosen[indices]
        small = np.uint32 if len(self._all_labels) < 2**32 else np.int64
        return StreamedRows(self.shards, self._all_labels, self.shuffle_bytes, chosen.astype(small))

    def by_block(self, rows: Sequence[int]) -> list[Rows]:
        """Ascending *rows*, cut where another block begins."""
        ascending = np.asarray(rows, np.int64)
        blocks = np.searchsorted(self.blocks.starts, ascending, side="right")
        return [part for part in np.split(ascending, np.flatnonzero(np.diff(blocks)) + 1) if len(part)]

    def names(self, rows: Sequence[int] | Rows) -> list[str | None]:
        """The paths that these pictures had; reads nothing else, and every block once."""
        found: list[str | None] = [None] * len(rows)
        places = sorted((*self.locate(int(row)), index) for index, row in enumerate(rows))
        block, names = -1, list[str | None]()
        for there, place, index in places:
            if there != block:
                block, names = there, self.shards.read_names(there)
            found[index] = names[place]
        return found

    def contents(self) -> Iterator[bytes]:
        """Which of its rows are used, and their labels, for every block."""
        for block, first, end in zip(self.block_numbers, self.blocks.starts, self.blocks.starts[1:], strict=False):
            part = slice(int(first), int(end))
            places = b"all" if self._chosen is None else (self._chosen[part] - self.shards.starts[block]).tobytes()
            yield places + self.labels[part].astype(np.int64).tobytes()

    def spread(self, count: int) -> Rows:
        """Up to *count* rows out of a few blocks that are evenly spaced, ascending."""
        starts = self.blocks.starts
        enough = max(LEAST_PLACES, -(-count * len(self.blocks) // len(self)))
        some = np.unique(np.linspace(0, len(self.blocks) - 1, min(enough, len(self.blocks))).astype(np.int64))
        each = max(1, count // len(some))
        parts = [np.linspace(starts[b], starts[b + 1] - 1, each).astype(np.int64) for b in some]
        rows: Rows = np.unique(np.concatenate(parts))[:count]
        return rows
