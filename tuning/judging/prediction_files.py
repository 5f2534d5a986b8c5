"""Predictions as CSV, JSON lines or parquet: written as they come, and visible under their name when complete."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

KINDS = ("csv", "jsonl", "parquet")
DIGITS = 7  # after the point, of probabilities: what float32 holds


def columns(top_k: int) -> tuple[str, ...]:
    """Names of the columns: ``id``, ``predicted``, ``probability``, ``predicted_2``, ... and ``error``."""
    pairs = [(f"predicted{end}", f"probability{end}") for end in ("", *(f"_{n}" for n in range(2, top_k + 1)))]
    return ("id", *(name for pair in pairs for name in pair), "error")


class PredictionFile:
    """One file of predictions, its kind by its ending. What it holds appears under *path* when the context ends well.

    Until then it is ``.NAME.partial`` beside it; an error takes that away.

    Args:
        path: ends in .csv, .jsonl or .parquet.
        names: of the columns, from `columns`.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self._path, self._names = path, tuple(names)
        self._partial = path.with_name(f".{path.name}.partial")
        self._kind = path.suffix.lower().removeprefix(".")
        kinds = {name: pa.float32() if name.startswith("probability") else pa.string() for name in names}
        self._schema = pa.schema(list(kinds.items()))

    def __enter__(self) -> PredictionFile:
        mode: dict[str, Any] = {"mode": "w", "encoding": "utf-8", "newline": ""}
        self._file: IO[Any] = self._partial.open(**({"mode": "wb"} if self._kind == "parquet" else mode))
        if self._kind == "parquet":
            self._table = pq.ParquetWriter(self._file, self._schema)
        elif self._kind == "csv":
            self._rows = csv.DictWriter(self._file, self._names)
            self._rows.writeheader()
        return self

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add rows: ``{column: value}``, None where there is nothing. A row group each, in parquet."""
        if self._kind == "parquet":
            self._table.write_table(pa.Table.from_pylist(list(records), self._schema))
            return
        plain = [{name: _rounded(value) for name, value in record.items()} for record in records]
        if self._kind == "csv":
            self._rows.writerows(plain)
        else:
            self._file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in plain)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._kind == "parquet":
                self._table.close()
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._partial.replace(self._path)
        finally:
            self._file.close()
            self._partial.unlink(missing_ok=True)  # gone already, where all went well


def _rounded(value: Any) -> Any:
    return round(value, DIGITS) if isinstance(value, float) else value
