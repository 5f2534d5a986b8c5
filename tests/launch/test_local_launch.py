"""`python -m launch local` really trains, on as many processes as it was told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pictures import write_classes

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
QUICK = "--model test_vit --weights none --image-size 32 --batch-size 8 --freeze-epochs 0 --workers 0 --tracker none"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_classes(tmp_path / "my photos" / "train", {"cat": 9, "dog": 8})
    write_classes(tmp_path / "my photos" / "val", {"cat": 3, "dog": 4})
    return tmp_path


def launch(folder: Path, options: str, *flags: str) -> subprocess.CompletedProcess[str]:
    recipe = [str(ROOT / "recipes" / "finetune.py"), "--data", "my photos", *QUICK.split(), "--output", "run", *flags]
    command = [sys.executable, "-m", "launch", "local", *options.split(), "--", *recipe]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def summary(folder: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / "run" / "summary.json").read_text())
    return content


@pytest.mark.slow
def test_two_processes(folder: Path) -> None:
    done = launch(folder, "--processes 2 --env SAID=yes", "--epochs", "1")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert (summary(folder)["status"], summary(folder)["world_size"]) == ("done", 2)


def test_dry_run_prints_what_would_run(folder: Path) -> None:
    """Running what it prints is running it."""
    done = launch(folder, "--processes 1 --dry-run", "--print-config")
    assert done.returncode == 0
    assert not (folder / "run").exists()
    again = subprocess.run(["bash", "-c", done.stdout], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "data: my photos\n" in again.stdout


@pytest.mark.slow
def test_one_process(folder: Path) -> None:
    done = launch(folder, "--processes 1", "--epochs", "1")
    assert done.returncode == 0, done.stderr
    assert (summary(folder)["status"], summary(folder)["world_size"]) == ("done", 1)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_time_limit_saves(folder: Path, processes: int) -> None:
    done = launch(folder, f"--processes {processes} --time 150s", "--epochs", "100000")
    assert done.returncode != 0
    assert summary(folder)["status"] == "preempted"
    assert str(summary(folder)["reason"]).startswith(("SIGTERM, after step ", "SIGTERM, in an evaluation"))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_restarts(folder: Path, processes: int) -> None:
    """One process, too, which accelerate alone would not restart; without --output, too."""
    crash = folder / "sitecustomize.py"
    crash.write_text(CRASH)
    done = launch(folder, f"--processes {processes} --restarts 1 --env PYTHONPATH={folder}:{ROOT}", "--epochs", "3")
    assert done.returncode == 0, done.stderr
    assert (folder / "crashed").exists()
    assert (summary(folder)["status"], summary(folder)["world_size"]) == ("done", processes)


# In the recipe's process of rank 0: end without a word as soon as a checkpoint is there, once.
CRASH = """
import os, sys, threading, time
from pathlib import Path

def crash():
    while not list(Path("run/checkpoints").glob("step-*/manifest.json")):
        time.sleep(0.01)
    Path("crashed").touch()
    os._exit(9)

if os.environ.get("RANK") == "0" and not Path("crashed").exists():
    threading.Thread(target=crash, daemon=True).start()
"""
