"""The one table every data source ends in: an encoded image and its label, in rows that are cheap to reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image
from datasets.table import InMemoryTable

from tuning.data.splits import Indices


@dataclass(frozen=True)
class Opened:
    """What one kind of source holds, before it is split and limited; `eval` is None where it has one part only.

    `folder` is set where every picture is a file of its own below it.
    """

    train: Dataset
    eval: Dataset | None
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    folder: str | None = None


def features(classes: Sequence[str]) -> Features:
    """The two columns of every dataset: `image` as {'bytes', 'path'}, never decoded, and `label` as an integer."""
    return Features({"image": Image(decode=False), "label": ClassLabel(names=list(classes))})


def picture_dataset(paths: Sequence[str], labels: Sequence[int] | Indices, classes: Sequence[str]) -> Dataset:
    """A dataset in memory over picture files: `labels[i]` (an index into *classes*) belongs to `paths[i]`."""
    images = pa.StructArray.from_arrays(
        [pa.nulls(len(paths), pa.binary()), pa.array(paths, pa.string())], ["bytes", "path"]
    )
    table = pa.table({"image": images, "label": pa.array(labels, pa.int64())})
    return _in_memory(table, features(classes))


def take(dataset: Dataset, indices: Indices) -> Dataset:
    """The rows *indices* in that order; a table in memory is copied, which saves an index look-up at every access."""
    if isinstance(dataset.data, InMemoryTable):
        return _in_memory(dataset.data.table.take(pa.array(indices)), dataset.features)
    return dataset.select(indices, keep_in_memory=True)


def label_array(dataset: Dataset) -> Indices:
    """The labels `(N,)` of a dataset with a `label` column, images untouched."""
    labels = dataset.select_columns(["label"]).with_format("arrow")[:].column("label")  # as numpy it takes 10x the time
    return np.asarray(labels.to_numpy(), dtype=np.int64)


def _in_memory(table: pa.Table, columns: Features) -> Dataset:
    return Dataset(InMemoryTable(table.cast(columns.arrow_schema)), info=DatasetInfo(features=columns))
