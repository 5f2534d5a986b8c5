"""Under `accelerate launch` or `torchrun`: end with the launcher, and go on by itself when it restarts the run.

Imports no torch.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from tuning.safety import interrupts

TOKEN = ".launcher"
LAUNCHERS = ("accelerate", "accelerate-launch", "torchrun", "accelerate.commands.launch", "torch.distributed.run")
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def restarts() -> int:
    """How often the launcher may start the run anew."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))


def restarted() -> bool:
    """Whether the launcher has started this process anew, after one of its own failed.

    After the failure of a process on another host this stays False; then the token tells.
    """
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def leave_token(run_folder: Path) -> None:
    """Mark the folder of a run as that of this launcher, for `first_start`. Rank 0 calls it."""
    if restarts():
        (run_folder / TOKEN).write_text(token() + "\n", encoding="utf-8")


def has_token(run_folder: Path) -> bool:
    """Whether this launcher started the run before."""
    path = run_folder / TOKEN
    return path.is_file() and path.read_text(encoding="utf-8").strip() == token()


def first_folder(runs: Path) -> Path | None:
    """The newest folder in *runs* that an earlier start by this launcher left its token in."""
    return max(filter(has_token, runs.glob("*")), key=lambda folder: folder.name, default=None)


def first_start(output: str | None, resume: str, runs: Path) -> tuple[str | None, str]:
    """--output and --resume as they are, or, after a restart, so that the run goes on where its first start was.

    Rank 0's answer counts for all processes.

    Args:
        runs: folder in which a run without --output makes its own.
    """
    if not restarts():
        return output, resume
    folder = Path(output) if output is not None else first_folder(runs)
    if folder is None and restarted() and resume not in ("never", "auto"):
        folder = Path(resume).resolve().parent.parent  # the run of that checkpoint
    if folder is None or not (restarted() or has_token(folder)):
        return output, resume
    return str(folder), "auto"


def token() -> str:
    """What tells this launcher from every other one: its host, its pid and when it was started."""
    import socket

    import psutil

    pid = os.getppid()
    return f"{socket.gethostname()} {pid} {psutil.Process(pid).create_time()}"


def ends_us_within(seconds: float) -> bool:
    """Wait until the launcher asks this process to end, *seconds* at most; whether it did."""
    end = time.monotonic() + seconds
    with suppress(KeyboardInterrupt):
        while time.monotonic() < end and interrupts.wish() is None:
            time.sleep(0.1)
    return interrupts.wish() is not None


def end_with_launcher() -> None:
    """Have the kernel send SIGTERM when the launcher is gone, so that the run saves and stops. Linux only.

    Started without a launcher, a run outlives the shell (`nohup`).
    """
    if sys.platform == "linux" and _has_launcher():
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _has_launcher() -> bool:
    """Environment variables alone prove nothing: they may have been exported in a shell."""
    try:
        started_by = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return False
    return any(Path(part).name in LAUNCHERS for part in started_by[:4])
