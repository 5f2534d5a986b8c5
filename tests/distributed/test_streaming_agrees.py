"""Streamed shards on one process or several: the same curve and the same weights, each process with its own shards."""

from __future__ import annotations

from pathlib import Path

import pytest
from parquet_files import write_shards
from ranks import run_ranks
from stage_runs import StageRun, largest_difference, run_stages

from tuning.data.streamed import Shards

MODEL = ("--model", "test_vit", "--weights", "none", "--image-size", "32", "--batch-size", "8")
STAGES = ("--freeze-epochs", "1", "--epochs", "2", "--lr-ratio", "0.2", "--augment", "light")
SMALL = ("--shuffle-gb", "2e-5")  # of 11 row groups 5 are held: 4 lanes


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 and 17 pictures: the last step of an epoch is short."""
    root = tmp_path_factory.mktemp("shards")
    return write_shards(root, {"train": [13, 20, 17], "val": [11, 6]}, row_group=5)


def run_and_note(*argv: str) -> tuple[StageRun, list[str]]:
    """The stages, and the row groups that this process read, in their order."""
    reads: list[str] = []
    real = Shards._column

    def noting(self: Shards, block: int, name: str) -> object:
        reads.append(self.name(block))
        return real(self, block, name)

    Shards._column = noting  # type: ignore[method-assign]
    try:
        return run_stages(*argv), reads
    finally:
        Shards._column = real  # type: ignore[method-assign]


MIXED = ("--micro-batch", "2", "--mixup", "0.4", "--cutmix", "1", "--optimizer", "sgd", "--lr", "0.05")


@pytest.mark.parametrize(
    ("worlds", "options"),
    [
        ((2,), ("--label-smoothing", "0.1")),
        pytest.param((4,), ("--class-weights", "balanced"), marks=pytest.mark.slow),
        pytest.param((2, 4), MIXED, marks=pytest.mark.slow),
    ],
    ids=["plain", "four", "mixed"],
)
def test_any_number_of_processes_gives_the_same_run(
    shards: Path, worlds: tuple[int, ...], options: tuple[str, ...]
) -> None:
    """Mixed pictures have the same partners: micro-batches of two hold the same pictures."""
    argv = ("--data", str(shards), "--streaming", *SMALL, *MODEL, *STAGES, *options)
    (alone,) = run_ranks(1, run_stages, *argv)
    assert len(alone.losses) == 21
    for world in worlds:
        runs = run_ranks(world, run_stages, *argv)
        assert len({tuple(run.losses) for run in runs}) == 1
        assert runs[0].losses == pytest.approx(alone.losses, abs=1e-5)
        assert all(run.metrics == runs[0].metrics for run in runs)
        assert [m["images"] for m in runs[0].metrics] == [m["images"] for m in alone.metrics] == [17, 17]
        for after_one, *after_several in zip(alone.states, *(run.states for run in runs), strict=True):
            assert all(largest_difference(after_several[0], other) == 0 for other in after_several)
            assert largest_difference(after_several[0], after_one) < 1e-5


@pytest.mark.slow
def test_streaming_is_another_order_of_the_same_images(shards: Path) -> None:
    argv = ("--data", str(shards), *MODEL, *STAGES)
    (cached,) = run_ranks(1, run_stages, *argv)
    (streamed,) = run_ranks(1, run_stages, *argv, "--streaming", *SMALL)
    assert streamed.losses != pytest.approx(cached.losses, abs=1e-3)
    assert streamed.metrics[0]["images"] == cached.metrics[0]["images"]
    assert largest_difference(streamed.states[0], cached.states[0]) == 0


def test_every_process_reads_its_own_shards(tmp_path: Path) -> None:
    """Of 32 row groups of 5, trained on once and judged on once, each process reads half (and one at the seam)."""
    root = write_shards(tmp_path / "x", {"train": [40] * 4, "val": [40] * 4}, row_group=5)
    size = 4 * 5 * 800 / 1e9
    argv = ("--data", str(root), "--streaming", "--shuffle-gb", str(size), *MODEL, "--freeze-epochs", "0")
    results = run_ranks(2, run_and_note, *argv, "--epochs", "1")
    reads = [set(reads) for _, reads in results]
    for split in ("train", "val"):
        mine, theirs = ({name for name in part if name.startswith(split)} for part in reads)
        assert len(mine | theirs) == 32
        assert len(mine & theirs) <= (1 if split == "train" else 0)
    for _, every in results:
        assert len(every) <= 16 + 1 + 16 + 4  # judged once; a row group in which two lanes meet is read twice
