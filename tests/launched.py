"""Real launchers as processes of their own, a short run for them, and nothing of them left behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.pictures import write_classes

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TIMEOUT_MINUTES = 0.2
# The echo waits 10 s, the launcher gives a process 30 s to end, and two busy cores take their time to end Python.
LATEST_END = 60 * TIMEOUT_MINUTES + 10 + 30 + 30
ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
LAUNCH_SECONDS = 300  # a launch takes 15-30 s on free cores


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of 14 optimizer steps."""
    photos = tmp_path_factory.mktemp("photos")
    write_classes(photos / "train", {"cat": 15, "dog": 12, "emu": 10})
    write_classes(photos / "val", {"cat": 5, "dog": 4, "emu": 2})
    tiny = ["--model", "test_vit", "--weights", "none", "--image-size", "32", "--batch-size", "8"]
    quick = ["--freeze-epochs", "0", "--epochs", "3", "--workers", "0", "--tracker", "none", "--save-every", "2"]
    return ["--data", str(photos), *tiny, *quick, "--threads", "1", "--timeout", str(TIMEOUT_MINUTES)]


class Launch:
    """A launcher, its output in a file, and everything it started."""

    def __init__(self, command: list[str], folder: Path, name: str = "launch") -> None:
        self.log = folder / f"{name}.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=log, stderr=log)

    def wait_for(self, words: str) -> str:
        """The output, as soon as *words*, a regular expression, are in it."""
        end = time.monotonic() + LAUNCH_SECONDS
        while time.monotonic() < end:
            if re.search(words, text := self.log.read_text()) or self.process.poll() is not None:
                break
            time.sleep(0.2)
        assert re.search(words, text), text[-6000:]
        return text

    def wait(self) -> str:
        """The whole output, when the launcher has ended."""
        self.process.wait(LAUNCH_SECONDS)
        return self.log.read_text()

    def family(self) -> list[psutil.Process]:
        """The launcher and everything below it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self.process.pid)
            return [launcher, *launcher.children(recursive=True)]
        return []


@contextlib.contextmanager
def launched(command: list[str], folder: Path, name: str = "launch") -> Iterator[Launch]:
    """Start *command* and leave nothing of it behind."""
    launch = Launch(command, folder, name)
    seen: list[psutil.Process] = []
    try:
        yield launch
        seen = launch.family()
    finally:
        for process in launch.family() or seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        launch.process.wait()


def gone(processes: list[psutil.Process], seconds: float) -> bool:
    """Whether all have ended within *seconds*; a zombie, which nobody reaps in a container, has."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
            return True
        time.sleep(0.2)
    return False


def summary(folder: Path) -> dict[str, str]:
    content: dict[str, str] = json.loads((folder / "summary.json").read_text())
    return content
