"""Two hosts on one machine: network namespaces with names of their own, joined by one cable."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launched import LATEST_END, Launch, gone, summary

HOSTS = {"a": "10.99.7.1", "b": "10.99.7.2"}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _namespaces_work() -> bool:
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        return False
    try:
        ip("netns", "add", "tuning-probe")
        ip("netns", "delete", "tuning-probe")
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@pytest.fixture
def hosts() -> Iterator[None]:
    """Two network namespaces joined by one cable."""
    if not _namespaces_work():
        pytest.skip("needs root and network namespaces")
    with contextlib.ExitStack() as clean:
        for host in HOSTS:
            ip("netns", "add", f"tuning-{host}")
            clean.callback(ip, "netns", "delete", f"tuning-{host}")
        ip("link", "add", "veth-a", "netns", "tuning-a", "type", "veth", "peer", "veth-b", "netns", "tuning-b")
        for host, address in HOSTS.items():
            ip("-n", f"tuning-{host}", "address", "add", f"{address}/24", "dev", f"veth-{host}")
            for device in ("lo", f"veth-{host}"):
                ip("-n", f"tuning-{host}", "link", "set", device, "up")
        yield


def on_host(host: str, *command: str) -> list[str]:
    """*command* as a person types it on one of the hosts."""
    inside = ["ip", "netns", "exec", f"tuning-{host}", "unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', host]
    return [*inside, *command]


def lose_b(a: Launch, b: Launch, fault: str, run: Path) -> str:
    """Kill every process of host b, or cut the cable: all end in time, and *run* and host a, whose output this is, say
    who was lost."""
    of_b = b.family()
    assert len(of_b) > 1
    if fault == "cut":
        ip("-n", "tuning-a", "link", "set", "veth-a", "down")
    else:
        for process in of_b:
            process.kill()
    began = time.monotonic()
    said_by_a = a.wait()
    assert time.monotonic() - began < LATEST_END
    assert re.search(r"process 1 \(pid \d+ on b\) gave no sign of life for \d+ s", said_by_a), said_by_a
    assert "process 1 (pid" in summary(run)["error"]
    if fault == "cut":
        said_by_b = b.wait()
        assert time.monotonic() - began < LATEST_END
        assert f"process 0 on {HOSTS['a']} does not answer" in said_by_b
    assert gone(of_b, 5)
    return said_by_a
