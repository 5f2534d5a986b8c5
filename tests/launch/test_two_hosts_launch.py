"""Two hosts, joined by one cable, started by hand with `python -m launch local --nodes 2`."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from pathlib import Path

import pytest
from faults import test_launcher_faults as faults
from faults.test_launcher_faults import HOSTS, LATEST_END, flags, gone, hosts, ip, launched, summary

__all__ = ["flags", "hosts"]  # fixtures

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def on_host(host: str, rank: int, recipe: list[str]) -> list[str]:
    """The command that a person types on one of the hosts."""
    inside = ["ip", "netns", "exec", f"tuning-{host}", "unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', host]
    place = ["--nodes", "2", "--processes", "1", "--machine-rank", str(rank), "--main-address", HOSTS["a"]]
    launch = [sys.executable, "-m", "launch", "local", *place, "--env", f"GLOO_SOCKET_IFNAME=veth-{host}"]
    return [*inside, "env", f"PYTHONPATH={ROOT}", *launch, "--", *recipe]


def start(stack: contextlib.ExitStack, folder: Path, recipe: list[str]) -> tuple[faults.Launch, faults.Launch]:
    """Both hosts, each in a folder of its own, with what they share below *folder*."""
    both = []
    for rank, host in enumerate(HOSTS):
        (folder / host).mkdir()
        both.append(stack.enter_context(launched(on_host(host, rank, recipe), folder / host, host)))
    return both[0], both[1]


def test_train(tmp_path: Path, flags: list[str], hosts: None) -> None:
    recipe = [str(ROOT / "recipes" / "finetune.py"), *flags, "--timeout", "2", "--output", str(tmp_path / "run")]
    with contextlib.ExitStack() as stack:
        a, b = start(stack, tmp_path, recipe)
        said = a.wait() + b.wait()
        assert (a.process.returncode, b.process.returncode) == (0, 0), said
    assert (summary(tmp_path / "run")["status"], summary(tmp_path / "run")["world_size"]) == ("done", 2)


@pytest.mark.parametrize("fault", ["killed", "cut"])
def test_a_lost_host_is_named(tmp_path: Path, flags: list[str], hosts: None, fault: str) -> None:
    run = tmp_path / "run"
    recipe = [str(ROOT / "recipes" / "finetune.py"), *flags, "--epochs", "2000", "--output", str(run)]
    with contextlib.ExitStack() as stack:
        a, b = start(stack, tmp_path, recipe)
        deadline = time.monotonic() + 120
        while not list(run.glob("checkpoints/step-*/manifest.json")):
            assert time.monotonic() < deadline, a.log.read_text() + b.log.read_text()
            time.sleep(0.2)
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
