"""Runs with `--cache` through the real command line: the same as without, resumed, killed, refused."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from pictures import noise
from recipe_runs import Run

from tests.faults.attempts import Ranks, attempt
from tests.faults.comparison import differences, newest_complete

SMALL = ("--model", "test_vit", "--weights", "none", "--image-size", "32", "--batch-size", "8", "--tracker", "none")
STAGES = ("--freeze-epochs", "0", "--epochs", "2", "--drop-rate", "0.1", "--workers", "1")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that a cache makes smaller."""
    root = tmp_path_factory.mktemp("large") / "large"
    for number in range(32):
        path = root / ("train" if number < 24 else "val") / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(100, 80, number).save(path)
    return root


def losses(run: Path) -> list[float]:
    records: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record[key] for record in records for key in ("train/loss", "eval/loss") if key in record]


def test_a_cached_run_resumed_within_an_epoch_is_the_same_run(large: Path, finetune: Run, tmp_path: Path) -> None:
    """On disk, the second part with what the first has kept; as it was in memory, uninterrupted."""
    flags = ("--data", str(large), *SMALL, *STAGES)
    disk = ("--cache", "disk", "--cache-folder", str(tmp_path / "pictures"), "--output", "run")
    for argv in (
        (*flags, "--cache", "ram", "--output", "whole"),
        (*flags, *disk, "--max-steps", "4"),
        (*flags, *disk, "--resume", "auto"),
    ):
        done = finetune(*argv)
        assert done.returncode == 0, done.stderr
    assert "32 pictures in" in done.stdout
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "run")) == 8
    last = "checkpoints/step-00000006/model.safetensors"
    assert (tmp_path / "run" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()
    changed = finetune(*flags, "--output", "run", "--resume", "auto")
    assert changed.returncode == 2
    assert "--cache was 'disk', now 'none'" in changed.stderr


@pytest.mark.slow
def test_small_pictures_make_the_same_run(photos: Path, finetune: Run, tmp_path: Path) -> None:
    for kind in ("none", "ram"):
        done = finetune("--data", str(photos), *SMALL, *STAGES, "--cache", kind, "--output", kind)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "none") == losses(tmp_path / "ram")


@pytest.mark.slow
def test_a_killed_run_of_two_processes_goes_on_bit_by_bit(large: Path, tmp_path: Path) -> None:
    """Both processes and their workers, with SIGKILL, while the cache is being filled or read."""
    flags = ("--data", str(large), *SMALL, *STAGES, "--epochs", "4", "--save-every", "2", "--keep", "20")
    flags += ("--resume", "auto", "--output", "run", "--cache", "disk", "--cache-folder")
    whole = attempt(tmp_path / "whole", (*flags, str(tmp_path / "one")), processes=2)
    assert whole.codes == [0, 0], whole.stderr
    assert json.loads((tmp_path / "whole/run/summary.json").read_text())["world_size"] == 2

    def kill(ranks: Ranks) -> None:
        assert ranks.wait_for(lambda: (newest_complete(tmp_path / "cut/run") or 0) >= 2)
        for rank in (1, 0):
            ranks.send(rank, signal.SIGKILL)

    cut = attempt(tmp_path / "cut", (*flags, str(tmp_path / "two")), processes=2, strike=kill)
    assert -signal.SIGKILL in cut.codes
    again = attempt(tmp_path / "cut", (*flags, str(tmp_path / "two")), processes=2)
    assert again.codes == [0, 0], again.stderr
    assert differences(tmp_path / "cut/run", tmp_path / "whole/run") == []
    shutil.rmtree(tmp_path / "two")


def test_what_cannot_be_read_does_not_count_on_features_either(photos: Path, finetune: Run, tmp_path: Path) -> None:
    broken = shutil.copytree(photos, tmp_path / "broken")
    files = sorted(path for path in (broken / "val").rglob("*") if path.is_file())
    files[0].write_bytes(files[0].read_bytes()[:200])
    head = ("--data", str(broken), *SMALL, "--freeze-epochs", "1", "--epochs", "0", "--max-unreadable", "1")
    for output, more in (("live", ()), ("cached", ("--cache-features",))):
        done = finetune(*head, *more, "--output", output)
        assert done.returncode == 0, done.stderr
        records = [json.loads(line) for line in (tmp_path / output / "metrics.jsonl").read_text().splitlines()]
        assert {record["eval/images"] for record in records if "eval/images" in record} == {len(files) - 1}, output
