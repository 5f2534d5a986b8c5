"""`--cache`: which pixels come of it, what is refused, what is found again and what is left behind."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from pictures import noise
from plain_stages import plain_stage

from tuning import caching
from tuning.caching import reductions, with_cache
from tuning.cli.command_line import parse_command
from tuning.data import fingerprint
from tuning.data.broken import Unreadable
from tuning.data.cached import CachedRows
from tuning.data.loader import EvalFeed, TrainFeed
from tuning.data.sampling import EvalOrder, TrainOrder
from tuning.data.sources import Data, open_data
from tuning.data.tables import label_array, names_of, take
from tuning.data.transforms import Crop, Normalise
from tuning.errors import UserError
from tuning.flags import Flags
from tuning.flags.batch import BatchFlags
from tuning.models.build import ModelInfo
from tuning.plan import StagePlan
from tuning.sizes import BatchPlan

SIZE, CPU = 32, torch.device("cpu")
INFO: Any = type("Info", (), {"interpolation": "bicubic", "crop_pct": 0.875})()
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def planned(size: int = SIZE, augment: str = "light", eval_size: int | None = None, **changes: Any) -> StagePlan:
    stage, batch = plain_stage(augment=augment, **changes), BatchPlan(8, 8, 1)
    return StagePlan(stage, batch, size, (size,), eval_size or size, 3, 1.0, ())


def write(root: Path, width: int, height: int, train: int = 20, val: int = 6) -> Path:
    for part, count in (("train", train), ("val", val)):
        for number in range(count):
            path = root / part / "ab"[number % 2] / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise(width + number % 7, height + number % 3, number).save(path, quality=95)
    return root


def opened(folder: Path) -> Data:
    nothing = dict.fromkeys(("image_column", "label_column", "train_split", "eval_split", "limit_train", "limit_eval"))
    return open_data(str(folder), **nothing, val_fraction=0.25, seed=0)  # type: ignore[arg-type]


def cached(data: Data, kind: str, folder: Path | None = None, plan: StagePlan | None = None, **options: Any) -> Data:
    flags = Flags(batch=BatchFlags(cache=kind, cache_folder=str(folder) if folder else None))  # type: ignore[arg-type]
    return with_cache(Accelerator(cpu=True), flags, data, [plan or planned()], INFO, **options)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("large") / "photos", 120, 90)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Too small for anything to be made smaller."""
    return write(tmp_path_factory.mktemp("small") / "photos", 40, 34)


def trained(data: Data, epochs: int = 2, workers: int = 0) -> list[torch.Tensor]:
    order = TrainOrder(len(data.train), 0, BatchPlan(8, 8, 1), 0)
    crop, normalise = Crop(SIZE, "bicubic", 0.875), Normalise((0.5,) * 3, (0.5,) * 3)
    feed = TrainFeed(
        data.train, order, crop, normalise, augment="light", flip="horizontal", workers=workers, device=CPU
    )
    return [micro.inputs for epoch in range(epochs) for micro in feed.epoch(epoch)]


def judging(rows: Any, noted: Unreadable | None = None) -> EvalFeed:
    crop, normalise = Crop(SIZE, "bicubic", 0.875), Normalise((0.5,) * 3, (0.5,) * 3)
    return EvalFeed(rows, EvalOrder(len(rows), 4, 0, 1), crop, normalise, workers=0, device=CPU, unreadable=noted)


