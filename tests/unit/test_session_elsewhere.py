"""`session` where the C library is another one, and what it keeps quiet."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tuning import session

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("system", "libc"), [("Linux", "glibc"), ("Linux", "musl"), ("Darwin", ""), ("Windows", "")])
def test_only_glibc_is_told_to_keep_memory(monkeypatch: pytest.MonkeyPatch, system: str, libc: str) -> None:
    opened: list[object] = []

    class Library:
        def __init__(self, name: object) -> None:
            opened.append(name)

        def mallopt(self, parameter: int, value: int) -> int:
            return 1

    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "libc_ver", lambda: (libc, "2.36"))
    monkeypatch.setattr(ctypes, "CDLL", Library)
    session.keep_freed_memory()
    assert opened == ([None] if libc == "glibc" else [])


def test_cores_are_counted_without_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert session.cpu_cores() == 6


@pytest.mark.parametrize(("channels", "said"), [(1, False), (16, True)])
def test_strides_that_are_the_same_memory_are_no_news(channels: int, said: bool) -> None:
    """torch says it of depthwise layers, on every process; of others it is a copy in every step."""
    warning = (
        "Grad strides do not match bucket view strides. This may indicate grad was not created according to the "
        f"gradient layout contract.\ngrad.sizes() = [1152, {channels}, 3, 3], strides() = [9, 1, 3, 1]\n"
    )
    code = f"import tuning.session, warnings; warnings.warn({warning!r}, UserWarning)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert ("Grad strides" in done.stderr) == said
