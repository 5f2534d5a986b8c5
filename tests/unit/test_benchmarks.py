"""The parts of the speed benchmarks that compute something; no test asserts a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.benchmarks.__main__ import present
from tests.benchmarks.paired import Row, hardware_line, paired, ratio, table
from tests.benchmarks.photos import write_photos
from tests.benchmarks.steps import second_epoch


def test_jobs_take_turns_and_the_order_turns_around() -> None:
    ran: list[str] = []

    def job(name: str, seconds: float | None) -> float | None:
        ran.append(name)
        return seconds

    found = paired({"a": lambda: job("a", 2.0), "b": lambda: job("b", None)}, pairs=3)

    assert ran == ["a", "b", "b", "a", "a", "b"]
    assert found["a"] == [2.0, 2.0, 2.0]  # as returned
    assert len(found["b"]) == 3
    assert all(0 <= seconds < 1 for seconds in found["b"])  # wall time


def test_ratios_are_of_runs_of_the_same_round() -> None:
    times = {"a": [1.0, 4.0, 9.0], "b": [1.0, 2.0, 3.0]}  # the machine slowed down for both

    assert ratio(times, "a", "b") == (2.0, 1.0, 3.0)


def test_the_table_has_hardware_ratio_range_and_bar() -> None:
    shown = table("Steps", [Row("a against b", (2.0, 1.0, 3.0), ">= 1.9", "5 ms")])

    assert shown.startswith(f"Steps\n\n{hardware_line()}\n\n| measured |")
    assert "torch" in hardware_line()
    assert shown.endswith("| a against b | 2 | 1 to 3 | >= 1.9 | 5 ms |")


def test_the_second_epoch_is_taken_from_a_run_s_own_records(tmp_path: Path) -> None:
    """Windows of 2 and 1 steps an epoch, of 8 images: the first epoch is no part of it, nor is an evaluation."""
    speeds = {(2, 0.67): 1.0, (3, 1.0): 1.0, (5, 1.67): 4.0, (6, 2.0): 2.0}
    records = [{"step": s, "epoch": e, "train/loss": 1.0, "perf/images_per_second": v} for (s, e), v in speeds.items()]
    records += [{"step": 4, "epoch": 1.33, "train/loss": 1.0}, {"step": 6, "epoch": 2.0, "eval/top1": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    assert second_epoch(tmp_path / "metrics.jsonl", batch=8) == pytest.approx((2 * 8 / 4.0 + 8 / 2.0) / 3)


def test_photos_are_jpegs_of_classes_and_differ(tmp_path: Path) -> None:
    write_photos(tmp_path, train=3, val=1)
    files = sorted(tmp_path.glob("*/*/*.jpg"))

    assert [str(file.relative_to(tmp_path)) for file in files] == [
        *(f"train/class{number}/0000{number}.jpg" for number in range(3)),
        "val/class0/00000.jpg",
    ]
    assert {Image.open(file).size for file in files} == {(500, 375)}
    assert len({file.read_bytes() for file in files}) == 4
    assert all(50_000 < file.stat().st_size < 200_000 for file in files), "as long as photos"


def test_every_benchmark_says_in_one_line_what_it_compares() -> None:
    assert {"steps", "peers", "two_processes", "evaluation"} <= present().keys()
    assert all(text.endswith(".") for text in present().values())
