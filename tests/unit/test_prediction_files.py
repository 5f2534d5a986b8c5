"""Predictions on disk: the same rows in every kind of file, complete or absent."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tuning.cli.outputs import refuse_used_file, refuse_used_folder
from tuning.errors import UserError
from tuning.judging.prediction_files import KINDS, PredictionFile, columns

ROWS = [
    {"id": 'a, "b"\nc.png', "predicted": "Katze", "probability": 0.25, "error": None},
    {"id": "ü.png", "predicted": None, "probability": None, "error": "it is empty"},
]


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return [{k: v or None for k, v in row.items()} for row in csv.DictReader(file)]
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return pq.read_table(path).to_pylist()  # type: ignore[no-any-return]


def test_names_of_the_columns() -> None:
    assert columns(1) == ("id", "predicted", "probability", "error")
    assert columns(2) == ("id", "predicted", "probability", "predicted_2", "probability_2", "error")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_comes_back(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"out.{kind}"
    with PredictionFile(path, columns(1)) as file:
        for row in ROWS:
            file.write([row])
            assert [p.name for p in tmp_path.iterdir()] == [f".out.{kind}.partial"]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    found = [row | {"probability": row["probability"] and float(row["probability"])} for row in read(path)]
    assert found == ROWS
    if kind == "parquet":
        assert pq.ParquetFile(path).num_row_groups == 2


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_leaves_nothing(kind: str, tmp_path: Path) -> None:
    def stopped() -> None:
        with PredictionFile(tmp_path / f"out.{kind}", columns(1)) as file:
            file.write(ROWS)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "old.csv").touch()
    for name, words in (
        ("old.csv", r"old\.csv exists"),
        ("new.txt", r"must end in \.csv, \.jsonl, \.parquet"),
        ("no/new.csv", r"the folder .*/no does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            refuse_used_file(tmp_path / name, KINDS)
    refuse_used_file(tmp_path / "new.CSV", KINDS)


def test_folders_in_use_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="exists and is not empty"):
        refuse_used_folder(tmp_path)
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"is a file|can't be written"):
            refuse_used_folder(path)
    (tmp_path / "empty").mkdir()
    refuse_used_folder(tmp_path / "empty")
    refuse_used_folder(tmp_path / "new" / "below")
