"""Runs on streamed shards through the real command lines: repeat, resume, faults, the LR finder, what comes after."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from parquet_files import write_shards
from ranks import run_ranks
from recipe_runs import Finished, Run, finetune_here, import_after, recipe_here, run_forked

from tests.faults.attempts import Ranks, attempt
from tests.faults.comparison import differences, newest_complete
from tuning.data.streamed import Shards

SMALL = ("--model", "test_vit", "--weights", "none", "--image-size", "32", "--batch-size", "8", "--tracker", "none")
STREAM = ("--streaming", "--shuffle-gb", "2e-5")  # 5 of 11 row groups
STAGES = ("--freeze-epochs", "1", "--epochs", "2", "--drop-rate", "0.1", "--workers", "1")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 training and 17 evaluation pictures."""
    root = tmp_path_factory.mktemp("streamed") / "shards"
    return write_shards(root, {"train": [13, 20, 17], "val": [11, 6]}, row_group=5, strength=150)


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never interrupted."""
    home = tmp_path_factory.mktemp("home")
    done = run_forked(home, "--data", str(shards), *STREAM, *SMALL, *STAGES, "--output", "run")
    assert done.returncode == 0, done.stderr
    assert "Streaming 3 shards from where they lie: 11 row groups" in done.stdout.replace("\n", " ")
    return home / "run"


def test_a_resumed_run_is_the_same_run(finished: Path, shards: Path, finetune: Run, tmp_path: Path) -> None:
    """Stopped inside an epoch of the second stage; bit by bit, predictions and model included."""
    flags = ("--data", str(shards), *STREAM, *SMALL, *STAGES, "--output", "run")
    first = finetune(*flags, "--max-steps", "10")
    assert first.returncode == 0, first.stderr
    second = finetune(*flags, "--resume", "auto")
    assert second.returncode == 0, second.stderr
    assert "step 10," in second.stdout
    again = [line for line in records(tmp_path / "run") if "train/loss" in line]
    assert again == [line for line in records(finished) if "train/loss" in line]
    last = "checkpoints/step-00000021/model.safetensors"
    assert (tmp_path / "run" / last).read_bytes() == (finished / last).read_bytes()
    for name in ("--shuffle-gb", "1"), ("--no-streaming",):
        changed = finetune(*flags, "--resume", "auto", *name)
        assert changed.returncode == 2
        assert name[0].replace("no-", "") in changed.stderr


def records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


@pytest.mark.slow
def test_changed_or_vanished_shards_end_a_run_in_one_sentence(
    shards: Path, finetune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy")
    flags = ("--data", str(copy), *STREAM, *SMALL, *STAGES, "--save-every", "2", "--output", "run")
    reads, real = [0], Shards._column

    def vanishing(self: Shards, block: int, name: str) -> Any:
        reads[0] += 1
        if reads[0] == 40:  # in the last stage
            (copy / "train-00001.parquet").rename(copy / "aside")
        return real(self, block, name)

    monkeypatch.setattr(Shards, "_column", vanishing)
    done = finetune(*flags)
    assert done.returncode == 2, done.stderr
    assert "train-00001.parquet can't be read as it was when the data was opened: it is not there" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "failed"

    monkeypatch.setattr(Shards, "_column", real)
    (copy / "aside").rename(copy / "train-00001.parquet")
    (copy / "train-00000.parquet").unlink()
    gone = finetune(*flags, "--resume", "auto")
    assert gone.returncode == 2
    assert "the data is not what this run was started on: 3 row groups are gone (train-00000.parquet" in gone.stderr
    shutil.copy(shards / "train-00000.parquet", copy)
    again = finetune(*flags, "--resume", "auto")
    assert again.returncode == 0, again.stderr


def test_flags_without_effect_are_refused(photos: Path, finetune: Run) -> None:
    for flags, message in (
        (("--data", str(photos), "--streaming"), "holds no parquet shards"),
        (("--streaming",), "--data demo is pictures in files"),
        (("--data", str(photos), "--shuffle-gb", "1"), "--shuffle-gb 1 has no effect without --streaming"),
        (("--data", str(photos), "--streaming", "--shuffle-gb", "0"), "--shuffle-gb is 0.0; give 10^9 bytes above 0"),
    ):
        done = finetune(*flags, *SMALL, "--output", "run")
        assert done.returncode == 2
        assert message in done.stderr.replace("\n", " "), done.stderr


def recipe(folder: Path, name: str, *flags: str) -> Finished:
    import_after()
    return run_ranks(1, recipe_here, folder, name, *flags)[0]  # type: ignore[no-any-return]


@pytest.mark.slow
def test_the_finder_sweeps_streamed_shards(shards: Path, tmp_path: Path) -> None:
    flags = ("--data", str(shards), *STREAM, *SMALL, "--finder-steps", "15", "--finder-sweeps", "2")
    done = recipe(tmp_path, "find_lr", *flags, "--finder-race", "10", "--workers", "0", "--output", "lr")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "lr/summary.json").read_text())
    assert summary["status"] == "done"
    written = [r for r in records(tmp_path / "lr") if "lr_finder/loss" in r]
    assert len(written) > 20


@pytest.mark.slow
def test_recipes_after_a_run_take_its_streaming_over(finished: Path, shards: Path, tmp_path: Path) -> None:
    done = recipe(tmp_path, "evaluate", "--run", str(finished), "--output", "judged")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "judged/metrics.json").read_text())
    assert (metrics["images"], metrics["own_data"]) == (17, True)
    best = json.loads((finished / "summary.json").read_text())["best"]
    assert metrics["top1"] == pytest.approx(best["top1"])
    cached = recipe(tmp_path, "evaluate", "--run", str(finished), "--no-streaming", "--output", "cached")
    assert cached.returncode == 0, cached.stderr
    again = json.loads((tmp_path / "cached/metrics.json").read_text())
    assert again["per_class"] == metrics["per_class"]


@pytest.mark.slow
def test_one_small_batch_of_streamed_pictures_is_learned(shards: Path, tmp_path: Path) -> None:
    done = recipe(tmp_path, "overfit", "--data", str(shards), *STREAM, *SMALL, "--workers", "0", "--output", "small")
    assert done.returncode in (0, 1), done.stderr
    assert "16 pictures of shards" in done.stdout.replace("\n", " ")


@pytest.mark.slow
def test_preflight_reads_every_streamed_picture(shards: Path, tmp_path: Path) -> None:
    flags = ("--data", str(shards), *STREAM, *SMALL, "--workers", "0", "--output", "check", "--decode")
    done = recipe(tmp_path, "check", *flags)
    assert done.returncode in (0, 1), done.stderr
    assert "Traceback" not in done.stderr
    facts = json.loads((tmp_path / "check/check.json").read_text())
    assert facts["pictures"] == {"train": 50, "eval": 17}
    assert facts["readable"] == 67
    assert (tmp_path / "check/findings.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("--lr", "auto", "--finder-steps", "10", "--finder-race", "10", "--finder-share", "1"),
        ("--freeze-epochs", "5", "--cache-features"),
        ("--head-init", "fitted", "--limit-train", "30"),
    ],
    ids=["lr auto", "cached features", "fitted head"],
)
def test_what_looks_at_all_pictures_works(shards: Path, finetune: Run, tmp_path: Path, more: tuple[str, ...]) -> None:
    done = finetune("--data", str(shards), *STREAM, *SMALL, "--epochs", "1", "--workers", "1", *more, "--output", "run")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "done"


@pytest.mark.slow
def test_a_killed_run_of_two_processes_goes_on_bit_by_bit(shards: Path, tmp_path: Path) -> None:
    flags = ("--data", str(shards), *STREAM, *SMALL, *STAGES, "--save-every", "3", "--keep", "20")
    flags += ("--resume", "auto", "--output", "run")
    whole = attempt(tmp_path / "whole", flags, processes=2)
    assert whole.codes == [0, 0], whole.stderr
    assert json.loads((tmp_path / "whole/run/summary.json").read_text())["world_size"] == 2

    def kill(ranks: Ranks) -> None:
        assert ranks.wait_for(lambda: (newest_complete(tmp_path / "cut/run") or 0) >= 9)
        for rank in (1, 0):
            ranks.send(rank, signal.SIGKILL)

    cut = attempt(tmp_path / "cut", flags, processes=2, strike=kill)
    assert -signal.SIGKILL in cut.codes
    again = attempt(tmp_path / "cut", flags, processes=2)
    assert again.codes == [0, 0], again.stderr
    assert differences(tmp_path / "cut/run", tmp_path / "whole/run") == []


@pytest.mark.slow
def test_two_processes_train_through_the_recipe(shards: Path, finished: Path, tmp_path: Path) -> None:
    flags = ("--data", str(shards), *STREAM, *SMALL, *STAGES, "--drop-rate", "0", "--output")
    assert run_ranks(2, finetune_here, *flags, str(tmp_path / "two")) == [0, 0]
    assert run_ranks(1, finetune_here, *flags, str(tmp_path / "one")) == [0]
    one, two = (records(tmp_path / name) for name in ("one", "two"))
    assert json.loads((tmp_path / "two/summary.json").read_text())["world_size"] == 2
    for key in ("train/loss", "eval/loss"):
        mine, theirs = ([line[key] for line in lines if key in line] for lines in (two, one))
        assert mine == pytest.approx(theirs, abs=1e-4)
        assert len(mine) == (21 if key == "train/loss" else 3)
