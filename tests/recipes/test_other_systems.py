"""A run without what only Linux has, as on macOS, and without what only Unixes have, as on Windows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = ("--model", "test_vit", "--weights", "none", "--image-size", "32", "--batch-size", "8", "--tracker", "none")
STAGES = ("--freeze-epochs", "0", "--epochs", "1")


# Python's own spawning on a Unix needs what `elsewhere` takes away for Windows: no loader process there.
@pytest.mark.parametrize(("system", "workers"), [("Darwin", "1"), ("Windows", "0")])
def test_a_run_ends_well(photos: Path, tmp_path: Path, system: str, workers: str) -> None:
    flags = ("--data", str(photos), *TINY, *STAGES, "--workers", workers, "--output", "run")
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "elsewhere.py", *flags],
        cwd=tmp_path,
        env={**os.environ, "SYSTEM": system, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "done"
