"""Every fault of the data is named with its picture, and a clean data set has none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from pictures import encode, noise
from PIL import Image as Pil

from tuning.cli.command_line import resolve_stages
from tuning.data.sources import Data, open_data
from tuning.flags import Flags, RegularisationFlags
from tuning.preflight.findings import Finding, in_order
from tuning.preflight.pictures import Facts, examine_all
from tuning.preflight.suspects import Limits, Split, class_findings, is_balanced, picture_findings, size_findings

LIMITS = Limits(min_side=16, max_aspect=4.0, max_megapixels=1.0, near_bits=4)
TABLE = {"image_column": None, "label_column": None, "train_split": None, "eval_split": None}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Train and val with 8 and 3 different pictures of two classes."""
    seed = 0
    for split, count in (("train", 8), ("val", 3)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                noise(48, 40, seed).save(tmp_path / split / name / f"{number}.png")
                seed += 1
    return tmp_path


def opened(folder: Path) -> Data:
    return open_data(str(folder), **TABLE, val_fraction=0.25, seed=0, limit_train=None, limit_eval=None)


def read(data: Data, in_full: bool = True) -> dict[Split, list[Facts]]:
    def part(table: Dataset) -> list[Facts]:
        asked = {"image_size": 32, "in_full": in_full, "workers": 0}
        return list(examine_all(table, range(len(table)), **asked, progress=lambda more: None))

    return {"train": part(data.train), "eval": part(data.eval)}


def suspects(folder: Path, in_full: bool = True) -> list[tuple[str, str, str]]:
    """(severity, kind, path below the folder) of everything found about pictures."""
    data = opened(folder)
    found = in_order(picture_findings(data, read(data, in_full), LIMITS))
    return [(f.severity, f.kind, str(Path(f.path).relative_to(folder))) for f in found]


@pytest.mark.parametrize("in_full", [False, True])
def test_clean_data_has_no_finding(photos: Path, in_full: bool) -> None:
    data = opened(photos)
    assert suspects(photos, in_full) == []
    assert list(class_findings(data, balanced=False)) == []
    assert list(size_findings(read(data), image_size=32)) == []


@pytest.mark.parametrize(
    ("size", "expected"),
    [((15, 30), "tiny"), ((16, 30), None), ((16, 65), "aspect"), ((65, 16), "aspect"), ((1001, 1000), "huge")],
)
def test_odd_sizes(photos: Path, size: tuple[int, int], expected: str | None) -> None:
    noise(*size, seed=99).save(photos / "train" / "dog" / "odd.png")
    assert suspects(photos, in_full=False) == ([("warning", expected, "train/dog/odd.png")] if expected else [])


def test_unreadable_and_truncated(photos: Path) -> None:
    whole = encode(noise(60, 60, seed=99), "JPEG")
    (photos / "train" / "cat" / "text.jpg").write_bytes(b"no picture")
    (photos / "val" / "dog" / "cut.jpg").write_bytes(whole[:-200])
    expected = [("error", "unreadable", "train/cat/text.jpg"), ("error", "truncated", "val/dog/cut.jpg")]
    assert suspects(photos, in_full=False) == expected


def test_broken_files_with_the_same_bytes_are_no_duplicates(photos: Path) -> None:
    for name in ("a", "b"):
        (photos / "train" / "cat" / f"{name}.jpg").write_bytes(b"")
    assert {kind for _, kind, _ in suspects(photos)} == {"unreadable"}


@pytest.mark.parametrize("in_full", [False, True])
def test_the_same_file_in_train_and_val_is_a_leak(photos: Path, in_full: bool) -> None:
    shutil.copy(photos / "train" / "cat" / "1.png", photos / "val" / "cat" / "copy.png")
    expected = [("error", "leak", "train/cat/1.png"), ("error", "leak", "val/cat/copy.png")]
    assert suspects(photos, in_full) == expected


def test_the_same_file_under_two_labels(photos: Path) -> None:
    shutil.copy(photos / "train" / "cat" / "1.png", photos / "train" / "dog" / "copy.png")
    assert suspects(photos) == [
        ("error", "label_conflict", "train/cat/1.png"),
        ("error", "label_conflict", "train/dog/copy.png"),
        ("warning", "duplicate", "train/cat/1.png"),
        ("warning", "duplicate", "train/dog/copy.png"),
    ]


def test_a_duplicate_names_its_twin(photos: Path) -> None:
    shutil.copy(photos / "val" / "dog" / "1.png", photos / "val" / "dog" / "copy.png")
    data = opened(photos)
    found = picture_findings(data, read(data), LIMITS)
    assert [f.kind for f in found] == ["duplicate", "duplicate"]
    assert found[0].others == (f"eval: {photos}/val/dog/copy.png",)
    assert (found[0].split, found[0].label, found[0].path) == ("eval", "dog", f"{photos}/val/dog/1.png")
    assert data.eval[found[0].row]["image"]["path"] == found[0].path


@pytest.mark.parametrize(
    ("where", "kinds"),
    [
        ("train/cat", {("note", "near_duplicate")}),
        ("val/cat", {("warning", "near_leak")}),
        ("train/dog", {("warning", "near_label_conflict")}),
        ("val/dog", {("warning", "near_label_conflict"), ("warning", "near_leak")}),
    ],
)
def test_the_same_picture_saved_anew(photos: Path, where: str, kinds: set[tuple[str, str]]) -> None:
    with Pil.open(photos / "train" / "cat" / "1.png") as picture:
        picture.save(photos / where / "again.jpg", quality=90)
    assert suspects(photos, in_full=False) == []
    found = suspects(photos)
    assert {(severity, kind) for severity, kind, _ in found} == kinds
    assert {path for _, _, path in found} == {"train/cat/1.png", f"{where}/again.jpg"}


def test_blank_pictures_are_blank_and_not_alike(photos: Path) -> None:
    for number, grey in enumerate((0, 255)):
        Pil.new("L", (40, 40), grey).save(photos / "train" / "cat" / f"blank{number}.png")
    assert [kind for _, kind, _ in suspects(photos)] == ["blank", "blank"]


def test_pictures_inside_a_table(tmp_path: Path) -> None:
    rows = [encode(noise(40, 40, seed)) for seed in range(8)]
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})

    def part(pictures: list[bytes]) -> Dataset:
        table = {
            "image": [{"bytes": p, "path": None} for p in pictures],
            "label": [n % 2 for n in range(len(pictures))],
        }
        return Dataset.from_dict(table, features=features)

    leaking = [encode(noise(40, 40, seed)) for seed in (20, 21)] + [rows[2], b"broken"]
    DatasetDict({"train": part(rows), "validation": part(leaking)}).save_to_disk(str(tmp_path / "saved"))
    data = opened(tmp_path / "saved")
    found = in_order(picture_findings(data, read(data, in_full=False), LIMITS))
    assert [(f.kind, f.split, f.row, f.path) for f in found] == [
        ("unreadable", "eval", 3, "row 3"),
        ("leak", "train", 2, "row 2"),
        ("leak", "eval", 2, "row 2"),
    ]


