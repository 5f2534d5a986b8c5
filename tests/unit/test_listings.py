"""What folders hold, remembered between runs: the same rows as without the cache, whatever happened in between."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tuning.data import listings
from tuning.data.folders import PICTURES
from tuning.data.listings import Listings
from tuning.data.sources import Data, open_data
from tuning.data.tables import label_array

Row = tuple[str, str]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, in use for folders of any size; folders count as settled at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listings, "LEAST", 1)
    monkeypatch.setattr(listings, "SETTLED", -1.0)
    return tmp_path / "cache"


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the folders that were read from the disk."""
    names: list[str] = []
    scandir = os.scandir

    def noted(folder: str) -> object:
        names.append(os.path.basename(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", noted)
    return names


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes, one with a folder further down; the clock has moved on since."""
    root = tmp_path / "photos"
    for name in ("cat/0.jpg", "cat/1.jpg", "cat/old/2.jpg", "dog/0.jpg", "dog/1.jpg", "emu/0.jpg", "emu/1.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "dog" / "notes.txt").touch()
    (root / "dog" / ".hidden").touch()
    return root


def load(root: Path) -> Data:
    return open_data(
        str(root),
        image_column=None,
        label_column=None,
        train_split=None,
        eval_split=None,
        val_fraction=0.25,
        seed=0,
        limit_train=None,
        limit_eval=None,
    )


def rows(data: Data) -> tuple[list[Row], list[Row], tuple[str, ...], tuple[str, ...]]:
    train, judge = (
        [(data.classes[row["label"]], row["image"]["path"]) for row in part] for part in (data.train, data.eval)
    )
    return train, judge, data.classes, data.notes


def without_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    with monkeypatch.context() as context:
        context.setenv("XDG_CACHE_HOME", os.devnull)
        return rows(load(root))


def kept(cache: Path) -> list[Path]:
    return sorted((cache / "fine-tuning" / "listings").glob("*"))


def wait_for_the_clock() -> None:
    """File systems stamp by a clock that ticks every few milliseconds."""
    time.sleep(0.03)


def test_the_second_time_no_folder_is_read(photos: Path, cache: Path, scanned: list[str]) -> None:
    first = rows(load(photos))
    assert sorted(scanned) == ["cat", "dog", "emu", "old", "photos"]
    scanned.clear()
    assert rows(load(photos)) == first
    assert scanned == []
    assert [path.suffix for path in kept(cache)] == [".arrow"]


def add(root: Path) -> None:
    (root / "dog" / "00.jpg").touch()


def remove(root: Path) -> None:
    (root / "cat" / "1.jpg").unlink()


def rename(root: Path) -> None:
    (root / "emu" / "1.jpg").rename(root / "emu" / "zz.jpg")


def rename_class(root: Path) -> None:
    (root / "cat").rename(root / "wolf")


def new_class(root: Path) -> None:
    (root / "bat").mkdir()
    (root / "bat" / "0.jpg").touch()


def remove_class(root: Path) -> None:
    for path in (root / "emu").iterdir():
        path.unlink()
    (root / "emu").rmdir()


def deeper(root: Path) -> None:
    (root / "cat" / "old" / "3.jpg").touch()


def swap(root: Path) -> None:
    (root / "cat").rename(root / "aside")
    (root / "dog").rename(root / "cat")
    (root / "aside").rename(root / "dog")


def with_an_old_date(root: Path) -> None:
    before = (root / "dog").stat()
    (root / "dog" / "2.jpg").touch()
    os.utime(root / "dog", ns=(before.st_atime_ns, before.st_mtime_ns))


def folder_in_place_of_a_file(root: Path) -> None:
    (root / "dog" / "1.jpg").unlink()
    (root / "dog" / "1.jpg").mkdir()


@pytest.mark.parametrize(
    ("change", "read"),
    [
        (add, ["dog"]),
        (remove, ["cat"]),
        (rename, ["emu"]),
        (rename_class, ["photos", "wolf"]),
        (new_class, ["bat", "photos"]),
        (remove_class, ["photos"]),
        (deeper, ["old"]),
        (swap, ["cat", "dog", "photos"]),
        (with_an_old_date, ["dog"]),
        (folder_in_place_of_a_file, ["1.jpg", "dog"]),
    ],
)
def test_what_changed_is_read_again(
    change: Callable[[Path], None],
    read: list[str],
    photos: Path,
    scanned: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = rows(load(photos))
    wait_for_the_clock()
    change(photos)
    scanned.clear()
    after = rows(load(photos))
    assert set(read) <= set(scanned) <= {*read, "old"}  # the path of a folder that moved is new below it, too
    assert after != before
    assert after == without_cache(photos, monkeypatch)
    scanned.clear()
    assert rows(load(photos)) == after
    assert scanned == []


def test_a_file_written_anew_changes_no_row(photos: Path, scanned: list[str]) -> None:
    before = rows(load(photos))
    wait_for_the_clock()
    (photos / "cat" / "0.jpg").write_bytes(b"another picture")
    scanned.clear()
    assert rows(load(photos)) == before
    assert scanned == []


def test_folders_that_changed_just_now_are_read_again(
    photos: Path, scanned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later change in the same tick of the clock would not show."""
    monkeypatch.setattr(listings, "SETTLED", 60.0)
    for _ in range(2):
        scanned.clear()
        load(photos)
        assert len(scanned) == 5


def test_folders_with_links_are_read_again(photos: Path, tmp_path: Path, scanned: list[str]) -> None:
    """What a link leads to may go without a trace in the folder of the link."""
    target = tmp_path / "elsewhere.jpg"
    target.touch()
    (photos / "dog" / "link.jpg").symlink_to(target)
    assert sum(len(part) for part in rows(load(photos))[:2]) == 8
    target.unlink()
    scanned.clear()
    found = rows(load(photos))
    assert scanned == ["dog"]
    assert sum(len(part) for part in found[:2]) == 7
    assert any("broken links" in note for note in found[3])


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:100],
        lambda content: content[:-1],
        lambda content: content[:200] + bytes([content[200] ^ 1]) + content[201:],
        lambda content: b"9" + content[1:],
        lambda content: b"not a listing " * 50,
    ],
    ids=["empty", "begun", "short", "bit", "format", "other"],
)
def test_a_damaged_file_is_replaced(
    damage: Callable[[bytes], bytes], photos: Path, cache: Path, scanned: list[str]
) -> None:
    first = rows(load(photos))
    [file] = kept(cache)
    good = file.read_bytes()
    file.write_bytes(damage(good))
    scanned.clear()
    assert rows(load(photos)) == first
    assert len(scanned) == 5
    assert kept(cache) == [file]
    scanned.clear()
    assert rows(load(photos)) == first
    assert scanned == []


