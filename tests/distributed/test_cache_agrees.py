"""Two processes of a machine share one cache, and train what one trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from pictures import noise
from ranks import run_ranks
from stage_runs import largest_difference, run_stages

from tuning import caching
from tuning.caching import with_cache
from tuning.data.cached import CachedRows
from tuning.data.sources import open_data
from tuning.errors import UserError
from tuning.flags import Flags
from tuning.flags.batch import BatchFlags

MODEL = ("--model", "test_vit", "--weights", "none", "--image-size", "32", "--batch-size", "8")
STAGES = ("--freeze-epochs", "1", "--epochs", "2", "--lr-ratio", "0.2")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 and 7 pictures that a cache makes smaller."""
    root = tmp_path_factory.mktemp("large")
    for number in range(28):
        path = root / ("train" if number < 21 else "val") / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(90 + number, 80, number).save(path)
    return root


@pytest.mark.parametrize("kind", ["ram", pytest.param("disk", marks=pytest.mark.slow)])
def test_two_processes_train_what_one_trains(large: Path, tmp_path: Path, kind: str) -> None:
    argv = ("--data", str(large), *MODEL, *STAGES, "--cache", kind)
    argv += ("--cache-folder", str(tmp_path)) if kind == "disk" else ()
    (alone,) = run_ranks(1, run_stages, *argv)
    runs = run_ranks(2, run_stages, *argv)
    assert runs[0].losses == runs[1].losses == pytest.approx(alone.losses, abs=1e-5)
    assert len(alone.losses) == 9
    assert largest_difference(runs[0].states[-1], runs[1].states[-1]) == 0
    assert largest_difference(runs[0].states[-1], alone.states[-1]) < 1e-5


def opened(large: Path, kind: str, folder: str | None, plan: Any, free: int | None = None) -> Any:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    nothing = dict.fromkeys(("image_column", "label_column", "train_split", "eval_split", "limit_train", "limit_eval"))
    data = open_data(str(large), **nothing, val_fraction=0.25, seed=0)  # type: ignore[arg-type]
    flags = Flags(batch=BatchFlags(cache=kind, cache_folder=folder))  # type: ignore[arg-type]
    if free is not None and accelerator.process_index == 0:
        caching.free_memory_of_machine = lambda: free  # type: ignore[assignment]
    info: Any = type("Info", (), {"interpolation": "bicubic", "crop_pct": 0.875})()
    return accelerator, with_cache(accelerator, flags, data, plan, info)


def shares(large: Path, kind: str, folder: str | None, plan: Any) -> tuple[int, bool]:
    """Even rows are decoded by rank 0, odd ones by rank 1; then each finds all. Bytes kept, and whether it did."""
    accelerator, data = opened(large, kind, folder, plan)
    assert isinstance(data.train, CachedRows)
    rows, store = range(len(data.train)), data.train.store
    mine = {row: data.train.picture(row).clone() for row in rows if row % 2 == accelerator.process_index}
    accelerator.wait_for_everyone()
    there = all(store.find(row, None) is not None for row in rows)
    same = all(bool((store.find(row, None) == picture.numpy()).all()) for row, picture in mine.items())
    used = store.bytes_used
    accelerator.wait_for_everyone()
    return used, there and same


def refused(large: Path, plan: Any) -> str:
    try:
        opened(large, "ram", None, plan, free=1000)
    except UserError as error:
        return str(error)
    return "not refused"


def plan_of_one() -> Any:
    from plain_stages import plain_stage

    from tuning.plan import StagePlan
    from tuning.sizes import BatchPlan

    return [StagePlan(plain_stage(augment="light"), BatchPlan(8, 8, 2), 32, (32,), 32, 3, 1.0, ())]


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_what_one_process_decodes_the_other_finds(large: Path, tmp_path: Path, kind: str) -> None:
    folder = str(tmp_path) if kind == "disk" else None
    (used, well), (also, too) = run_ranks(2, shares, large, kind, folder, plan_of_one())
    assert well
    assert too
    assert used == also > 21 * 36 * 36 * 3


def test_a_machine_without_room_is_refused_on_every_process(large: Path) -> None:
    """Only rank 0 looks; the other must not go on alone."""
    for told in run_ranks(2, refused, large, plan_of_one()):
        assert "--cache ram needs about" in told
