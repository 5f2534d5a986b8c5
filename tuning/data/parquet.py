"""`--streaming`: parquet shards opened by their footers and labels alone, in a folder, by a pattern, or at a URL."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, DatasetInfo, Features
from datasets.table import InMemoryTable
from pyarrow import fs

from tuning.data.columns import choose_columns, class_map, codes_of, named, refuse_missing
from tuning.data.folders import Skipped, files_below
from tuning.data.listings import extension
from tuning.data.shards import HUB_ID, KINDS, choose_shards, is_saved
from tuning.data.streamed import READING_FAILED, Shards, StreamedRows, filesystem, is_text, parquet_file, why_unreadable
from tuning.data.tables import Opened
from tuning.errors import UserError

THREADS = 16  # footers read at a time
FEW_HELD = 8  # row groups: with fewer to shuffle neighbours stay neighbours
LEAVE_OUT = "Leave --streaming out (--no-streaming where a run or a preset sets it)"


def open_streamed(
    data: str,
    image_column: str | None,
    label_column: str | None,
    train_split: str | None,
    eval_split: str | None,
    shuffle_gb: float,
) -> Opened:
    """Open parquet shards where they lie. Footers and label columns are read, no picture.

    Args:
        data: a folder, a pattern such as ``photos/train-*.parquet``, a URL of either that fsspec or pyarrow can open,
            or a Hugging Face dataset id.
        shuffle_gb: 10^9 bytes of pictures held to shuffle, over all processes.

    Raises:
        UserError: no parquet shards, or anything wrong with them.
    """
    base, root, files = find_files(data)
    parts, train, judge, notes = choose_shards(files, root, train_split, eval_split)
    columns = _columns(base, parts[train][0], image_column, label_column)
    footers = {name: _survey(base, paths, columns) for name, paths in parts.items()}
    distinct = partial(_distinct, footers[train])
    values, classes = class_map(columns.feature, distinct)
    opened = {
        name: _rows(base, parts[name], columns, found, values, shuffle_gb * 1e9) for name, found in footers.items()
    }
    if len(opened[train]) == 0:
        raise UserError("The train split has no images; name another with --train-split.")
    facts = _facts(opened[train], len(parts[train]))
    return Opened(opened[train], opened[judge] if judge else None, classes, (*facts, *notes))


def find_files(data: str) -> tuple[str, str, list[str]]:
    """What names the file system, the folder on it that splits are told by, and the parquet files in their order."""
    if "://" not in data:
        local = os.path.expanduser(data)
        if os.path.isdir(local):
            return local, local, _in_folder(local)
        if not os.path.exists(local) and not _is_pattern(data) and HUB_ID.fullmatch(data):
            data = f"hf://datasets/{data}"
        else:
            data = local
    folder, pattern = _split_pattern(data)
    try:
        found, root = filesystem(folder)
        listed = found.get_file_info(fs.FileSelector(root, recursive=pattern == "*" or "/" in pattern))
    except (*READING_FAILED, ValueError) as error:
        raise UserError(f"--data {data!r} can't be listed: {why_unreadable(error)}.") from error
    paths = sorted(info.path for info in listed if info.type == fs.FileType.File and extension(info.path) == "parquet")
    below = {path: path.removeprefix(root).lstrip("/") for path in paths}
    fitting = [path for path in paths if fnmatch.fnmatchcase(below[path], pattern) and "/." not in f"/{below[path]}"]
    if not fitting:
        raise UserError(f"--data {data!r}: no parquet files there. --streaming reads parquet shards only.")
    return folder, root, fitting


def _is_pattern(text: str) -> bool:
    return any(char in text for char in "*?[")


def _split_pattern(data: str) -> tuple[str, str]:
    """The folder in front of the first ``*``, ``?`` or ``[``, and the pattern below it."""
    start = re.search(r"[*?\[]", data)
    if start is None:
        whole = extension(data) == "parquet"
        folder, _, name = data.rpartition("/") if whole else (data.rstrip("/"), "", "*")
        return folder or ".", name
    folder, _, name = data[: start.start()].rpartition("/")
    return folder or ".", name + data[start.start() :]


def _in_folder(folder: str) -> list[str]:
    files = files_below(folder, frozenset(KINDS), Skipped())
    kinds = {extension(path) for path in files}
    if is_saved(folder):
        raise UserError(
            f"{folder} is a saved dataset: it is mapped into memory where it lies, so there is nothing to stream. "
            f"{LEAVE_OUT}."
        )
    if not kinds:
        raise UserError(
            f"{folder} holds no parquet shards. --streaming is for these; pictures in files are read one by one where "
            f"they lie anyway. {LEAVE_OUT}."
        )
    if kinds != {"parquet"}:
        other = " and ".join(sorted(KINDS[kind] for kind in kinds - {"parquet"}))
        raise UserError(
            f"{folder} holds {other} shards, which can only be read from the start to the end. Convert them to "
            f"parquet (docs/streaming.md), or let them be copied to the local disk: {LEAVE_OUT.lower()}."
        )
    return files


@dataclass(frozen=True)
class _Columns:
    """The columns that are read, as the first shard has them; `feature` is the type of the labels."""

    image: str
    path: str | None
    label: str
    feature: object


@dataclass(frozen=True)
class _Footer:
    """Of one shard: rows and bytes of pictures of every row group, and the labels: ``values[codes]``, -1 = missing."""

    rows: Sequence[int]
    sizes: Sequence[int]
    values: pa.Array
    codes: np.ndarray


def _columns(base: str, first: str, image_column: str | None, label_column: str | None) -> _Columns:
    try:
        with parquet_file(base, first) as file:
            schema, leaves = file.schema_arrow, {file.schema.column(n).path for n in range(len(file.schema))}
            features = Features.from_arrow_schema(schema)
    except (*READING_FAILED, ValueError, NotImplementedError) as error:
        raise UserError(f"The shard {first} can't be read: {why_unreadable(error)}.") from error
    empty = Dataset(InMemoryTable(features.arrow_schema.empty_table()), info=DatasetInfo(features=features))
    image, label = choose_columns(empty, image_column, label_column)
    of_paths = image if is_text(schema.field(image).type) else f"{image}.path"
    return _Columns(image, of_paths if of_paths in leaves else None, label, features[label])


def _survey(base: str, paths: Sequence[str], columns: _Columns) -> list[_Footer]:
    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(partial(_footer, base, columns), paths))


def _footer(base: str, columns: _Columns, path: str) -> _Footer:
    try:
        with parquet_file(base, path) as file:
            _require(path, columns, file.schema_arrow.names)
            rows, sizes = _row_groups(file, columns.image)
            column = file.read(columns=[columns.label], use_threads=False).column(0)
            feature = Features.from_arrow_schema(file.schema_arrow)[columns.label]
        encoded = column.combine_chunks().dictionary_encode()
        values = named(encoded.dictionary, feature)
    except (*READING_FAILED, ValueError, NotImplementedError) as error:
        raise UserError(f"The shard {path} can't be read: {why_unreadable(error)}.") from error
    codes = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
    if values.null_count:  # a ClassLabel below zero
        codes = np.where(np.append(values.is_null().to_numpy(zero_copy_only=False), True)[codes], -1, codes)
    return _Footer(rows, sizes, values, codes)


def _require(path: str, columns: _Columns, names: Sequence[str]) -> None:
    missing = [name for name in (columns.image, columns.label) if name not in names]
    if missing:
        raise UserError(f"The shard {path} lacks the column {missing[0]!r}; it has {', '.join(names)}.")


def _row_groups(file: pq.ParquetFile, image: str) -> tuple[list[int], list[int]]:
    """Rows, and bytes of pictures in memory, of every row group."""
    schema, metadata = file.schema, file.metadata
    wanted = [n for n in range(len(schema)) if schema.column(n).path.split(".")[0] == image]
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    sizes = [sum(group.column(n).total_uncompressed_size for n in wanted) for group in groups]
    return [group.num_rows for group in groups], sizes


def _distinct(footers: Sequence[_Footer]) -> pa.Array:
    kind = next((footer.values.type for footer in footers if len(footer.values)), pa.null())
    return pa.concat_arrays([footer.values.cast(kind) for footer in footers])


def _rows(
    base: str, paths: Sequence[str], columns: _Columns, footers: Sequence[_Footer], values: pa.Array, shuffle: float
) -> StreamedRows:
    labels = _labels(footers, values, columns.label)
    counts = [len(footer.rows) for footer in footers]
    rows = np.array([n for footer in footers for n in footer.rows], np.int64)
    sizes = np.array([n for footer in footers for n in footer.sizes], np.int64)
    shard, group = np.repeat(np.arange(len(paths)), counts), np.concatenate([np.arange(n) for n in counts])
    some = rows > 0
    starts = np.concatenate([[0], np.cumsum(rows[some])])
    shards = Shards(base, tuple(paths), columns.image, columns.path, shard[some], group[some], starts, sizes[some])
    return StreamedRows(shards, labels, shuffle)


def _labels(footers: Sequence[_Footer], values: pa.Array, label: str) -> np.ndarray:
    """Indices into the class map, in as few bytes as hold them."""
    missing = sum(int((footer.codes < 0).sum()) for footer in footers)
    refuse_missing(missing, sum(len(footer.codes) for footer in footers), label)
    small = np.min_scalar_type(max(len(values) - 1, 0))
    return np.concatenate([codes_of(f.values, values, label).astype(small)[f.codes] for f in footers])


def _facts(rows: StreamedRows, shards: int) -> list[str]:
    """What a person should know of how these shards are read and shuffled."""
    blocks, held = len(rows.blocks), min(rows.blocks.held, len(rows.blocks))
    size = float(rows.shards.sizes.mean()) / 1e6
    notes = [
        f"Streaming {shards:,} shards from where they lie: {blocks:,} row groups of {size:,.3g} MB on average, "
        f"{held:,} of them shuffled at a time over all processes (--shuffle-gb {rows.shuffle_bytes / 1e9:g})."
    ]
    if held < min(FEW_HELD, blocks):
        notes.append(
            f"Only {held} of {blocks:,} row groups fit into --shuffle-gb: images that lie together stay together. "
            "Raise it, or write the shards with smaller row groups (docs/streaming.md)."
        )
    pure = _of_one_class(rows)
    if pure > 0.5 and held < blocks:
        notes.append(
            f"{pure:.0%} of the row groups hold one class only: the data is sorted, and an optimizer step sees the "
            f"classes of at most {held:,} row groups. Write the shards in a random order (docs/streaming.md)."
        )
    return notes


def _of_one_class(rows: StreamedRows) -> float:
    """Share of the row groups of two or more images that hold a single class."""
    starts = rows.blocks.starts
    lowest, highest = (f.reduceat(rows.labels, starts[:-1]) for f in (np.minimum, np.maximum))
    several = np.diff(starts) > 1
    return float((lowest == highest)[several].mean()) if several.any() else 0.0
