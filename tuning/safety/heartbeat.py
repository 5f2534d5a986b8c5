"""Signs of life that the processes of a run leave for one another in the launcher's store. Imports no torch."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

BEAT_SECONDS = 2.0
STORE_SECONDS = 5.0  # a store that takes longer to answer is out of reach
OWN_CODE = (Path(__file__).parents[1], Path(__file__).parents[2] / "recipes")

T = TypeVar("T")


@dataclass(frozen=True)
class Sign:
    """What a process last said of itself.

    Attributes:
        rank: its number among all processes.
        pid: its number on its host.
        host: name of the machine.
        beats: signs given so far; one that no longer grows is a process that is gone or frozen.
        time: seconds since the epoch, by the clock of its host.
        step: optimizer steps it has made.
        place: the line of our code that it is in.
    """

    rank: int
    pid: int
    host: str
    beats: int
    time: float
    step: int
    place: str

    @property
    def function(self) -> str:
        """The place without its line."""
        return self.place.partition(", line")[0]

    def __str__(self) -> str:
        return f"process {self.rank} (pid {self.pid} on {self.host})"


class Heartbeat:
    """Signs of life of this process, through a connection of its own to the launcher's store.

    Args:
        timeout: minutes that an exchange may take; with NCCL, which ends a process that waits longer without an
            error, the suspect is named shortly before.
        start: the same on every process, another one after a restart.
    """

    def __init__(self, timeout: float, start: str) -> None:
        from torch.distributed import TCPStore, get_backend  # type: ignore[attr-defined]

        self.step = 0
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._prefix = f"tuning/{start}"
        self._server, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        wait = timedelta(seconds=STORE_SECONDS)
        self._store = TCPStore(self._server, port, is_master=False, wait_for_workers=False, timeout=wait)
        self._main, self._beats, self._ended = threading.main_thread().ident or 0, 0, threading.Event()
        self._reachable = True
        self._warn_after = 0.8 * 60 * timeout if "nccl" in get_backend() else float("inf")
        self._beat()
        threading.Thread(target=self._live, name="heartbeat", daemon=True).start()

    def end(self) -> None:
        """Give no further sign."""
        self._ended.set()

    def publish(self, error: BaseException) -> None:
        """Leave *error* for the others to read; the first one stays."""
        told = json.dumps([self.rank, os.getpid(), socket.gethostname(), one_line(error)])
        self._ask(lambda: self._store.compare_set(f"{self._prefix}/error", "", told))

    def first_error(self) -> str | None:
        """What another process failed of, in words; None while no process has said so."""
        key = f"{self._prefix}/error"
        told = self._ask(lambda: self._store.get(key) if self._store.check([key]) else b"")
        if not told:
            return None
        rank, pid, host, text = json.loads(told)
        return None if rank == self.rank else f"process {rank} (pid {pid} on {host}) failed first, of {text}"

    def signs(self) -> list[Sign] | None:
        """The last signs of all processes, by rank; None when the store can't be reached."""
        keys = [f"{self._prefix}/{rank}" for rank in range(self.world_size)]
        found = self._ask(lambda: [self._store.get(key) for key in keys if self._store.check([key])])
        return None if found is None else [Sign(**json.loads(sign)) for sign in found]

    def _ask(self, function: Callable[[], T]) -> T | None:
        """What the store answers; None, now and from now on, when it fails to: connections do not heal."""
        answer = _within(STORE_SECONDS, function) if self._reachable else None
        self._reachable = answer is not None
        return answer

    def suspect(self, before: list[Sign] | None) -> str | None:
        """The process at fault, in words: gone, frozen or cut off, behind, or elsewhere; None when all look alike.

        Args:
            before: `signs` of at least two beats ago.
        """
        now = self.signs()
        if before is None or now is None:
            return f"process 0 on {self._server} does not answer: it ended, its host is down or the link to it is cut"
        if ended := self.ended(now):
            return ended
        beats = {sign.rank: sign.beats for sign in before}
        silent = [sign for sign in now if sign.rank != self.rank and sign.beats == beats.get(sign.rank)]
        if silent:
            ages = [(sign, max(0, round(time.time() - sign.time))) for sign in silent]
            return _joined(f"{sign} gave no sign of life for {age} s; it was at step {sign.step}" for sign, age in ages)
        last = max(sign.step for sign in now)
        behind = [sign for sign in now if sign.step < last]
        if behind:
            places = _joined(f"{sign} is still at step {sign.step}, in {sign.place}" for sign in behind)
            return f"{places}, while others have made step {last}"
        return self._elsewhere(before)

    def ended(self, signs: list[Sign] | None) -> str | None:
        """Processes of this host that are no more, in words; None while all are there."""
        import psutil

        here = [sign for sign in signs or [] if sign.host == socket.gethostname()]
        gone = [sign for sign in here if not psutil.pid_exists(sign.pid)]
        ends = _joined(f"{sign} ended without a word, after step {sign.step}" for sign in gone)
        return f"{ends}: killed, perhaps for its memory" if gone else None

    def _elsewhere(self, signs: list[Sign]) -> str | None:
        mine = next(sign for sign in signs if sign.rank == self.rank)
        usual = (mine.function, "tuning/safety/echoes.py")  # others may wait for their end here by now
        odd = [sign for sign in signs if sign.rank != self.rank and not sign.function.startswith(usual)]
        places = _joined(f"{sign} is in {sign.place}" for sign in odd)
        return f"{places}, while {mine} waits in {mine.place}, both after step {mine.step}" if odd else None

    def _live(self) -> None:
        seen, since, before = self.step, time.monotonic(), None
        with suppress(RuntimeError):  # without its store a run is near its end, which is said elsewhere
            while not self._ended.wait(BEAT_SECONDS):
                self._beat()
                if self.step != seen:
                    seen, since, before = self.step, time.monotonic(), None
                elif time.monotonic() - since > self._warn_after:
                    before, since = self._warn(before), time.monotonic() - self._warn_after + 3 * BEAT_SECONDS

    def _warn(self, before: list[Sign] | None) -> list[Sign] | None:
        if before is None:
            return self.signs()
        if suspect := self.suspect(before):
            print(f"process {self.rank} waits: {suspect}", file=sys.stderr, flush=True)
            self._warn_after = float("inf")
        return before

    def _beat(self) -> None:
        self._beats += 1
        own = (self.rank, os.getpid(), socket.gethostname())
        sign = Sign(*own, self._beats, time.time(), self.step, _place(self._main))
        self._store.set(f"{self._prefix}/{self.rank}", json.dumps(vars(sign)))


