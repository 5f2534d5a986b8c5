"""``metrics.jsonl`` survives torn lines, full disks and resumed runs; the tracker gets every record once."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from tuning.tracking.records import RecordFile, keep_until, number, order, read_records

ODD_LINES = [
    b"\xff\xfe\x00garbage",
    b"[1, 2]",
    b"null",
    b'"step"',
    b"{}",
    b'{"step": null}',
    b'{"step": true}',
    b'{"step": "3"}',
    b'{"step": 3.5}',
    b'{"step": -1}',
    b'{"step": 1' + b"0" * 30 + b"}",
    b'{"step": ' + b"9" * 5000 + b"}",
    b"[" * 100_000,
    b'{"step": 4, "train/lo',
]


def training(step: int) -> dict[str, Any]:
    return {"step": step, "epoch": step / 4, "stage": 0, "train/loss": 1 / step}


def evaluation(step: int) -> dict[str, Any]:
    return {"step": step, "epoch": step / 4, "stage": 0, "eval/loss": 0.5, "eval/top1": 0.25}


def averaged(step: int) -> dict[str, Any]:
    return {"step": step, "epoch": step / 4, "stage": 0, "eval_ema/loss": 0.4}


def stage(step: int) -> dict[str, Any]:
    return {"step": step, "epoch": step / 4, "stage": 0, "stage/name": "all"}


def searched(step: int, number: int) -> dict[str, Any]:
    return {"step": step, "epoch": step / 4, "stage": 0, "lr_finder/number": number, "lr_finder/loss": 2.0}


RUN = [
    evaluation(0),
    searched(0, 1),
    searched(0, 2),
    stage(0),
    *map(training, (1, 2, 3, 4)),
    evaluation(4),
    averaged(4),
    *(searched(4, number) for number in range(1, 12)),
    stage(4),
    training(5),
    training(6),
]


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    write(path, RUN)
    return path


def write(path: Path, records: list[dict[str, Any]]) -> None:
    file = RecordFile(path)
    for record in records:
        file.append(record)
    file.close()


def test_records_come_back(metrics: Path) -> None:
    assert read_records(metrics) == RUN


def test_a_missing_or_unreadable_file_has_no_records(tmp_path: Path) -> None:
    assert read_records(tmp_path / "metrics.jsonl") == []
    assert read_records(tmp_path) == []


@pytest.mark.parametrize("line", ODD_LINES, ids=lambda line: repr(line[:20]))
def test_what_is_no_record_is_passed_over(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n' + line + b'\r\n\n{"step": 1, "train/loss": NaN, "x": -Infinity}\n' + line)
    assert read_records(path) == [{"step": 0}, {"step": 1, "train/loss": None, "x": None}]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, 1.0), (0.5, 0.5), (True, None), (None, None), ("1", None), ([1], None), (math.nan, None), (math.inf, None)],
)
def test_number(value: object, expected: float | None) -> None:
    assert number(value) == expected
    assert number(10**400) is None


def test_a_run_is_written_in_order() -> None:
    orders = [order(record) for record in RUN]
    assert orders == sorted(orders)
    assert len(set(orders)) == len(orders)


@pytest.mark.parametrize("step", range(8))
def test_a_run_that_goes_on_writes_the_rest_again(metrics: Path, step: int) -> None:
    keep_until(metrics, step)
    kept = read_records(metrics)
    assert kept == [r for r in RUN if r["step"] < step or (r["step"] == step > 0 and "train/loss" in r)]
    assert metrics.read_bytes() == b"".join(json.dumps(r).encode() + b"\n" for r in kept)


def test_cutting_drops_what_is_no_record(metrics: Path, tmp_path: Path) -> None:
    good = metrics.read_bytes()
    metrics.write_bytes(good + b"\n".join(ODD_LINES))
    keep_until(metrics, 9)
    assert metrics.read_bytes() == good
    keep_until(tmp_path / "none", 9)
    assert sorted(tmp_path.iterdir()) == [metrics]


def test_cutting_fails_whole(metrics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    before = metrics.read_bytes()
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        keep_until(metrics, 2)
    assert metrics.read_bytes() == before
    keep_until(metrics, 9)  # nothing to cut, nothing to write


def test_json_is_strict(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        RecordFile(tmp_path / "metrics.jsonl").append({"step": 1, "train/loss": math.nan})


class SmallDisk:
    """A path on a file system with room for so many bytes (-1: read-only, None: no limit), and the file there."""

    def __init__(self, path: Path, room: int | None) -> None:
        self.path, self.room, self.truncates = path, room, True

    def __str__(self) -> str:
        return str(self.path)

    def open(self, mode: str, buffering: int) -> SmallDisk:
        if self.room is not None and self.room < 0:
            raise OSError(30, "Read-only file system")
        self._file: Any = self.path.open(mode, buffering=buffering)
        return self

    def write(self, data: memoryview) -> int:
        if self.room is None:
            return int(self._file.write(data))
        if not self.room:
            raise OSError(28, "No space left on device")
        taken = min(self.room, len(data))
        self.room -= taken
        return int(self._file.write(data[:taken]))

    def truncate(self, size: int) -> None:
        if not self.truncates:
            raise OSError(5, "Input/output error")
        cut = self._file.seek(0, os.SEEK_END) - size
        self._file.truncate(size)
        self.room = None if self.room is None else self.room + cut

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("truncates", [True, False])
@pytest.mark.parametrize("room", [-1, 0, 1, 100, 400])
def test_a_full_disk_delays_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], room: int, truncates: bool
) -> None:
    path = tmp_path / "metrics.jsonl"
    disk = SmallDisk(path, room)
    file = RecordFile(disk)
    for record in RUN[:9]:
        file.append(record)
        disk.truncates = truncates
        on_disk = read_records(path)
        assert on_disk == RUN[: len(on_disk)]
    assert len(read_records(path)) < 9
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(path) in said
    assert ("No space left" in said) == (room >= 0)
    disk.room, disk.truncates = None, True
    file.append(RUN[9])
    assert read_records(path) == RUN[:10], "everything that waited is written first"
    disk.room = 5
    for record in RUN[10:]:
        file.append(record)
    disk.room = None
    file.close()
    assert read_records(path) == RUN
    assert path.read_bytes().count(b"\n") == len(RUN)
    assert capsys.readouterr().err == "", "said once"


def test_lost_records_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    file = RecordFile(SmallDisk(path, 100))
    for record in RUN:
        file.append(record)
    file.close()
    assert f"{len(RUN) - 1} records are missing from {path}" in capsys.readouterr().err
    assert read_records(path) == RUN[:1]


def test_a_real_full_device_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    file = RecordFile(Path("/dev/full"))
    file.append(RUN[0])
    file.sync()
    file.close()
    assert "can't be written" in capsys.readouterr().err


def test_a_file_is_appended_to(metrics: Path) -> None:
    write(metrics, [training(7)])
    assert read_records(metrics) == [*RUN, training(7)]
