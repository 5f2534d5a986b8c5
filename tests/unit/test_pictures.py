"""Micro-batches that several threads make together."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import write_classes

from tuning.data.images import decode
from tuning.data.loader import MOST_THREADS, threads_beside
from tuning.data.operations import Operations
from tuning.data.pictures import Batch, Pictures
from tuning.data.sampling import Item
from tuning.data.transforms import Crop

LIGHT = Crop(16, "bicubic", 1.0)


@pytest.fixture
def rows(tmp_path: Path) -> Any:
    """24 pictures, two of them broken, as a dataset has them."""
    write_classes(tmp_path, {"cat": 12, "dog": 12})
    files = sorted(str(path) for path in tmp_path.rglob("*.*"))
    assert len(files) == 24
    for broken in (3, 17):
        Path(files[broken]).write_bytes(b"no picture")
    return [{"image": {"bytes": None, "path": file}, "label": number % 2} for number, file in enumerate(files)]


def batch(rows: Any, threads: int, augment: Any = "light", crop: Crop = LIGHT, *, replace: bool = True) -> Batch:
    pictures = Pictures(rows, crop, augment, 5, replace_unreadable=replace, threads=threads)
    return pictures.__getitems__([Item(2, row, 1.0) for row in range(len(rows))])


@pytest.mark.parametrize("augment", ["light", "none"])
@pytest.mark.parametrize("replace", [True, False])
def test_threads_change_nothing(rows: Any, augment: str, replace: bool) -> None:
    alone = batch(rows, 1, augment, replace=replace)
    assert [broken.row for broken in alone.unreadable] == [3, 17]
    for threads in (2, 5):
        together = batch(rows, threads, augment, replace=replace)
        for name in ("images", "labels", "weights", "index", "draws"):
            assert torch.equal(getattr(together, name), getattr(alone, name)), name
        assert together.unreadable == alone.unreadable


def test_threads_work_in_inference_mode(rows: Any) -> None:
    with torch.inference_mode():
        inside = batch(rows, 3, "none")
    assert torch.equal(inside.images.clone(), batch(rows, 1, "none").images)


def test_several_threads_work(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    seen, both = set[str](), threading.Barrier(2, timeout=10)

    def watched(*args: Any, **more: Any) -> torch.Tensor:
        if threading.current_thread().name not in seen:
            seen.add(threading.current_thread().name)
            both.wait()  # the first picture of each of two threads, or it fails
        return decode(*args, **more)

    monkeypatch.setattr("tuning.data.pictures.decode", watched)
    batch(rows, 2)
    assert len(seen) == 2


def test_operations_draw_from_the_generator_of_the_process_and_keep_to_one_thread(rows: Any) -> None:
    crop = Crop(16, "bicubic", 1.0, Operations("strong", color=True, fill=(0, 0, 0)))
    before = torch.random.get_rng_state()
    assert torch.equal(batch(rows, 4, "strong", crop).images, batch(rows, 1, "strong", crop).images)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_forked_process_has_threads_of_its_own(rows: Any) -> None:
    here = batch(rows, 3).images
    context: Any = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    child = context.Process(target=lambda: writer.send_bytes(batch(rows, 3).images.numpy().tobytes()))
    child.start()
    assert reader.poll(30), "the child waits for threads that it doesn't have"
    assert reader.recv_bytes() == here.numpy().tobytes()
    child.join()


def test_as_many_threads_as_train_and_one_in_a_worker() -> None:
    assert threads_beside(workers=2) == 1
    assert threads_beside(workers=0) == min(MOST_THREADS, torch.get_num_threads())