@pytest.mark.parametrize("where", ["file", "folder"])
def test_a_cache_that_cannot_be_written_is_no_failure(where: str, photos: Path, cache: Path) -> None:
    if where == "file":
        cache.write_text("in the way")
    else:
        (cache / "fine-tuning").mkdir(parents=True)
        (cache / "fine-tuning" / "listings").write_text("in the way")
    assert rows(load(photos)) == rows(load(photos))


def test_a_full_disk_leaves_nothing_behind(photos: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    first = rows(load(photos))
    assert kept(cache) == []
    monkeypatch.undo()
    assert rows(load(photos)) == first


def test_builders_at_the_same_time(photos: Path, cache: Path) -> None:
    expected, found, errors = rows(load(photos)), [], []
    [file] = kept(cache)
    file.unlink()
    start = threading.Barrier(4)

    def build() -> None:
        try:
            start.wait()
            for _ in range(5):
                file.unlink(missing_ok=True)
                found.append(rows(load(photos)))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(one == expected for one in found)
    assert len(found) == 20
    assert set(kept(cache)) <= {file}


def test_small_folders_are_not_kept(photos: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listings, "LEAST", 8)
    load(photos)
    assert not cache.exists()


def test_a_relative_path_and_an_absolute_one_share_a_file(
    photos: Path, cache: Path, scanned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(photos)
    monkeypatch.chdir(photos.parent)
    scanned.clear()
    train = rows(load(Path("photos")))[0]
    assert scanned == []
    assert all(path.startswith("photos/") for _, path in train)
    assert len(kept(cache)) == 1


def test_train_and_val_are_kept_together(tmp_path: Path, cache: Path, scanned: list[str]) -> None:
    for part, images in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            for number in range(images):
                (tmp_path / "pets" / part / name / f"{number}.jpg").touch()
    first = rows(load(tmp_path / "pets"))
    assert (len(first[0]), len(first[1]), len(kept(cache))) == (6, 4, 1)
    scanned.clear()
    assert rows(load(tmp_path / "pets")) == first
    assert scanned == []


def test_names_of_every_kind_come_back(photos: Path, scanned: list[str]) -> None:
    for name in ("été.JPG", "cafe\u0301.jpeg", "猫 1.png", "a\nb.gif", "'quoted'.bmp"):
        (photos / "cat" / name).touch()
    first = rows(load(photos))
    scanned.clear()
    assert rows(load(photos)) == first
    assert scanned == []


def test_a_listing_for_other_extensions_is_another_file(photos: Path) -> None:
    for extensions, files in ((PICTURES, 2), (frozenset({"txt"}), 1)):
        for _ in range(2):
            known = Listings(str(photos), extensions)
            assert len(known.of(str(photos / "dog")).files) == files
            known.keep()


def test_labels_of_a_selection(photos: Path) -> None:
    train = load(photos).train
    assert label_array(train).tolist() == [row["label"] for row in train]
    some = train.select([3, 1])
    assert label_array(some).tolist() == [row["label"] for row in some]
    assert label_array(train).dtype == np.int64
