"""What W&B's offline files still hold of a run that was killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tuning.tracking.tracker_history import history, offline_records

SCRIPT = """
import os, signal, wandb
run = wandb.init(project="p", dir={folder!r}, id="abc", mode="offline")
for step in range(1, {steps} + 1):
    run.log({{"step": step, "train/loss": 0.5, **{{f"lr/layer{{n}}": 0.1 for n in range(20)}}}})
run.log({{"step": {steps}, "eval/top1": 0.5}})
{end}
"""

WHEN_WRITTEN = """
import glob, time
for _ in range(600):  # W&B's own process writes, when it comes to it
    if any(os.path.getsize(file) > 40_000 for file in glob.glob("wandb/offline-run-*/*.wandb")):
        break
    time.sleep(0.1)
"""


def segment(folder: Path, steps: int, end: str) -> None:
    script = SCRIPT.format(folder=str(folder), steps=steps, end=end)
    environment = {**os.environ, "WANDB_SILENT": "true"}
    subprocess.run([sys.executable, "-c", script], env=environment, cwd=folder, timeout=120, capture_output=True)


def test_a_finished_file_holds_everything(tmp_path: Path) -> None:
    segment(tmp_path, 5, "run.finish()")
    assert offline_records(tmp_path / "wandb", "abc") == {*((step, 0, 0) for step in range(1, 6)), (5, 1, 0)}
    assert offline_records(tmp_path / "wandb", "other") == set()


def test_a_killed_file_holds_the_beginning(tmp_path: Path) -> None:
    """W&B writes in blocks: the last records are lost, and they have to be handed over again."""
    segment(tmp_path, 400, WHEN_WRITTEN + "os.kill(os.getpid(), signal.SIGKILL)")
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    file.write_bytes(file.read_bytes()[:40_000])
    held = offline_records(tmp_path / "wandb", "abc")
    assert 10 < len(held) < 400
    assert held == {(step, 0, 0) for step in range(1, len(held) + 1)}


@pytest.mark.parametrize("step", [0, 7])
def test_other_trackers_have_what_came_before_the_checkpoint(tmp_path: Path, step: int) -> None:
    has = history(None, tmp_path, step)
    assert [has({"step": at, "train/loss": 0.1}) for at in (0, 6, 7)] == [at < step for at in (0, 6, 7)]
