"""A trial as a process of its own: started, followed by its ``metrics.jsonl``, stopped. Imports no torch.

Linux and macOS only; `starting.refuse_to_start` says so before this is imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import platform
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tuning.cli.launcher import PR_SET_PDEATHSIG
from tuning.errors import UserError
from tuning.safety.interrupts import StopRequested
from tuning.tracking.run_folder import RunFolder
from tuning.tracking.summary import evaluations, is_done

LOG = "output.log"
LOOK_SECONDS, LOOK_SHARE = 1.0, 20  # a look at the metrics, and 20 times as long as it took until the next
ERROR = "error: "  # begins the message of a mistake of the user's: tuning.cli.command_line


@dataclass(frozen=True)
class Ended:
    """How one trial ended.

    Attributes:
        status: ``done``, ``pruned`` or ``failed``.
        value: of the metric, when it is done.
        reason: why it failed.
        mistake: the reason is something that the user must change.
    """

    status: str
    value: float | None
    seconds: float
    reason: str | None = None
    mistake: bool = False


class Launched:
    """A running trial, in a session of its own, so that Ctrl-C reaches it through us alone.

    Its output goes to ``output.log`` in its folder, which is locked as long as any of its processes lives. When we are
    killed, the kernel ends its launcher (Linux) and the run saves and stops, as `tuning.cli.launcher` has it.

    Args:
        folder: of the run.
        mercy: seconds from SIGTERM to SIGKILL.
    """

    def __init__(self, words: Sequence[str], folder: Path, environment: Mapping[str, str], mercy: float) -> None:
        self._folder, self._mercy, self._started = RunFolder(folder), mercy, time.time()
        folder.mkdir(parents=True, exist_ok=True)
        if not wait_until_free(folder, mercy):
            raise UserError(
                f"{folder}: processes of this trial still run; end them (the last lines of {LOG} say more)."
            )
        if not is_done(self._folder):
            self._folder.summary.unlink(missing_ok=True)  # of an earlier start
        with (folder / LOG).open("ab") as log:
            fcntl.flock(log, fcntl.LOCK_SH)  # type: ignore[attr-defined]  # of all who inherit the file
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                words,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_us if platform.system() == "Linux" else None,
            )

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, kind: type[BaseException] | None, *others: object) -> None:
        if kind is not None:
            self.stop()

    def values(self, whose: str, metric: str, deadline: float) -> Iterator[float]:
        """The metric at every evaluation as soon as it is written, until the process ends; NaN where it isn't finite.

        Args:
            deadline: `time.time()` at which `StopRequested` is raised.
        """
        seen, size, wait, running = 0, -1, LOOK_SECONDS, True
        while running:
            running = not self._ended_within(wait)
            if time.time() >= deadline:
                raise StopRequested("--stop-after")
            began, now = time.monotonic(), _size(self._folder.metrics)
            if now == size:
                continue
            size = now
            found = evaluations(self._folder.metrics, whose)[seen:]  # what a resumed run writes again is the same
            seen += len(found)
            wait = max(LOOK_SECONDS, LOOK_SHARE * (time.monotonic() - began))
            yield from (float("nan") if one.get(metric) is None else one[metric] for one in found)

    def _ended_within(self, seconds: float) -> bool:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self) -> None:
        """SIGTERM, upon which the run saves and stops; SIGKILL if that takes too long. Returns when all is over."""
        family = _family(self._process.pid)
        _signal_group(self._process.pid, signal.SIGTERM)
        self._ended_within(self._mercy)
        if not wait_until_free(self._folder.path, self._mercy):
            for process in family:
                if process.is_running():
                    process.kill()
            psutil.wait_procs(family[1:], timeout=5)  # the kernel takes a moment
        self._process.wait()

    def ended(self, metric: str, pruned: bool = False) -> Ended:
        """How the trial ended, by its ``summary.json``: the exit status is the launcher's.

        Args:
            metric: by which the run chose its weights.
            pruned: it was stopped because it was behind. One that was done by then is done.
        """
        code, summary = self._process.wait(), self._summary()
        seconds = round(time.time() - self._started, 1)
        if summary.get("status") == "done":
            value = (summary.get("best") or {}).get(metric)
            if value is None:
                return Ended("failed", None, seconds, f"no evaluation had a finite {metric}")
            return Ended("done", value, seconds)
        if pruned:
            return Ended("pruned", None, seconds)
        mistake = self._mistake()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        if summary.get("status") == "preempted":
            how = f"was stopped by {summary.get('reason')}"
        how = f"{how}; see {self._folder.path / LOG}"
        return Ended("failed", None, seconds, mistake or summary.get("error") or how, mistake is not None)

    def _summary(self) -> dict[str, Any]:
        try:
            content = json.loads(self._folder.summary.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _mistake(self) -> str | None:
        """The message of a mistake of the user's, from this start's part of the output; None when there is none."""
        with (self._folder.path / LOG).open("rb") as log:
            log.seek(self._log_start)
            lines = log.read().decode(errors="replace").splitlines()
        return next((line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)), None)


def wait_until_free(folder: Path, seconds: float) -> bool:
    """Wait for the last process of a trial in *folder*, *seconds* at most; whether it has ended."""
    end = time.monotonic() + seconds
    while _is_held(folder / LOG):
        if time.monotonic() >= end:
            return False
        time.sleep(0.2)
    return True


def _is_held(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[attr-defined]
    except BlockingIOError:
        return True
    except OSError:  # not there, or a file system without locks
        return False
    return False


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _signal_group(leader: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, number)  # type: ignore[attr-defined]


def _end_with_us() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
