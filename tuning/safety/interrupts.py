"""SIGTERM, SIGINT and SIGUSR1: the run ends at once while nothing can be lost, and at a clean boundary otherwise.

Signals belong to the process, so this is the one module with state of its own.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from types import FrameType

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")
# One Ctrl-C arrives twice under a launcher: from the terminal and from the launcher, which passes it on.
SAME_CTRL_C_SECONDS = 1.0
BLOCKED_SECONDS = 5.0  # a main thread that has not taken note of a signal by then waits for another process


class StopRequested(KeyboardInterrupt):
    """The run ends because it was asked to; what it has is saved, or there was nothing to save yet."""


@dataclass
class _State:
    held: bool = False
    wish: str | None = None
    noted: bool = False  # a signal has reached the main thread
    first_ctrl_c: float | None = None
    watching: int | None = None  # process whose wake-ups are watched


_state = _State()


def listen() -> None:
    """Take over the three signals; to be called once, in the main thread, before anything else."""
    _state.held, _state.wish, _state.first_ctrl_c = False, None, None
    for name in NAMES:
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), _on_signal)
    if _state.watching != os.getpid():  # a fork has no threads
        _state.watching, _state.noted = os.getpid(), False
        _watch()


def _watch() -> None:
    """End a process that can't take note of a signal, because it waits in C for others that are gone.

    While nothing can be lost only. Loader processes that are forked later must not wake this one.
    """
    awake, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=_end_if_blocked, args=(awake, wake), name="signals", daemon=True).start()


def _end_if_blocked(awake: socket.socket, wake: socket.socket) -> None:
    numbers = {getattr(signal, name) for name in NAMES if hasattr(signal, name)}
    while True:
        if awake.recv(1)[0] not in numbers:
            continue
        time.sleep(BLOCKED_SECONDS)
        if not (_state.held or _state.noted):
            os._exit(75)


def wish() -> str | None:
    """Name of the signal that asked this process to stop, or None."""
    return _state.wish


def hold() -> None:
    """From now to the end of the process a signal is only remembered: who trains looks at `wish` at every boundary."""
    _state.held = True


def _on_signal(number: int, frame: FrameType | None) -> None:
    _state.noted = True
    name = signal.Signals(number).name
    if name == "SIGINT":
        _end_at_second_ctrl_c()
    if _state.held:
        if _state.wish is None:
            _say(f"{name}: stopping after this optimizer step and saving" + (_AGAIN if name == "SIGINT" else ""))
        _state.wish = _state.wish or name
        return
    _state.wish = name
    raise StopRequested(name)


_AGAIN = "; Ctrl-C again ends at once, without saving"


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{text}\n".encode())  # print is not reentrant


def _end_at_second_ctrl_c() -> None:
    now = time.monotonic()
    if _state.first_ctrl_c is None:
        _state.first_ctrl_c = now
    elif now - _state.first_ctrl_c > SAME_CTRL_C_SECONDS:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
