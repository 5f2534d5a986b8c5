"""Loader processes that outlive signals meant for the run, and whose death is told in one sentence."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

T = TypeVar("T")
LOOK_EVERY = 5.0  # seconds between a worker's looks at whether its training process lives

_REMEDIES = {
    "SIGKILL": "Usually the machine or the job ran out of memory: lower --workers, or ask for more memory.",
    "SIGBUS": "Usually /dev/shm is full (lower --workers, or enlarge it) or a data file was cut short while in use.",
    "SIGSEGV": "A library crashed while it decoded a picture; --workers 0 shows where.",
}


class WorkerDied(RuntimeError):
    """A loader process ended from outside; the message names the signal, the usual reason and the remedy."""


class WorkerLoader(Generic[T]):
    """A `DataLoader` whose workers ignore SIGINT, SIGTERM and SIGUSR1, so that the run can finish its step and save.

    Workers end with their training process, however that one ends. An error that a worker raises arrives as it is,
    with the worker's traceback.

    Args:
        dataset: makes a whole batch from what *batches* yields.
        workers: processes; 0 = none.
        keep: keep the workers between epochs.
        pin: hand the batches over in memory that copies to a GPU without waiting.
    """

    def __init__(self, dataset: Dataset[T], batches: Any, workers: int, *, keep: bool, pin: bool) -> None:
        self._loader = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=pin,
            worker_init_fn=ignore_signals,
            persistent_workers=keep and workers > 0,
        )
        self._workers: list[BaseProcess] = []

    def __iter__(self) -> Iterator[T]:
        before = set(multiprocessing.active_children())
        with _undisturbed():
            batches = iter(self._loader)
        started = [process for process in multiprocessing.active_children() if process not in before]
        self._workers = started or self._workers  # persistent workers are started once
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError):  # the latter two from a connection that broke
                self._name_the_dead()
                raise
            yield batch

    def _name_the_dead(self) -> None:
        wait([process.sentinel for process in self._workers], timeout=0.5)  # its connections break before it is gone
        dead = [process.exitcode for process in self._workers if process.exitcode is not None]
        if not dead:
            return
        code = min(dead)  # negative: killed by that signal
        if code < 0:
            name = _signal_name(-code)
            how = f"was killed by signal {-code} ({name})"
            remedy = _REMEDIES.get(name, "Something outside of this run sent it.")
        else:
            how, remedy = f"ended by itself with exit status {code}", "What it printed may tell why."
        raise WorkerDied(f"a loader worker {how}; {len(dead)} of {len(self._workers)} are gone. {remedy}") from None


def ignore_signals(_worker: int) -> None:
    """Make this worker deaf to what is meant for the run: Ctrl-C and a scheduler's signals reach the whole job.

    Only SIGTERM from its own training process ends it, as torch wants it when it shuts a loader down.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End when the training process asks for it, or is gone.

    Torch's own loop looks for that only between messages: the rest of a large one, cut off by a kill, it awaits for
    ever.
    """
    if sys.platform != "linux":
        return
    parent = multiprocessing.parent_process()
    while parent is not None:
        sent = signal.sigtimedwait({signal.SIGTERM}, LOOK_EVERY)
        if os.getppid() != parent.pid or (sent is not None and sent.si_pid == parent.pid):
            os._exit(0)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Start workers with the run's signals held back, and take away torch's handler for their deaths.

    Workers inherit what is held back, so there is no moment at which a signal could end one. Torch's handler would
    raise in whatever line the run is at, in the middle of an update; the loader notices a death by itself when it
    waits for the batch.
    """
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        yield
        return
    on_death = signal.getsignal(signal.SIGCHLD)
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, on_death)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


def _as_is(batch: Any) -> Any:
    return batch
