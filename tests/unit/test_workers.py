"""Real loader processes, real signals."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import psutil
import pytest
from torch.utils.data import Dataset

from tuning.data.workers import WorkerDied, WorkerLoader

RUN_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Pids(Dataset[int]):
    """Every batch is the process id of the worker that made it, some time later."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def __getitems__(self, items: list[int]) -> int:
        time.sleep(self.seconds)
        return os.getpid()


class Failing(Pids):
    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.error = error

    def __getitems__(self, items: list[int]) -> int:
        if items == [2]:
            raise self.error("a bug of ours")
        return super().__getitems__(items)


def loader(dataset: Dataset[int], batches: int, workers: int = 2, *, keep: bool = False) -> WorkerLoader[int]:
    return WorkerLoader(dataset, [[n] for n in range(batches)], workers, keep=keep, pin=False)


def ended(pid: int, within: float) -> bool:
    until = time.monotonic() + within
    while time.monotonic() < until:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def start(function: Callable[..., None], *args: Any) -> tuple[Any, Connection]:
    """Run *function* in a forked process of its own group; what it sends comes through the connection."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_in_own_group, args=(function, there, *args))
    process.start()
    there.close()
    return process, here


def _in_own_group(function: Callable[..., None], pipe: Connection, *args: Any) -> None:
    os.setsid()
    function(pipe, *args)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_every_time(workers: int) -> None:
    numbers = WorkerLoader(Echo(), [[n] for n in range(6)], workers, keep=True, pin=False)
    assert [list(numbers) for _ in range(2)] == [list(range(6))] * 2


class Echo(Dataset[int]):
    def __getitems__(self, items: list[int]) -> int:
        return items[0]


def test_a_killed_worker_is_named_when_its_batch_is_due() -> None:
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader(Pids(0.05), 50, keep=True))
    os.kill(next(batches), signal.SIGKILL)
    time.sleep(0.3)  # torch's own handler would raise here, in the middle of whatever the run does
    assert signal.getsignal(signal.SIGCHLD) is before
    with pytest.raises(WorkerDied, match=r"killed by signal 9 \(SIGKILL\).*out of memory: lower --workers") as caught:
        list(batches)
    assert "1 of 2" in str(caught.value)


@pytest.mark.parametrize("error", [ValueError, RuntimeError, ConnectionError])
def test_an_error_of_a_worker_keeps_its_traceback(error: type[Exception]) -> None:
    with pytest.raises(error, match="a bug of ours") as caught:
        list(loader(Failing(error), 5))
    assert type(caught.value) is error
    assert "in __getitems__" in str(caught.value)


def test_workers_ignore_what_is_meant_for_the_run() -> None:
    process, pipe = start(_train_under_signals)
    for number in RUN_SIGNALS:
        assert pipe.poll(30)
        pipe.recv()
        os.killpg(process.pid, number)
    assert pipe.poll(30)
    batches, workers, heard = pipe.recv()
    process.join(10)
    assert process.exitcode == 0
    assert heard == [*RUN_SIGNALS]
    assert len(batches) == 40
    assert set(batches) == set(workers)


def _train_under_signals(pipe: Connection) -> None:
    heard: list[int] = []
    for number in RUN_SIGNALS:
        signal.signal(number, lambda number, _: heard.append(number))
    batches = []
    for place, pid in enumerate(loader(Pids(0.02), 40)):
        batches.append(pid)
        if place in (5, 10, 15):
            workers = [child.pid for child in psutil.Process().children()]
            pipe.send("now")
            until = time.monotonic() + 10
            while len(heard) < place // 5 and time.monotonic() < until:
                time.sleep(0.01)
    pipe.send((batches, workers, heard))


def test_signals_while_workers_start_wait_for_the_run() -> None:
    process, pipe = start(_start_under_signals)
    answered = pipe.poll(30)
    process.join(0 if not answered else 10)
    process.kill()
    assert answered
    assert pipe.recv() == (12, True)


def _start_under_signals(pipe: Connection) -> None:
    heard: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    context = multiprocessing.get_context("fork")
    shower = context.Process(target=_shower, args=(os.getpid(),))
    shower.start()
    made = sum(len(list(loader(Pids(), 4))) for _ in range(3))
    shower.kill()
    pipe.send((made, bool(heard)))


def _shower(group: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while os.getppid() == group:
        os.killpg(group, signal.SIGTERM)
        time.sleep(0.0005)


@pytest.mark.parametrize("cut_off", [False, True])
def test_workers_end_when_their_run_is_killed(cut_off: bool) -> None:
    """Also when the kill cuts off a message that they are reading, such as a micro-batch of streamed pictures."""
    process, pipe = start(_train_until_cut_off if cut_off else _train_until_killed)
    assert pipe.poll(30)
    workers = pipe.recv()
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    assert len(workers) == 2
    try:
        assert all(ended(pid, within=10) for pid in workers)
    finally:
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _train_until_killed(pipe: Connection) -> None:
    for place, _ in enumerate(loader(Pids(0.02), 10_000)):
        if place == 5:
            pipe.send([child.pid for child in psutil.Process().children()])


def _train_until_cut_off(pipe: Connection) -> None:
    whole = Connection._send  # type: ignore[attr-defined]

    def half(self: Connection, content: bytes) -> None:
        if len(content) < 100_000:
            whole(self, content)
            return
        whole(self, content[: len(content) // 2])
        time.sleep(1)  # until the workers wait for the rest
        pipe.send([child.pid for child in psutil.Process().children()])
        time.sleep(60)

    Connection._send = half  # type: ignore[attr-defined]
    batches = [[0], [0], [bytes(1_000_000)], [0]]
    list(WorkerLoader(Pids(), batches, 2, keep=False, pin=False))


def test_a_loader_ends_quickly_in_the_middle_of_an_epoch() -> None:
    numbers = loader(Pids(), 10_000, keep=True)
    batches = iter(numbers)
    pid = next(batches)
    started = time.monotonic()
    del batches, numbers
    assert ended(pid, within=1)
    assert time.monotonic() - started < 2


def test_torch_can_end_a_worker_that_hangs() -> None:
    batches = iter(loader(Pids(0.01), 10_000))
    pid = next(batches)
    worker = next(child for child in multiprocessing.active_children() if child.pid == pid)
    worker.terminate()
    worker.join(2)
    assert worker.exitcode == 0
