"""Which of several processes failed first: the errors of all the others are echoes of its end.

When one process fails, all the others fail too, in the exchange that it no longer takes part in. A launcher calls the
earliest error the root cause, so an echo is held back until the launcher has seen the true one, and says what the signs
of life tell. Imports no torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tuning.safety import interrupts

ECHO_SECONDS = 10.0  # an echo waits so long to be ended by the launcher
ECHO_WORDS = (  # only of exchanges: loaders and trackers time out and lose connections too
    *("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe", "timed out waiting"),
    "pair closure",  # gloo, when the other side of a connection is not heard of any more
    *("process group watchdog", "monitoredbarrier"),
)
RESUME = "--resume auto --output FOLDER goes on from the last checkpoint."
NOTE = "another process failed, hangs or is cut off; its own messages say more"


class ProcessLost(RuntimeError):
    """Another process of the run failed, hangs or is cut off; the message names it."""


@contextmanager
def first_error() -> Iterator[None]:
    """Turn the echo of another process's failure into `ProcessLost`, and tell the others an error of our own.

    May be nested. On one process it does nothing.

    Raises:
        ProcessLost: names the process at fault, after a wait in which a launcher ends us if it knows already.
    """
    try:
        yield
    except ProcessLost:
        raise
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        from tuning.safety.heartbeat import current, one_line  # here: it would make `--help` slower

        if NOTE in getattr(error, "__notes__", ()):
            raise
        if not is_echo(error):
            if beating := current():
                beating.publish(error)
            raise
        cause = _known_cause()
        if cause is None:
            error.add_note(NOTE)
            raise
        raise ProcessLost(f"{cause}. This process broke off with {one_line(error)}. {RESUME}") from None


def is_echo(error: BaseException) -> bool:
    """Whether *error* says no more than that an exchange with other processes broke or took too long."""
    from torch.distributed import DistError

    worded = type(error) is RuntimeError and any(word in str(error).lower() for word in ECHO_WORDS)
    return worded or isinstance(error, DistError)


def _known_cause() -> str | None:
    """Wait to be ended, and then say which process is at fault; None if that is unknown."""
    from tuning.safety.heartbeat import current

    beating = current()
    before = beating.signs() if beating else None
    end, found = time.monotonic() + ECHO_SECONDS, None
    with suppress(KeyboardInterrupt):  # the launcher ends us: it knows the cause
        while time.monotonic() < end and not _asked_to_end():
            time.sleep(0.2)
            if beating and not found and (found := beating.first_error()):
                end = min(end, time.monotonic() + 2)  # the launcher compares whole seconds
    if beating is None or found or (found := beating.first_error()):
        return found
    if ended := beating.ended(before):
        return ended
    if _asked_to_end():
        return "another process failed first and the launcher ends the others; its closing lines name it"
    return beating.suspect(before)


def _asked_to_end() -> bool:
    return interrupts.wish() is not None
