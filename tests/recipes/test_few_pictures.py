"""A folder with fewer pictures than a batch has by default: the run chooses one that they fill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from pictures import write_classes
from ranks import run_ranks
from recipe_runs import finetune_here, run_forked

HOW = (
    *("--model", "test_efficientnet", "--weights", "none", "--image-size", "32", "--workers", "0"),
    *("--tracker", "none", "--freeze-epochs", "1", "--epochs", "1", "--output", "run"),
)
NOTE = "note: --batch-size 8: 3 optimizer steps an epoch of 24 training images."


def train(*flags: str) -> int:
    return finetune_here("--data", "photos", *HOW, *flags)


@pytest.fixture(autouse=True)
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path / "photos", {"cat": 16, "dog": 16})  # a quarter is held back
    return tmp_path


def batch_of(folder: Path) -> int:
    return int(yaml.safe_load((folder / "run" / "config.yaml").read_text())["batch_size"])


def test_it_trains_says_why_and_goes_on_with_the_same(few: Path) -> None:
    stopped = run_forked(few, "--data", "photos", *HOW, "--save-every", "1", "--stop-after", "0.0001")
    assert stopped.returncode == 75, stopped.stderr
    assert NOTE in " ".join(stopped.stdout.split())
    assert batch_of(few) == 8
    done = run_forked(few, "--data", "photos", *HOW, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    summary = json.loads((few / "run" / "summary.json").read_text())
    assert (summary["status"], summary["train_images"], summary["ended_early_at"]) == ("done", 24, None)
    again = run_forked(few, "--config", "run/config.yaml", "--output", "again")
    assert again.returncode == 0, again.stderr
    assert "note: --batch-size" not in again.stdout


def test_two_processes_share_it(few: Path) -> None:
    assert run_ranks(2, train) == [0, 0]
    assert batch_of(few) == 8
    assert json.loads((few / "run" / "summary.json").read_text())["world_size"] == 2


def test_a_batch_that_was_typed_is_refused(few: Path) -> None:
    refused = run_forked(few, "--data", "photos", *HOW, "--batch-size", "48")
    assert refused.returncode == 2
    assert "--batch-size 48 is larger than the training data (24 images)" in refused.stderr
