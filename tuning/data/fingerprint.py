"""What the data was when a run began, so that a run that goes on can tell whether it still is.

A table with one row a picture: names, labels and sizes, no content. Quick for a million pictures. Of streamed data one
row a row group.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset

from tuning.data.folders import shorten
from tuning.data.sources import Data
from tuning.data.streamed import StreamedRows
from tuning.data.tables import Table, encoded, label_array
from tuning.errors import UserError

FILE = "data.parquet"
MOST_FILES = 100_000  # whose size is asked for: on a network disk each takes a tenth of a millisecond or more
_THREADS = 16
_SHOWN = 3
_CLASSES = b"classes"
_UNIT = b"unit"  # what a row of the table is; left out where it is a picture


def index(data: Data) -> pa.Table:
    """One row a picture, in the order of the data.

    Columns: ``split`` (train, eval), ``name`` (path below the data folder, or ``row N``), ``label`` (class) and
    ``bytes`` (encoded size; null where it is not known, as for most of more than `MOST_FILES` files). Of streamed data:
    one row a row group, whose ``label`` is a digest of its rows and their labels.
    """
    every = max(1, -(-(len(data.train) + len(data.eval)) // MOST_FILES))
    parts = [_part("train", data.train, data, every), _part("eval", data.eval, data, every)]
    about = {_CLASSES: json.dumps(data.classes).encode()}
    if isinstance(data.train, StreamedRows):
        about[_UNIT] = b"row group"
    return pa.concat_tables(parts).replace_schema_metadata(about)


def save(table: pa.Table, path: Path) -> None:
    """Write the table as parquet, replacing an earlier one as a whole."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        with aside.open("wb") as file:
            pq.write_table(table, file, compression="zstd", write_statistics=False)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def differences(old_path: Path, new: pa.Table) -> str | None:
    """What changed between the table in *old_path* and *new*, with counts and the first names; None: nothing.

    Sizes that either doesn't know are left out.

    Raises:
        UserError: the file is damaged.
    """
    try:
        old = pq.read_table(old_path, memory_map=False)
        before, now = (json.loads(t.schema.metadata[_CLASSES]) for t in (old, new))
    except (pa.ArrowException, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{old_path} is damaged, so whether the data changed can't be told; delete it to go on without."
        ) from error
    unit = new.schema.metadata.get(_UNIT, b"picture").decode()
    found = [*_changed_classes(before, now), *_changed_rows(old, new, unit)]
    return "; ".join(found) or None


def names(dataset: Table, folder: str | None) -> pa.Array:
    """A name for every row: the path of its picture below *folder*, or ``row N``."""
    dataset = encoded(dataset)
    if isinstance(dataset, StreamedRows):
        return _named(pa.array(dataset.names(range(len(dataset))), pa.string()), folder)
    paths, _ = paths_and_sizes(dataset)
    return _named(paths, folder)


def _named(paths: pa.Array, folder: str | None) -> pa.Array:
    numbered = pc.binary_join_element_wise("row", pc.cast(pa.array(np.arange(len(paths))), pa.string()), " ")
    return pc.coalesce(_below(paths, folder), numbered)


def _part(split: str, dataset: Table, data: Data, every: int) -> pa.Table:
    dataset = encoded(dataset)
    if isinstance(dataset, StreamedRows):
        return _row_groups(split, dataset)
    rows = len(dataset)
    paths, sizes = paths_and_sizes(dataset)
    labels = pa.DictionaryArray.from_arrays(pa.array(label_array(dataset), pa.int32()), pa.array(data.classes))
    columns = {
        "split": pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([split])).cast(
            pa.string()
        ),
        "name": _named(paths, data.folder),
        "label": labels.cast(pa.string()),
        "bytes": pc.coalesce(sizes, _sizes_on_disk(paths, sizes, every)),
    }
    return pa.table(columns)


def _row_groups(split: str, rows: StreamedRows) -> pa.Table:
    shards, blocks = rows.shards, rows.block_numbers.tolist()
    digests = [hashlib.blake2b(content, digest_size=16).hexdigest() for content in rows.contents()]
    columns = {
        "split": pa.array([split] * len(blocks)),
        "name": pa.array([shards.name(block) for block in blocks]),
        "label": pa.array(digests),
        "bytes": pa.array(shards.sizes[blocks]),
    }
    return pa.table(columns)