def counted(names: list[str], train: list[int], judge: list[int]) -> Data:
    def part(labels: list[int]) -> Dataset:
        features = Features({"image": Value("string"), "label": ClassLabel(names=names)})
        return Dataset.from_dict({"image": [""] * len(labels), "label": labels}, features=features)

    repeated = [np.repeat(np.arange(len(names)), counts).tolist() for counts in (train, judge)]
    return Data("x", part(repeated[0]), part(repeated[1]), tuple(names), ())


def of_classes(train: list[int], judge: list[int], balanced: bool = False) -> Iterator[tuple[str, str]]:
    data = counted(["ant", "bee", "cat"], train, judge)
    return ((f.severity, f.kind) for f in class_findings(data, balanced))


def test_class_counts() -> None:
    assert list(of_classes([10, 12, 29], [1, 1, 1])) == []
    assert list(of_classes([10, 12, 30], [1, 1, 1])) == [("note", "imbalance")]
    assert list(of_classes([10, 12, 200], [1, 1, 1])) == [("warning", "imbalance")]
    assert list(of_classes([10, 12, 200], [1, 1, 1], balanced=True)) == [("note", "imbalance")]
    plain, sampled = (
        resolve_stages(Flags(regularisation=RegularisationFlags(sampling=s))) for s in ("shuffle", "sqrt")
    )
    assert [is_balanced(*asked) for asked in (("none", plain), ("none", sampled), ("balanced", plain))] == [0, 1, 1]
    assert list(of_classes([4, 5, 6], [1, 1, 1])) == [("warning", "few_images")]


def test_classes_that_one_part_lacks() -> None:
    def message(train: list[int], judge: list[int]) -> Finding:
        (finding,) = class_findings(counted(["ant", "bee", "cat"], train, judge), balanced=False)
        return finding

    unlearned, unjudged, absent = (
        message([9, 0, 9], [1, 1, 1]),
        message([9, 9, 9], [1, 0, 1]),
        message([9, 9, 0], [1, 1, 0]),
    )
    assert [f.severity for f in (unlearned, unjudged, absent)] == ["error", "warning", "note"]
    assert {f.kind for f in (unlearned, unjudged, absent)} == {"class_missing"}
    assert "bee" in unlearned.message
    assert "bee" in unjudged.message
    assert "cat" in absent.message


def test_pictures_much_smaller_than_the_input(photos: Path) -> None:
    facts = read(opened(photos), in_full=False)
    assert [f.kind for f in size_findings(facts, image_size=80)] == ["small_pictures"]
    assert list(size_findings(facts, image_size=79)) == []