# Signs of life belong to the process, so this module has state of its own.
_heartbeat: Heartbeat | None = None


def start_heartbeat(timeout: float, start: str) -> None:
    """Give signs of life from now on, when there are several processes; arguments as for `Heartbeat`."""
    global _heartbeat
    stop_heartbeat()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_PORT" in os.environ:
        with suppress(RuntimeError):  # no store there: the run goes on without
            _heartbeat = Heartbeat(timeout, start)


def stop_heartbeat() -> None:
    """Give no further sign of life."""
    global _heartbeat
    if _heartbeat is not None:
        _heartbeat.end()
    _heartbeat = None


def current() -> Heartbeat | None:
    """Signs of this process; None on one process."""
    return _heartbeat


def beat(step: int) -> None:
    """Note that this process has made *step* optimizer steps; costs nothing."""
    if _heartbeat is not None:
        _heartbeat.step = step


def _within(seconds: float, function: Callable[[], T]) -> T | None:
    """The result of *function*; None if it fails or takes longer. A cut link makes reading the store endless."""
    results: list[T] = []

    def call() -> None:
        with suppress(RuntimeError):
            results.append(function())

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def _place(thread: int) -> str:
    """``tuning/engine.py: _update, line 90``, the innermost line of our own code in *thread*."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if any(folder in path.parents for folder in OWN_CODE):
            return f"{path.relative_to(OWN_CODE[0].parent).as_posix()}: {frame.f_code.co_name}, line {frame.f_lineno}"
        frame = frame.f_back
    return "code of others"


def _joined(parts: Iterator[str]) -> str:
    listed = list(parts)
    return "; ".join(listed[:4]) + (f"; and {len(listed) - 4} more" if len(listed) > 4 else "")


def one_line(error: BaseException) -> str:
    """Type and text of *error*, short enough for a closing line."""
    text = re.sub(r"^\[\S+\] ", "", " ".join(str(error).split()))  # the line of a C++ file
    return f"{type(error).__name__}: {text[:160]}"
