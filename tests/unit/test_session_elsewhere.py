"""`session` where the C library is another one."""

from __future__ import annotations

import ctypes
import os
import platform

import pytest

from tuning import session


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