def judged(data: Data) -> list[torch.Tensor]:
    return [micro.inputs for micro in judging(data.eval)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def test_small_pictures_are_trained_on_to_the_bit(small: Path, tmp_path: Path) -> None:
    data = opened(small)
    plain, kept = trained(data), cached(data, "ram")
    assert same(trained(kept), plain)
    assert same(trained(kept), plain)  # now all from memory
    assert same(judged(kept), judged(data))


def test_memory_and_disk_give_the_same_pixels_the_first_time_and_later(photos: Path, tmp_path: Path) -> None:
    data = opened(photos)
    memory, disk, again = cached(data, "ram"), cached(data, "disk", tmp_path), cached(data, "disk", tmp_path)
    first = trained(memory)
    assert not same(first, trained(data))  # they were made smaller
    for kept in (memory, disk, again, disk):
        assert same(trained(kept), first)
    assert same(trained(again, workers=2), first)
    assert same(judged(disk), judged(data))  # evaluation never changes
    assert same(judged(again), judged(data))


def test_only_what_is_not_there_is_decoded(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tuning.data import cached as module

    calls, real = [0], module.decode

    def counted(*args: Any, **options: Any) -> torch.Tensor:
        calls[0] += 1
        return real(*args, **options)

    monkeypatch.setattr(module, "decode", counted)
    for kept in (cached(opened(photos), "disk", tmp_path), cached(opened(photos), "disk", tmp_path)):
        trained(kept)
        judged(kept)
        assert calls[0] == 26
    assert "0.0 MB are there" not in kept.notes[-1]


def test_a_part_of_the_rows_has_its_own_pictures(photos: Path) -> None:
    kept = cached(opened(photos), "ram")
    some = take(kept.train, np.array([5, 2, 9]))
    assert isinstance(some, CachedRows)
    assert isinstance(kept.train, CachedRows)
    few = take(some, np.array([2, 0]))
    assert isinstance(few, CachedRows)
    for place, row in enumerate((9, 5)):
        assert torch.equal(few.picture(place), kept.train.picture(row))
        assert few[place] == kept.train[row]
    assert label_array(few).tolist() == [label_array(kept.train)[row] for row in (9, 5)]
    assert names_of(few, [0]) == names_of(kept.train, [9])


@pytest.mark.parametrize(("locks", "remedy"), [(True, "Use --cache disk"), (False, "Leave it out")])
def test_what_other_systems_lack_is_refused(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool, remedy: str
) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr(caching, "locks_are_there", lambda: locks)
    with pytest.raises(UserError, match=rf"--cache ram needs Linux\. {remedy}"):
        cached(opened(photos), "ram")
    if not locks:
        with pytest.raises(UserError, match="--cache needs file locks"):
            cached(opened(photos), "disk", tmp_path)


def test_a_run_knows_its_data_with_a_cache_or_without(photos: Path) -> None:
    data = opened(photos)
    assert fingerprint.index(cached(data, "ram")).equals(fingerprint.index(data))


def test_unreadable_pictures_show_in_every_run(photos: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "train/a/4.jpg").write_bytes((folder / "train/a/4.jpg").read_bytes()[:300])
    for _ in range(2):
        kept, noted = cached(opened(folder), "disk", tmp_path / "cache"), Unreadable(str(folder))
        feed = judging(kept.train, noted)
        weights = torch.cat([micro.weights for _ in range(2) for micro in feed])
        assert [Path(broken.name).name for broken in noted.found.values()] == ["4.jpg"]
        assert int((weights == 0).sum()) == 2


def test_a_changed_picture_is_decoded_anew_and_a_lost_one_is_named(photos: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(photos, tmp_path / "photos")
    first = cached(opened(folder), "disk", tmp_path / "cache")
    trained(first)
    assert isinstance(first.train, CachedRows)
    before = first.train.picture(0).clone()
    changed, lost = folder / "train/a/0.jpg", folder / "train/a/2.jpg"
    noise(130, 95, 99).save(changed, quality=95)
    data = opened(folder)
    lost.unlink()
    again = cached(data, "disk", tmp_path / "cache")
    assert isinstance(again.train, CachedRows)
    assert before.shape != again.train.picture(0).shape or not torch.equal(before, again.train.picture(0))
    noted = Unreadable(str(folder))
    list(judging(again.train, noted))
    assert [Path(broken.name).name for broken in noted.found.values()] == ["2.jpg"]


def test_other_pictures_sizes_or_crops_are_another_cache(photos: Path, small: Path, tmp_path: Path) -> None:
    for data, plan in (
        (opened(photos), planned()),
        (opened(photos), planned(augment="strong")),
        (opened(photos), planned(40)),
        (opened(small), planned()),
    ):
        cached(data, "disk", tmp_path, plan)
    assert len(list(tmp_path.rglob("train-*.pixels"))) == 4
    assert len(list(tmp_path.rglob("eval-*.pixels"))) == 3  # evaluation takes no random crops
    cached(opened(photos), "disk", tmp_path)
    assert len(list(tmp_path.rglob("*.pixels"))) == 7


def test_the_largest_stage_decides() -> None:
    info: ModelInfo = INFO
    train, judge = reductions([planned(24, "strong", 64), planned(64, "none", 64)], info)
    assert train.random == ((24, 0.08),)
    assert train.shorter_side == judge.shorter_side == 73
    assert reductions([planned(96, "light", 64)], info)[0].shorter_side == 109
    varied = replace(planned(64, "medium", 64), sizes=(32, 96))
    assert reductions([varied], info)[0].random == ((96, 0.35),)
    once = planned(64, "light", 64, cache_features=True)
    assert reductions([once], info)[0].random == ()


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_what_does_not_fit_is_refused_with_the_numbers(
    kind: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching, "free_memory_of_machine", lambda: 100_000)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(UserError, match=rf"--cache {kind} needs about 0\.\d+ MB .*26 pictures.*0\.1 MB are free"):
        cached(opened(photos), kind, tmp_path / "cache", dry=True)
    assert not (tmp_path / "cache").exists()
    cached(opened(photos), "none")


def test_a_dry_run_leaves_nothing(photos: Path, tmp_path: Path) -> None:
    data = cached(opened(photos), "disk", tmp_path / "cache", dry=True)
    assert not isinstance(data.train, CachedRows)
    assert "26 pictures" in data.notes[-1]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--cache", "ram", "--streaming", "--data", "x"), "--cache ram .* --streaming .* Leave one of the two out"),
        (("--cache-folder", "x"), "--cache-folder x has no effect with --cache none"),
        (("--cache-folder", "x", "--cache", "ram"), "has no effect with --cache ram"),
    ],
)
def test_flags_that_contradict_are_refused(argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_command(list(argv), "recipes/finetune.py", "", Path("recipes/presets"))


@pytest.mark.parametrize("recipe", ["evaluate", "export"])
def test_recipes_that_train_nothing_refuse_it(recipe: str) -> None:
    with pytest.raises(UserError, match="--cache ram has no effect"):
        parse_command(["--cache", "ram", "--run", "r"], f"recipes/{recipe}.py", "", Path("recipes/presets"))


def shared_memory() -> int:
    """Bytes of all files in memory on this machine, in units of 1,024."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Shmem:")) * 1024


def hold(folder: Path, pipe: Any) -> None:
    kept = cached(opened(folder), "ram", None, planned(400))
    trained(kept, 1)
    assert isinstance(kept.train, CachedRows)
    pipe.send((kept.train.store._files.pixels, kept.train.store.bytes_used))
    signal.pause()


def test_memory_is_given_back_after_sigkill(tmp_path: Path) -> None:
    """Nothing has a name that could be left behind, and the kernel takes the pages back."""
    folder, before = write(tmp_path / "photos", 900, 700), set(os.listdir("/dev/shm"))
    context: Any = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(folder, theirs))
    process.start()
    path, held = ours.recv()
    assert held > 10e6
    assert os.path.exists(path)
    full = shared_memory()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not os.path.exists(path)
    assert set(os.listdir("/dev/shm")) <= before
    assert full - shared_memory() > 0.5 * held
