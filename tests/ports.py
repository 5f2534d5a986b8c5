"""Ports for the processes of a test to meet at."""

from __future__ import annotations

import errno
import os
import random
import re
import socket
from collections.abc import Iterator
from itertools import cycle

LOWEST, EACH = 18_000, 1_000  # above those of the tests of Slurm
WORKERS = 14  # of pytest-xdist; ports end at 32000, below the 32768 from which Linux draws those of connections


def _ports() -> Iterator[int]:
    """All ports of this test process, over and over, from a random one on."""
    number = int(re.sub(r"\D", "", os.environ.get("PYTEST_XDIST_WORKER", "")) or 0)
    first, start = LOWEST + number % WORKERS * EACH, random.SystemRandom().randrange(EACH)
    return cycle(first + (start + step) % EACH for step in range(EACH))


_own = _ports()


def free_port() -> int:
    """A port that nothing uses, and that nothing takes before the processes listen there.

    A port drawn by the system (``bind`` to 0) is given to the next connection that asks for one; of these it has none
    to give away, and each process of pytest-xdist has its own.
    """
    while True:
        port = next(_own)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the store does: closed ones may linger
            try:
                probe.bind(("", port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
        return port
