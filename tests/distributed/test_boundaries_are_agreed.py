"""A wish of one process is an order for all, at the same boundary."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from accelerate import Accelerator
from ranks import run_ranks

from tuning.safety import interrupts, stopping
from tuning.safety.interrupts import StopRequested
from tuning.safety.stopping import Asked, Boundary


def boundaries(folder: Path, lag: int, asks: str, **options: float) -> list[Asked]:
    """Eight boundaries; *asks* happens on the last process, or in the folder, before the fourth."""
    interrupts.listen()
    interrupts.hold()
    stopping.STOP_FILE_EVERY_SECONDS = 0.0
    accelerator = Accelerator()
    boundary = Boundary(accelerator, folder, time.time(), lag=lag, **options)  # type: ignore[arg-type]
    asked = []
    for number in range(8):
        if number == 3 and accelerator.process_index == accelerator.num_processes - 1:
            ask(folder, asks)
        accelerator.wait_for_everyone()
        asked.append(boundary.agree())
    return asked


def ask(folder: Path, asks: str) -> None:
    if asks == "file":
        (folder / "STOP").touch()
    elif asks:
        os.kill(os.getpid(), getattr(signal, asks))


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize(
    ("asks", "reason"), [("SIGTERM", "SIGTERM"), ("SIGUSR1", "SIGUSR1"), ("file", "the file STOP"), ("", "")]
)
def test_all_processes_stop_at_the_same_boundary(tmp_path: Path, lag: int, asks: str, reason: str) -> None:
    first, second = run_ranks(2, boundaries, tmp_path, lag, asks)
    assert first == second
    stops = [asked.stop for asked in first]
    assert stops[: 3 + lag] == [""] * (3 + lag)
    assert stops[3 + lag] == reason
    assert not (tmp_path / "STOP").exists()


def test_one_process_needs_nobody(tmp_path: Path) -> None:
    (asked,) = run_ranks(1, boundaries, tmp_path, 0, "SIGINT")
    assert [a.stop for a in asked] == [""] * 3 + ["SIGINT"] * 5


def clocks(folder: Path) -> tuple[list[Asked], list[bool]]:
    stopping.SAVE_EVERY_SECONDS = 0.3
    accelerator = Accelerator()
    boundary = Boundary(accelerator, folder, time.time(), stop_after=1.5 / 60, save_every="auto")
    asked, saves = [], []
    for _ in range(20):
        time.sleep(0.1 + 0.05 * accelerator.process_index)  # clocks that differ
        asked.append(boundary.agree())
        saves.append(asked[-1].save)
        if asked[-1].save:
            boundary.saved()
    return asked, saves


def test_clocks_of_the_first_process_count(tmp_path: Path) -> None:
    first, second = run_ranks(2, clocks, tmp_path)
    assert first == second
    asked, saves = first
    assert 3 <= sum(saves) <= 12
    assert saves[0] is False
    assert asked[0].stop == ""
    assert asked[-1].stop == "--stop-after"


def watched(folder: Path) -> tuple[list[int], str]:
    interrupts.listen()
    interrupts.hold()
    accelerator = Accelerator()
    boundary, seen = Boundary(accelerator, folder, time.time()), []
    try:
        for batch in boundary.watch(range(6)):
            seen.append(batch)
            if batch == 2 and accelerator.process_index == 1:
                ask(folder, "SIGTERM")
            accelerator.wait_for_everyone()
    except StopRequested as stop:
        return seen, str(stop)
    return seen, ""


def test_an_evaluation_is_left_by_all_before_the_same_batch(tmp_path: Path) -> None:
    assert run_ranks(2, watched, tmp_path) == [([0, 1, 2], "SIGTERM, in an evaluation")] * 2
