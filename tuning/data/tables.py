"""The one table every data source ends in: an encoded image and its label, in rows that are cheap to reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image
from datasets.fingerprint import generate_random_fingerprint
from datasets.table import InMemoryTable

from tuning.data.cached import CachedRows
from tuning.data.splits import Indices
from tuning.data.streamed import StreamedRows

Table: TypeAlias = Dataset | StreamedRows | CachedRows
AT_ONCE = 256  # rows whose encoded pictures pass through memory for their names


@dataclass(frozen=True)
class Opened:
    """What one kind of source holds, before it is split and limited; `eval` is None where it has one part only.

    `folder` is set where every picture is a file of its own below it.
    """

    train: Table
    eval: Table | None
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    folder: str | None = None


def features(classes: Sequence[str]) -> Features:
    """The two columns of every dataset: `image` as {'bytes', 'path'}, never decoded, and `label` as an integer."""
    return Features({"image": Image(decode=False), "label": ClassLabel(names=list(classes))})


def picture_dataset(
    paths: Sequence[str] | pa.StringArray, labels: Sequence[int] | Indices, classes: Sequence[str]
) -> Dataset:
    """A dataset in memory over picture files: `labels[i]` (an index into *classes*) belongs to `paths[i]`."""
    names = paths if isinstance(paths, pa.Array) else pa.array(paths, pa.string())
    images = pa.StructArray.from_arrays([pa.nulls(len(names), pa.binary()), names], ["bytes", "path"])
    table = pa.table({"image": images, "label": pa.array(labels, pa.int64())})
    return _in_memory(table, features(classes))


def take(dataset: Table, indices: Indices) -> Table:
    """The rows *indices* in that order; a table in memory is copied, which saves an index look-up at every access."""
    if isinstance(dataset, CachedRows):
        return dataset.taken(_taken(dataset.rows, indices), indices)
    return dataset.take(indices) if isinstance(dataset, StreamedRows) else _taken(dataset, indices)


def _taken(dataset: Dataset, indices: Indices) -> Dataset:
    if isinstance(dataset.data, InMemoryTable):
        return _in_memory(dataset.data.table.take(pa.array(indices)), dataset.features)
    return dataset.select(indices, keep_in_memory=True)


def encoded(dataset: Table) -> Dataset | StreamedRows:
    """The rows without the decoded pictures that may be kept of them."""
    return dataset.rows if isinstance(dataset, CachedRows) else dataset


def in_memory(dataset: Table, classes: Sequence[str]) -> Dataset | CachedRows:
    """Few streamed rows with their pictures, to be used again and again; another dataset as it is."""
    if not isinstance(dataset, StreamedRows):
        return dataset
    rows = [dataset[row] for row in range(len(dataset))]
    columns = {name: [row[name] for row in rows] for name in ("image", "label")}
    return _in_memory(pa.table(columns, schema=features(classes).arrow_schema), features(classes))


def label_array(dataset: Table) -> Indices:
    """The labels `(N,)` of a dataset with a `label` column, images untouched."""
    if not isinstance(dataset, Dataset):
        return dataset.labels.astype(np.int64)
    labels, chosen = dataset.data.column("label"), dataset._indices  # asking the dataset takes 20x the time
    return np.asarray((labels if chosen is None else labels.take(chosen.column(0))).to_numpy(), dtype=np.int64)


def spread(dataset: Table, count: int) -> Indices:
    """Up to *count* rows, ascending and evenly spaced; in streamed data in few places, since each costs a read."""
    if isinstance(dataset, StreamedRows):
        return dataset.spread(count)
    return np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(np.int64))


def names_of(dataset: Table, rows: Sequence[int] | Indices) -> list[str]:
    """The paths of the pictures in *rows* or, where they have none, ``row N``."""
    dataset = encoded(dataset)
    if isinstance(dataset, StreamedRows):
        paths = dataset.names(rows)
    else:
        paths, pictures = [], dataset.select_columns(["image"]).with_format("arrow")
        for first in range(0, len(rows), AT_ONCE):
            column = pictures[[int(row) for row in rows[first : first + AT_ONCE]]].column("image")
            paths += pc.struct_field(column, "path").to_pylist()
    return [path or f"row {row}" for path, row in zip(paths, rows, strict=True)]


def _in_memory(table: pa.Table, columns: Features) -> Dataset:
    rows, info = InMemoryTable(table.cast(columns.arrow_schema)), DatasetInfo(features=columns)
    # A digest of a million paths takes longer than to list them, and would only name the files of a cache.
    return Dataset(rows, info=info, fingerprint=generate_random_fingerprint())