def paths_and_sizes(dataset: Dataset) -> tuple[pa.Array, pa.Array]:
    """Path and encoded size of every row, either null; the pictures themselves are not touched."""
    images = dataset.data.column("image")
    content, paths = (pc.struct_field(images, name) for name in ("bytes", "path"))
    sizes = pc.cast(pc.binary_length(content), pa.int64())  # from offsets
    # Asking the dataset for its rows would copy the pictures, which may be more than the memory holds.
    chosen = dataset._indices
    if chosen is not None:
        rows = chosen.column(0)
        paths, sizes = paths.take(rows), sizes.take(rows)
    return _whole(pc.cast(paths, pa.string())), _whole(sizes)


def _whole(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _below(paths: pa.Array, folder: str | None) -> pa.Array:
    """Paths without the folder in front, so that a data folder may move."""
    if folder is None:
        return paths
    start = os.path.join(folder, "")
    inside = pc.starts_with(paths, start)
    names = pc.if_else(inside, pc.utf8_slice_codeunits(paths, len(start)), paths)
    return pc.replace_substring(names, os.sep, "/") if os.sep != "/" else names


def _sizes_on_disk(paths: pa.Array, sizes: pa.Array, every: int) -> pa.Array:
    """Sizes of every *every*-th row that is a file of its own."""
    on_disk = pc.and_(pc.is_null(sizes), pc.is_valid(paths)).to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(on_disk)[::every]
    found = np.full(len(paths), -1, np.int64)
    shares = [share for share in np.array_split(rows, _THREADS) if len(share)]
    if shares:
        with ThreadPoolExecutor(_THREADS) as threads:
            asked = threads.map(_stat_all, (paths.take(pa.array(share)).to_pylist() for share in shares))
        found[rows] = np.concatenate([np.array(one, np.int64) for one in asked])
    return pa.array(found, mask=found < 0)


def _stat_all(paths: Sequence[str]) -> list[int]:
    return [_size(path) for path in paths]


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _changed_classes(old: list[str], new: list[str]) -> Iterator[str]:
    gone, fresh = [name for name in old if name not in new], [name for name in new if name not in old]
    if gone:
        yield f"classes gone: {shorten(gone)}"
    if fresh:
        yield f"new classes: {shorten(fresh)}"
    if not gone and not fresh and old != new:
        yield "the classes have another order"


def _changed_rows(old: pa.Table, new: pa.Table, unit: str) -> Iterator[str]:
    if not (old["name"].equals(new["name"]) and old["split"].equals(new["split"])):
        counts = _counts(old, new, ["name"])
        yield from _changed_names(old, new, counts, unit)
        once = counts.filter(pc.and_(pc.equal(counts["old"], 1), pc.equal(counts["new"], 1)))["name"]
        old, new = (t.take(pc.index_in(once, value_set=t["name"])) for t in (old, new))
    names = new["name"]
    resized = pc.fill_null(pc.not_equal(old["bytes"], new["bytes"]), False)
    yield from _told("of another size", names.filter(resized), unit)
    yield from _told("with another label", names.filter(pc.not_equal(old["label"], new["label"])), unit)


def _changed_names(old: pa.Table, new: pa.Table, counts: pa.Table, unit: str) -> Iterator[str]:
    gone = counts.filter(pc.greater(counts["old"], counts["new"]))["name"]
    fresh = counts.filter(pc.less(counts["old"], counts["new"]))["name"]
    yield from _told("gone", gone, unit)
    yield from _told("new", fresh, unit)
    if len(gone) or len(fresh):  # a split by --val-fraction then differs too
        return
    parts = _counts(old, new, ["name", "split"])
    moved = parts.filter(pc.less(parts["old"], parts["new"]))["name"]
    yield from _told("in the other of training and evaluation", moved, unit)
    if not len(moved):
        yield f"the {unit}s are in another order"


def _counts(old: pa.Table, new: pa.Table, keys: list[str]) -> pa.Table:
    """How often each key is in either table, columns ``old`` and ``new``; names need not be unique."""
    before, now = (t.group_by(keys).aggregate([([], "count_all")]) for t in (old, new))
    both = before.join(now, keys, join_type="full outer", right_suffix=" new")
    counts = {"old": both["count_all"], "new": both["count_all new"]}
    filled = {name: pc.fill_null(column, 0) for name, column in counts.items()}
    return pa.table({**{key: both[key] for key in keys}, **filled})


def _told(what: str, names: pa.ChunkedArray, unit: str) -> Iterator[str]:
    if len(names):
        noun = f"{unit} is" if len(names) == 1 else f"{unit}s are"
        first = names.take(pc.sort_indices(names)[:_SHOWN]).to_pylist()
        rest = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
        yield f"{len(names):,} {noun} {what} ({', '.join(first)}{rest})"
