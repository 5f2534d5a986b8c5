"""The file that processes share: what is found is whole, whoever writes and whatever is killed."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tuning.data.picture_store import RECORD_BYTES, Files, PictureStore

STAMP = (1, 2)


def picture(number: int, side: int = 20) -> np.ndarray:
    generator = np.random.default_rng(number)
    return generator.integers(0, 256, (side + number % 5, side, 3), dtype=np.uint8)


def files(folder: Path) -> Files:
    return Files(str(folder / "records"), str(folder / "pixels"))


def whole(store: PictureStore, number: int, side: int = 20) -> bool:
    found = store.find(number, STAMP)
    return found is not None and np.array_equal(found, picture(number, side))


def forked(function: Callable[..., None], *args: Any) -> Any:
    process: Any = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    return process


def test_what_was_added_is_found_and_nothing_else(tmp_path: Path) -> None:
    store = PictureStore(files(tmp_path), 10)
    for number in (7, 0, 3):
        store.add(number, STAMP, picture(number))
    for other in (store, PictureStore(files(tmp_path), 10), pickle.loads(pickle.dumps(store))):
        assert [number for number in range(10) if other.find(number, None) is not None] == [0, 3, 7]
        assert all(whole(other, number) for number in (0, 3, 7))
    found = store.find(3, STAMP)
    assert found is not None
    assert not found.flags.writeable


def test_a_file_that_changed_since_is_not_found_and_replaced(tmp_path: Path) -> None:
    store = PictureStore(files(tmp_path), 3)
    store.add(1, STAMP, picture(1))
    assert store.find(1, (1, 3)) is None
    store.add(1, (1, 3), picture(2))
    assert np.array_equal(store.find(1, (1, 3)), picture(2))  # type: ignore[arg-type]
    assert store.find(1, STAMP) is None


def test_a_picture_is_added_once(tmp_path: Path) -> None:
    first, second = (PictureStore(files(tmp_path), 3) for _ in range(2))
    for store in (first, second, first):
        store.add(2, STAMP, picture(2))
    assert first.bytes_used == picture(2).nbytes


@pytest.mark.parametrize("place", [0, 500, -1])
def test_damaged_pixels_are_not_taken_for_whole(tmp_path: Path, place: int) -> None:
    store = PictureStore(files(tmp_path), 3)
    store.add(1, STAMP, picture(1))
    content = bytearray(Path(store._files.pixels).read_bytes())
    content[place] ^= 1
    Path(store._files.pixels).write_bytes(content)
    store = PictureStore(files(tmp_path), 3)
    assert store.find(1, STAMP) is None
    store.add(1, STAMP, picture(1))
    assert whole(store, 1)


def test_pixels_that_never_reached_the_disk_are_not_taken_for_whole(tmp_path: Path) -> None:
    """A power cut may keep the record and lose the pixels: the file is short, or a hole of zeros."""
    for size in (0, 100, 10_000):
        store = PictureStore(files(tmp_path), 3)
        store.add(1, STAMP, picture(1))
        os.truncate(store._files.pixels, 0)
        os.truncate(store._files.pixels, size)
        store = PictureStore(files(tmp_path), 3)
        assert store.find(1, STAMP) is None
        store.add(1, STAMP, picture(1))
        assert whole(store, 1)


@pytest.mark.parametrize("byte", range(0, RECORD_BYTES, 5))
def test_a_half_written_record_is_no_record(tmp_path: Path, byte: int) -> None:
    store = PictureStore(files(tmp_path), 4)
    store.add(2, STAMP, picture(2))
    content = bytearray(Path(store._files.records).read_bytes())
    assert len(content) == 4 * RECORD_BYTES
    torn = content[:]
    torn[2 * RECORD_BYTES + byte : 3 * RECORD_BYTES] = bytes(RECORD_BYTES - byte)
    Path(store._files.records).write_bytes(torn)
    assert PictureStore(files(tmp_path), 4).find(2, STAMP) is None
    moved = bytes(RECORD_BYTES) + content[2 * RECORD_BYTES :]  # another picture's record is none either
    Path(store._files.records).write_bytes(moved.ljust(4 * RECORD_BYTES, b"\0"))
    assert all(PictureStore(files(tmp_path), 4).find(number, None) is None for number in range(4))


def test_a_full_disk_costs_the_cache_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    store, real, calls = PictureStore(files(tmp_path), 9), os.pwrite, [0]
    store.add(0, STAMP, picture(0))

    def full(descriptor: int, content: memoryview, offset: int) -> int:
        calls[0] += 1
        if calls[0] % 2 == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, content[:100], offset)

    monkeypatch.setattr(os, "pwrite", full)
    for number in (1, 2, 3):
        store.add(number, STAMP, picture(number))
    assert capfd.readouterr().err.count("No space left on device") == 1
    assert store.bytes_used == picture(0).nbytes
    assert whole(store, 0)
    assert store.find(1, STAMP) is None


def test_a_limit_is_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store = PictureStore(files(tmp_path), 9, most_bytes=3000)
    for number in range(9):
        store.add(number, STAMP, picture(number))
    assert store.bytes_used <= 3000
    assert [n for n in range(9) if store.find(n, STAMP) is not None] == [0, 1]
    assert capfd.readouterr().err.count("is reached") == 1


def build(folder: Path, numbers: range, side: int = 20) -> None:
    store = PictureStore(files(folder), 1000)
    for number in numbers:
        if store.find(number, STAMP) is None:
            store.add(number, STAMP, picture(number, side))
        assert whole(store, number, side)


def test_several_processes_build_one_store(tmp_path: Path) -> None:
    """All add the same pictures in the same order: each is there once, and what anyone finds is whole."""
    builders = [forked(build, tmp_path, range(300)) for _ in range(4)]
    for builder in builders:
        builder.join(60)
    assert [builder.exitcode for builder in builders] == [0] * 4
    store = PictureStore(files(tmp_path), 1000)
    assert all(whole(store, number) for number in range(300))
    assert store.bytes_used == sum(picture(number).nbytes for number in range(300))


def fill(store: PictureStore, first: int) -> None:
    for number in range(first, 1000, 3):
        store.add(number, STAMP, picture(number))


def test_forked_workers_share_what_their_process_opened(tmp_path: Path) -> None:
    """As loader workers do: one store, opened before the fork."""
    store = PictureStore(files(tmp_path), 1000)
    workers = [forked(fill, store, first) for first in range(3)]
    for worker in workers:
        worker.join(60)
    assert all(whole(store, number) for number in range(1000))


def test_killed_builders_leave_nothing_half(tmp_path: Path) -> None:
    """SIGKILL at any moment, to one of two that build: the other goes on, and everything that is found is whole."""
    side, rounds, lost = 120, 8, 0
    for attempt in range(rounds):
        victim = forked(build, tmp_path, range(attempt * 10, 1000), side)  # more than it has time for
        other = forked(build, tmp_path, range(60), side)
        time.sleep(0.005 * attempt)
        os.kill(victim.pid, signal.SIGKILL)
        for process in (victim, other):
            process.join(60)
        assert other.exitcode == 0
        lost += victim.exitcode == -signal.SIGKILL
        store = PictureStore(files(tmp_path), 1000)
        there = [number for number in range(1000) if store.find(number, None) is not None]
        assert all(whole(store, number, side) for number in there)
    assert lost > 0
    build(tmp_path, range(400), side)
