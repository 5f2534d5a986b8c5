"""``predictions.parquet``: what a model said about every image, one row an image. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tuning.errors import UserError

ROWS_IN_A_GROUP = 16_384
_CLASSES = b"classes"


@dataclass(frozen=True)
class Kept:
    """The content of a file.

    Attributes:
        ids: names of the images, in the order of the data.
        labels, predicted: indices into *classes*, ``(N,)``.
        probabilities: ``(N, K)`` float32.
    """

    ids: tuple[str, ...]
    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    classes: tuple[str, ...]


def write(
    path: Path,
    ids: pa.Array,
    rows: NDArray[np.int64],
    labels: NDArray[np.int64],
    probabilities: NDArray[np.float32],
    classes: Sequence[str],
) -> None:
    """Write ``id``, ``row``, ``label`` and ``predicted`` (names), and ``probabilities`` in the order of *classes*.

    These are the columns of recipes/evaluate.py, too. The file is replaced as a whole.

    Args:
        rows: of the evaluation data, ``(N,)``.
    """
    names = pa.array(classes, pa.string())

    def named(indices: NDArray[np.int64]) -> pa.Array:
        return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), names).cast(pa.string())

    values = pa.FixedSizeListArray.from_arrays(pa.array(probabilities.reshape(-1)), len(classes))
    columns = {
        "id": ids,
        "row": pa.array(rows, pa.int64()),
        "label": named(labels),
        "predicted": named(probabilities.argmax(axis=1)),
        "probabilities": values,
    }
    about = {_CLASSES: json.dumps(list(classes)).encode(), b"temperature": b"1.0"}
    table = pa.table(columns).replace_schema_metadata(about)
    aside = path.with_name(f".{path.name}.partial")
    try:
        pq.write_table(table, aside, compression="zstd", row_group_size=ROWS_IN_A_GROUP)
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def read(path: Path) -> Kept:
    """Read what `write` has written.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}.")
    try:
        table = pq.read_table(path, memory_map=False)
        classes = tuple(json.loads(table.schema.metadata[_CLASSES]))
        place = {name: index for index, name in enumerate(classes)}
        labels, predicted = (
            np.array([place[name] for name in table[column].to_pylist()], np.int64) for column in ("label", "predicted")
        )
        values = table["probabilities"].combine_chunks().flatten().to_numpy().reshape(len(labels), len(classes))
        return Kept(tuple(table["id"].to_pylist()), labels, predicted, values, classes)
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} can't be read as predictions of a run ({type(error).__name__}: {error}).") from error
