"""One attempt at a run: the real recipe on one or two forked processes, and what strikes it on the way.

The processes are forked from one that has imported torch, so an attempt costs seconds. They are watched as torchrun
watches its own: when one ends with an error, the others get SIGTERM, and SIGKILL after `MERCY_SECONDS`. Or they are
left alone, and have to find out by themselves.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import psutil
from matplotlib.figure import Figure
from PIL import Image

from tests.faults.sabotage import import_everything
from tests.ports import free_port
from tests.recipe_runs import ROOT, finetune_here, forget_parent

LIMIT_SECONDS = 240  # of a whole attempt
MERCY_SECONDS = 30  # between SIGTERM and SIGKILL, as torchrun has it
ALONE_SECONDS = 100  # without a launcher: --timeout of the campaign and time to say what is wrong
PR_SET_CHILD_SUBREAPER = 36

Prepare = Callable[[int], Callable[[], None] | None]
Strike = Callable[["Ranks"], None]


@dataclass
class Ended:
    """How an attempt ended.

    Attributes:
        codes: exit status of every rank, the negative signal number where one ended it.
        texts: stdout and stderr of every rank.
        seconds: from the first fork to the last end.
        after_strike: seconds from the strike to the last end; None without a strike.
        hung: ranks that this harness had to kill.
    """

    codes: list[int]
    texts: list[tuple[str, str]]
    seconds: float
    after_strike: float | None
    hung: list[int]

    @property
    def stdout(self) -> str:
        """Of rank 0."""
        return self.texts[0][0]

    @property
    def stderr(self) -> str:
        """Of all ranks."""
        return "\n".join(err for _, err in self.texts)


@dataclass
class Ranks:
    """The running processes of an attempt."""

    processes: list[Any]
    started: float
    struck: float | None = None

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60) -> bool:
        """Wait until *condition* holds; False when a process has ended, or *seconds* have passed, before."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline or wait([p.sentinel for p in self.processes], timeout=0.01):
                return False
        return True

    def cpu_seconds(self, rank: int) -> float:
        """CPU time of the process so far, all its threads; unlike the clock it is the same on a busy machine."""
        try:
            times = psutil.Process(self.processes[rank].pid).cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return float(times.user + times.system)

    def listens(self, rank: int, number: int) -> bool:
        """Whether the process has a handler of its own for the signal (and not just Python's for Ctrl-C)."""
        try:
            status = Path(f"/proc/{self.processes[rank].pid}/status").read_text()
        except OSError:
            return False
        caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
        own = signal.SIGTERM if number == signal.SIGINT else number
        return bool(caught >> (own - 1) & 1)

    def send(self, rank: int, number: int) -> None:
        """Send a signal to one rank."""
        if self.processes[rank].exitcode is None:
            os.kill(self.processes[rank].pid, number)
            self.struck = self.struck or time.monotonic()


def attempt(
    folder: Path,
    flags: Sequence[str],
    *,
    processes: int = 1,
    prepare: Prepare | None = None,
    strike: Strike | None = None,
    environment: Mapping[str, str] | None = None,
    watched: bool = True,
) -> Ended:
    """`recipes/finetune.py` with *flags*, in *folder*.

    Args:
        prepare: called with the rank in every child first; what it returns is called when the recipe has ended.
        strike: called in this process once all have started.
        environment: variables of the children.
        watched: end the other ranks by SIGTERM when one has failed, as a launcher does.
    """
    import_everything()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # loader workers of a killed rank become ours, and are ended
    before = set(psutil.Process().children())
    context: Any = multiprocessing.get_context("fork")
    port = free_port()
    logs = [folder / f".rank-{rank}" for rank in range(processes)]
    children = []
    for rank, log in enumerate(logs):
        log.mkdir(parents=True, exist_ok=True)
        variables = {**(environment or {}), **_rank_variables(rank, processes, port)}
        children.append(context.Process(target=_child, args=(folder, log, tuple(flags), variables, rank, prepare)))
    ranks = Ranks(children, time.monotonic())
    for child in children:
        child.start()
    try:
        if strike is not None:
            strike(ranks)
        hung = _join(ranks, watched)
        now = time.monotonic()
    finally:
        _end_orphans(before)
    after = None if ranks.struck is None else now - ranks.struck
    texts = [((log / "stdout").read_text(), (log / "stderr").read_text()) for log in logs]
    return Ended([child.exitcode for child in children], texts, now - ranks.started, after, hung)


def _rank_variables(rank: int, processes: int, port: int) -> dict[str, str]:
    alone = {"ACCELERATE_USE_CPU": "true"}
    if processes == 1:
        return alone
    sizes = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {**alone, **sizes, **place}


def _child(
    folder: Path, log: Path, flags: tuple[str, ...], variables: dict[str, str], rank: int, prepare: Prepare | None
) -> None:
    os.chdir(folder)
    os.environ.update(variables)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)  # whatever the test runner had
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _write_output_to(log)
    sys.path.insert(0, str(ROOT / "recipes"))
    Figure.savefig = _tiny_picture  # pictures would take half the time
    forget_parent()
    code = 1
    try:
        at_end = prepare(rank) if prepare is not None else None
        code = finetune_here(*flags)
        if at_end is not None:
            at_end()
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _tiny_picture(figure: Figure, path: Path, **settings: Any) -> None:
    Image.new("L", (1, 1)).save(path)


def _write_output_to(log: Path) -> None:
    """Send both streams to files, line by line: what was said before a SIGKILL must be there."""
    out, err = ((log / name).open("w", buffering=1, encoding="utf-8") for name in ("stdout", "stderr"))
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.stdout, sys.stderr = out, err


def _join(ranks: Ranks, watched: bool) -> list[int]:
    """Wait for all to end; the ranks that had to be killed."""
    deadline, told, hung = ranks.started + LIMIT_SECONDS, False, list[int]()
    while running := [p for p in ranks.processes if p.exitcode is None]:
        ended = wait([p.sentinel for p in running], timeout=max(0.0, deadline - time.monotonic()))
        for child in running:
            if child.sentinel in ended:
                child.join()
        running = [p for p in ranks.processes if p.exitcode is None]
        if not ended:
            hung = [rank for rank, p in enumerate(ranks.processes) if p.exitcode is None]
            for child in running:
                child.kill()
                child.join()
        elif not told and any(p.exitcode for p in ranks.processes):
            told, deadline = True, time.monotonic() + (MERCY_SECONDS if watched else ALONE_SECONDS)
            for child in running if watched else ():
                child.terminate()
    return hung


def _end_orphans(before: set[psutil.Process]) -> None:
    """End loader workers and helpers that their killed parents left to us, and take in their ends."""
    left = [child for child in psutil.Process().children(recursive=True) if child not in before]
    for child in left:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=5)
