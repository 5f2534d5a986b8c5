"""Two hosts, joined by one cable, started by hand with `python -m launch local --nodes 2`."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

import pytest

from tests.launched import ROOT, Launch, flags, launched, summary
from tests.two_hosts import HOSTS, hosts, lose_b, on_host

__all__ = ["flags", "hosts"]  # fixtures

pytestmark = pytest.mark.slow


def start(stack: contextlib.ExitStack, folder: Path, recipe: list[str]) -> tuple[Launch, Launch]:
    """Both hosts, each in a folder of its own, with what they share below *folder*."""
    both = []
    for rank, host in enumerate(HOSTS):
        (folder / host).mkdir()
        place = ["--nodes", "2", "--processes", "1", "--machine-rank", str(rank), "--main-address", HOSTS["a"]]
        launch = [sys.executable, "-m", "launch", "local", *place, "--env", f"GLOO_SOCKET_IFNAME=veth-{host}"]
        command = on_host(host, "env", f"PYTHONPATH={ROOT}", *launch, "--", *recipe)
        both.append(stack.enter_context(launched(command, folder / host, host)))
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
        lose_b(a, b, fault, run)
