from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from pictures import encode, noise, write_classes

from tuning.data import elpv
from tuning.data.images import decode
from tuning.data.sources import Data, image_name, open_data
from tuning.data.tables import label_array, picture_dataset, take
from tuning.errors import UserError

JPEG = encode(noise(16, 16), "JPEG")


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def load(data: Path | str, **changes: Any) -> Data:
    arguments: dict[str, Any] = {
        "image_column": None, "label_column": None, "train_split": None, "eval_split": None,
        "val_fraction": 0.25, "seed": 0, "limit_train": None, "limit_eval": None,
    }  # fmt: skip
    return open_data(str(data), **{**arguments, **changes})


def rows(dataset: Dataset, data: Data) -> list[tuple[str, str]]:
    """(class, file name) of every row."""
    return [(data.classes[row["label"]], os.path.basename(row["image"]["path"])) for row in dataset]


def paths(dataset: Dataset) -> list[str]:
    return [row["image"]["path"] for row in dataset]


def counts(dataset: Dataset, classes: int) -> list[int]:
    return np.bincount(label_array(dataset), minlength=classes).tolist()


def noted(data: Data, *words: str) -> bool:
    return any(all(word in note for word in words) for note in data.notes)


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """A folder of three class folders, 8 + 5 + 2 pictures."""
    return write_classes(tmp_path / "my photos", {"cat": 8, "dog": 5, "emu": 2})


@pytest.fixture
def parted(tmp_path: Path) -> Path:
    """A folder with train/ and val/."""
    write_classes(tmp_path / "pets" / "train", {"cat": 3, "dog": 2})
    write_classes(tmp_path / "pets" / "val", {"cat": 1, "dog": 1})
    return tmp_path / "pets"


# --- train/ and val/ folders ----------------------------------------------------------------------------------------


def test_train_and_val_folders(parted: Path) -> None:
    data = load(parted)
    assert data.classes == ("cat", "dog")
    assert data.name == "pets"
    assert data.notes == ()
    assert rows(data.train, data) == [
        ("cat", "000.jpg"), ("cat", "001.jpg"), ("cat", "002.jpg"), ("dog", "000.jpg"), ("dog", "001.jpg")
    ]  # fmt: skip
    assert rows(data.eval, data) == [("cat", "000.jpg"), ("dog", "000.jpg")]


def test_the_two_columns(parted: Path) -> None:
    data = load(parted)
    for part in (data.train, data.eval):
        assert part.column_names == ["image", "label"]
        assert part.features == Features({"image": Image(decode=False), "label": ClassLabel(names=["cat", "dog"])})
        assert part.cache_files == []
    assert data.train[0]["image"] == {"bytes": None, "path": str(parted / "train" / "cat" / "000.jpg")}
    assert decode(data.train[0]["image"]["path"]).shape == (16, 16, 3)


@pytest.mark.parametrize("name", ["valid", "validation", "test", "Val"])
def test_other_names_of_val(parted: Path, name: str) -> None:
    (parted / "val").rename(parted / name)
    data = load(parted)
    assert len(data.eval) == 2
    assert noted(data, "chooses the best weights") == (name == "test")


def test_val_goes_before_test_which_is_noted(parted: Path) -> None:
    write_classes(parted / "test", {"cat": 4, "dog": 4})
    data = load(parted)
    assert len(data.eval) == 2
    assert noted(data, "not used", "test")


def test_two_validation_folders_need_a_choice(parted: Path) -> None:
    write_classes(parted / "valid", {"cat": 4, "dog": 4})
    with pytest.raises(UserError, match=r"val, valid.*--eval-split"):
        load(parted)
    assert len(load(parted, eval_split="valid").eval) == 8


def test_requested_sub_folders(parted: Path) -> None:
    write_classes(parted / "fold-1", {"cat": 4, "dog": 4})
    write_classes(parted / "fold-2", {"cat": 1, "dog": 2})
    data = load(parted, train_split="fold-1", eval_split="fold-2")
    assert (len(data.train), len(data.eval)) == (8, 3)
    with pytest.raises(UserError, match=r"--eval-split 'fold-3'.*Perhaps you meant 'fold-"):
        load(parted, eval_split="fold-3")
    with pytest.raises(UserError, match=r"--train-split 'trian'.*Perhaps you meant 'train'"):
        load(parted, train_split="trian")


def test_train_without_val_is_split(parted: Path) -> None:
    for path in sorted((parted / "val").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (parted / "val").rmdir()
    data = load(parted)
    assert (len(data.train), len(data.eval)) == (3, 2)
    assert noted(data, "held out", "2 of 5")


def test_a_flat_test_folder_is_not_used_to_evaluate(parted: Path) -> None:
    (parted / "val").rename(parted / "hidden")
    (parted / "test").mkdir()
    noise().save(parted / "test" / "1.jpg")
    data = load(parted)
    assert noted(data, "test", "not used")
    assert noted(data, "held out")
    with pytest.raises(UserError, match=r"--eval-split 'test'.*no class folders"):
        load(parted, eval_split="test")


def test_a_class_that_train_lacks_is_named(parted: Path) -> None:
    write_classes(parted / "val", {"dogs": 1})
    with pytest.raises(UserError, match=r"lacks: dogs.*Perhaps you meant 'dog'"):
        load(parted)


def test_an_empty_train_class_counts_as_lacking(parted: Path) -> None:
    (parted / "train" / "emu").mkdir()
    assert noted(load(parted), "without pictures: emu")
    write_classes(parted / "val", {"emu": 1})
    with pytest.raises(UserError, match="lacks: emu"):
        load(parted)


def test_one_class_map_when_val_lacks_a_class(parted: Path) -> None:
    write_classes(parted / "train", {"ant": 2})
    data = load(parted)
    assert data.classes == ("ant", "cat", "dog")
    assert rows(data.eval, data) == [("cat", "000.jpg"), ("dog", "000.jpg")]
    assert noted(data, "evaluate on: ant")


# --- class folders alone --------------------------------------------------------------------------------------------


def test_class_folders_are_split_by_class(flat: Path) -> None:
    data = load(flat)
    assert data.name == "my-photos"
    assert counts(data.train, 3) == [6, 4, 1]
    assert counts(data.eval, 3) == [2, 1, 1]
    assert sorted(paths(data.train) + paths(data.eval)) == sorted(map(str, flat.rglob("*.jpg")))


def test_the_split_depends_on_the_seed_alone(flat: Path) -> None:
    assert paths(load(flat).eval) == paths(load(flat).eval)
    assert any(paths(load(flat).eval) != paths(load(flat, seed=seed).eval) for seed in range(1, 4))


def test_the_order_of_the_file_system_does_not_matter(flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load(flat)
    scandir = os.scandir

    class Reversed:
        def __init__(self, path: str) -> None:
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(os, "scandir", Reversed)
    assert paths(load(flat).train) == paths(expected.train)
    assert paths(load(flat).eval) == paths(expected.eval)


def test_the_split_does_not_depend_on_the_place(tmp_path: Path) -> None:
    first = load(write_classes(tmp_path / "a", {"x": 9, "y": 9}))
    second = load(write_classes(tmp_path / "zz" / "b", {"x": 9, "y": 9}))
    assert rows(first.eval, first) == rows(second.eval, second)


def test_two_processes_agree(flat: Path) -> None:
    code = (
        "import sys; from tuning.data.sources import open_data\n"
        "d = open_data(sys.argv[1], image_column=None, label_column=None, train_split=None, eval_split=None,"
        " val_fraction=0.25, seed=0, limit_train=7, limit_eval=3)\n"
        "print([r['image']['path'] for p in (d.train, d.eval) for r in p])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", code, str(flat)], capture_output=True, text=True, env=environment)
    data = load(flat, limit_train=7, limit_eval=3)
    assert out.stdout.strip() == str(paths(data.train) + paths(data.eval)), out.stderr
    assert out.stderr == ""


def test_hidden_and_foreign_files_are_skipped_and_counted(flat: Path) -> None:
    before = paths(load(flat).train)
    for name in (".DS_Store", "cat/.hidden.jpg", "cat/Thumbs.db", "dog/desktop.ini", "dog/._000.jpg"):
        (flat / name).write_bytes(JPEG)
    write_classes(flat / "__MACOSX", {"cat": 2})
    write_classes(flat, {".git": 2})
    (flat / "cat" / "notes.txt").write_text("x")
    (flat / "dog" / "noextension").write_text("x")
    (flat / "loose.png").write_bytes(JPEG)
    data = load(flat)
    assert paths(data.train) == before
    assert noted(data, "hidden", "7")
    assert noted(data, "extension: 2", "noextension")
    assert noted(data, "outside every class folder: loose.png")


def test_pictures_in_any_case_and_depth(flat: Path) -> None:
    for name in ("cat/a/b/DEEP.JPEG", "cat/x.WebP", "dog/y.TIF", "dog/z.jfif", "emu/two.dots.PNG"):
        (flat / name).parent.mkdir(parents=True, exist_ok=True)
        (flat / name).write_bytes(JPEG)
    data = load(flat)
    assert len(data.train) + len(data.eval) == 20
    assert counts(data.train, 3)[0] + counts(data.eval, 3)[0] == 10


def test_links_are_followed_without_loops(flat: Path, tmp_path: Path) -> None:
    elsewhere = write_classes(tmp_path / "elsewhere", {"inner": 3})
    (flat / "cat" / "more").symlink_to(elsewhere, target_is_directory=True)
    (flat / "cat" / "back").symlink_to(flat / "cat", target_is_directory=True)
    (elsewhere / "inner" / "up").symlink_to(elsewhere, target_is_directory=True)
    (flat / "fox").symlink_to(elsewhere / "inner", target_is_directory=True)
    (flat / "dog" / "linked.jpg").symlink_to(flat / "cat" / "000.jpg")
    (flat / "dog" / "broken.jpg").symlink_to(flat / "nowhere.jpg")
    (flat / "dog" / "circle").symlink_to(flat / "dog" / "circle")
    data = load(flat)
    total = [a + b for a, b in zip(counts(data.train, 4), counts(data.eval, 4), strict=True)]
    assert dict(zip(data.classes, total, strict=True)) == {"cat": 11, "dog": 6, "emu": 2, "fox": 3}
    assert noted(data, "broken links", "2")


def test_unicode_and_spaces(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "été 猫", {"grüne Äpfel": 3, "猫 & hund": 3, "cafe\u0301": 3})
    data = load(root)
    assert data.classes == ("café", "grüne Äpfel", "猫 & hund")
    assert all(decode(path).shape == (16, 16, 3) for path in paths(data.train))
    assert data.name == "été-猫"


def test_names_that_are_not_utf8_are_counted(flat: Path) -> None:
    bad = os.fsencode(flat) + b"/cat/\xff\xfe.jpg"
    try:
        with open(bad, "wb") as file:
            file.write(JPEG)
    except OSError:
        pytest.skip("this file system refuses such names")
    assert noted(load(flat), "UTF-8")


def test_empty_class_folders_are_noted(flat: Path) -> None:
    (flat / "yak").mkdir()
    (flat / "zebra" / "inner").mkdir(parents=True)
    data = load(flat)
    assert data.classes == ("cat", "dog", "emu")
    assert noted(data, "yak, zebra")


def test_a_class_with_one_image_stays_in_train(flat: Path) -> None:
    write_classes(flat, {"fox": 1})
    data = load(flat)
    assert counts(data.train, 4)[3] == 1
    assert counts(data.eval, 4)[3] == 0
    assert noted(data, "one image", "fox")
    assert noted(data, "evaluate on: fox")


def test_a_class_named_train_is_a_class(tmp_path: Path) -> None:
    data = load(write_classes(tmp_path / "vehicles", {"bus": 4, "car": 4, "train": 4}))
    assert data.classes == ("bus", "car", "train")


def test_an_archive_beside_the_class_folders_is_no_shard(flat: Path) -> None:
    (flat / "original.tar").write_bytes(b"x")
    assert noted(load(flat), "original.tar")


@pytest.mark.parametrize("flag", ["image_column", "label_column"])
def test_columns_of_a_picture_folder_are_noted(flat: Path, flag: str) -> None:
    assert noted(load(flat, **{flag: "x"}), "no effect", flag.replace("_", "-"))


# --- bad input ------------------------------------------------------------------------------------------------------


def test_missing_folders_and_files_are_named(flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"my photo'.*no such folder.*Perhaps you meant 'my photos'"):
        load(flat.parent / "my photo")
    with pytest.raises(UserError, match=r"000.jpg' is a file"):
        load(flat / "cat" / "000.jpg")
    for name in ("no_such_thing", "nobody/nothing"):
        with pytest.raises(UserError, match=f"'{name}' is neither an existing folder nor a Hugging Face dataset"):
            load(name)
    monkeypatch.chdir(flat.parent)
    with pytest.raises(UserError, match="no such folder"):
        load("parquet")


def test_folders_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no pictures"):
        load(tmp_path)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.txt").write_text("x")
    with pytest.raises(UserError, match="holds no pictures"):
        load(tmp_path)
    (tmp_path / "1.jpg").write_bytes(JPEG)
    with pytest.raises(UserError, match=r"no class folders.*1\.jpg"):
        load(tmp_path)
    (tmp_path / "photos.zip").write_bytes(b"")
    with pytest.raises(UserError, match="unpack"):
        load(tmp_path)


def test_flat_split_folders_are_not_two_classes(tmp_path: Path) -> None:
    write_classes(tmp_path, {"train": 3, "val": 3})
    with pytest.raises(UserError, match="one sub-folder a class"):
        load(tmp_path)


@pytest.mark.parametrize("inner", ["", "train"])
def test_one_class_is_not_enough(tmp_path: Path, inner: str) -> None:
    write_classes(tmp_path / inner, {"cat": 3})
    with pytest.raises(UserError, match="only one class with images, 'cat'"):
        load(tmp_path)


def test_nothing_to_hold_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one image in each class"):
        load(write_classes(tmp_path, {"a": 1, "b": 1}))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 20.0, float("nan")])
def test_val_fraction_is_checked(flat: Path, fraction: float) -> None:
    with pytest.raises(UserError, match="--val-fraction"):
        load(flat, val_fraction=fraction)


@pytest.mark.parametrize("flag", ["limit_train", "limit_eval"])
@pytest.mark.parametrize("value", [0, -3])
def test_limits_are_positive(flat: Path, flag: str, value: int) -> None:
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} {value}"):
        load(flat, **{flag: value})


def test_unreadable_folders_are_named(flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> None:
        raise PermissionError(13, "Permission denied", "secret")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="secret: Permission denied"):
        load(flat)


# --- limits ---------------------------------------------------------------------------------------------------------


def test_limits_are_stratified_and_seeded(flat: Path) -> None:
    data = load(flat, limit_train=5, limit_eval=2)
    assert counts(data.train, 3) == [2, 2, 1]
    assert len(data.eval) == 2
    assert data.classes == ("cat", "dog", "emu")
    assert paths(data.train) == paths(load(flat, limit_train=5).train)
    assert set(paths(data.train)) < set(paths(load(flat).train))
    assert noted(data, "--limit-train: 5 of 11")


def test_a_limit_above_the_size_changes_nothing(flat: Path) -> None:
    data = load(flat, limit_train=1000, limit_eval=4)
    assert (len(data.train), len(data.eval)) == (11, 4)
    assert not noted(data, "limit")


def test_a_limit_below_the_classes(flat: Path) -> None:
    assert counts(load(flat, limit_train=3).train, 3) == [1, 1, 1]
    with pytest.raises(UserError, match=r"--limit-train 2 is less than the 3 classes"):
        load(flat, limit_train=2)
    assert len(load(flat, limit_eval=1).eval) == 1


# --- the demo -------------------------------------------------------------------------------------------------------


def test_the_demo_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elpv, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'fine-tuning\[demo\]'.*pip install -e '\.\[demo\]'"):
        load("demo")


def test_the_demo() -> None:
    pytest.importorskip("elpv_dataset")
    data = load("demo", val_fraction=0.2)
    assert data.name == "demo"
    assert data.classes == ("defective", "functional")
    assert len(data.train) + len(data.eval) == 2624
    assert sum(counts(part, 2)[0] for part in (data.train, data.eval)) == 821
    assert noted(data, "CC-BY-NC-SA 4.0")
    assert decode(data.eval[0]["image"]["path"]).shape == (300, 300, 3)


def test_a_damaged_demo_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(elpv, "find_spec", lambda _: spec)
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="damaged"):
        load("demo")
    (tmp_path / "data" / "labels.csv").write_text("images/cell0001.png  much  mono\n")
    with pytest.raises(UserError, match="damaged"):
        load("demo")


# --- tables ---------------------------------------------------------------------------------------------------------


def table(
    labels: list[Any], label: Any = None, image: Any = None, names: tuple[str, str] = ("image", "label")
) -> Dataset:
    pictures: list[Any] = [{"bytes": encode(noise(8, 8, i)), "path": f"p{i}.png"} for i in range(len(labels))]
    if image is not None and not isinstance(image, Image):
        pictures = [picture["bytes"] for picture in pictures]
    features = Features({names[0]: image or Image(), names[1]: label or Value("string")})
    return Dataset.from_dict({names[0]: pictures, names[1]: labels}, features=features)


def encoded(dataset: Dataset, column: str) -> list[Any]:
    return list(dataset.cast_column(column, Image(decode=False))[column])


def parquet(folder: Path, **parts: Dataset) -> Path:
    for name, part in parts.items():
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        part.to_parquet(str(path))
    return folder


def test_parquet_by_file_names(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train, val = table(["dog", "cat", "cat"]), table(["cat", "dog"])
    capfd.readouterr()
    folder = parquet(
        tmp_path / "shards", **{"train-00000-of-00001": train, "validation-00000-of-00001": val, "test-0": val}
    )
    capfd.readouterr()
    data = load(folder)
    assert capfd.readouterr() == ("", "")
    assert data.classes == ("cat", "dog")
    assert label_array(data.train).tolist() == [1, 0, 0]
    assert label_array(data.eval).tolist() == [0, 1]
    assert data.train.features == Features({"image": Image(decode=False), "label": ClassLabel(names=["cat", "dog"])})
    assert decode(data.train[0]["image"]["bytes"]).shape == (8, 8, 3)
    assert noted(data, "not used", "test")


def test_parquet_by_sub_folders(tmp_path: Path) -> None:
    both = table(["a", "b", "a", "b"])
    folder = parquet(tmp_path, **{"data/train/0": both, "data/train/1": both, "data/val/0": both})
    data = load(folder)
    assert (len(data.train), len(data.eval)) == (8, 4)


def test_one_pile_of_parquet_is_split(tmp_path: Path) -> None:
    folder = parquet(tmp_path, **{"part-0": table(list("aabb")), "part-1": table(list("aabb"))})
    data = load(folder)
    assert counts(data.train, 2) == [3, 3]
    assert counts(data.eval, 2) == [1, 1]
    assert noted(data, "held out")
    assert counts(load(folder, limit_train=2).train, 2) == [1, 1]


def test_requested_splits_of_parquet(tmp_path: Path) -> None:
    folder = parquet(tmp_path, **{"fold-1": table(list("aabb")), "fold-2": table(list("ab"))})
    data = load(folder, train_split="fold-1", eval_split="fold-2")
    assert (len(data.train), len(data.eval)) == (4, 2)
    with pytest.raises(UserError, match="--eval-split 'fold-9' is not in"):
        load(folder, eval_split="fold-9")


def test_own_class_maps_are_joined_by_name(tmp_path: Path) -> None:
    train = table([0, 1, 2], ClassLabel(names=["cat", "dog", "emu"]))
    val = table([0, 1], ClassLabel(names=["dog", "cat"]))
    data = load(parquet(tmp_path, train=train, val=val))
    assert data.classes == ("cat", "dog", "emu")
    assert label_array(data.eval).tolist() == [1, 0]


def test_a_class_label_keeps_classes_without_images(tmp_path: Path) -> None:
    names = ClassLabel(names=["z", "a", "m"])
    data = load(parquet(tmp_path, train=table([0, 2, 0], names), val=table([1, 2], names)))
    assert data.classes == ("z", "a", "m")
    assert noted(data, "train on: a")


def test_integer_labels_are_ordered_as_numbers(tmp_path: Path) -> None:
    data = load(parquet(tmp_path, train=table([10, 9, 2], Value("int32")), val=table([9], Value("int64"))))
    assert data.classes == ("2", "9", "10")
    assert label_array(data.train).tolist() == [2, 1, 0]
    assert label_array(data.eval).tolist() == [1]


def test_binary_columns_and_other_names(tmp_path: Path) -> None:
    train = table(list("aabb"), image=Value("binary"), names=("photo", "target"))
    data = load(parquet(tmp_path, train=train))
    assert data.train.column_names == ["image", "label"]
    assert decode(data.train[0]["image"]["bytes"]).shape == (8, 8, 3)
    assert image_name(data.train[0], 17) == "row 17"


def test_known_names_choose_among_several(tmp_path: Path) -> None:
    train = table([0, 1, 0, 1], ClassLabel(names=["x", "y"]), names=("img", "fine_label"))
    train = train.add_column("coarse_label", [0, 0, 1, 1], feature=ClassLabel(names=["p", "q"]))
    train = train.add_column("mask", encoded(train, "img"), feature=Image())
    assert load(parquet(tmp_path, train=train)).classes == ("x", "y")
    assert load(tmp_path, label_column="coarse_label").classes == ("p", "q")


def test_ambiguous_and_missing_columns(tmp_path: Path) -> None:
    base = table(list("aabb"), names=("left", "kind"))
    two = base.add_column("right", encoded(base, "left"), feature=Image())
    folder = parquet(tmp_path, train=two)
    with pytest.raises(UserError, match=r"several columns fit \(left, right\).*left, kind, right with --image-column"):
        load(folder)
    with pytest.raises(UserError, match=r"no column fits.*left, kind, right with --label-column"):
        load(folder, image_column="left")
    assert load(folder, image_column="right", label_column="kind").classes == ("a", "b")
    with pytest.raises(UserError, match=r"--label-column 'kin' is not a column.*Perhaps you meant 'kind'"):
        load(folder, image_column="left", label_column="kin")
    with pytest.raises(UserError, match=r"--label-column 'right' cannot be used"):
        load(folder, image_column="left", label_column="right")


def test_several_labels_an_image_cannot_be_classes(tmp_path: Path) -> None:
    folder = parquet(tmp_path, train=table([[0], [1]], List(Value("int64"))))
    with pytest.raises(UserError, match="cannot be used"):
        load(folder, label_column="label")


def test_rows_without_labels_are_counted(tmp_path: Path) -> None:
    kind = ClassLabel(names=["x", "y"])
    with pytest.raises(UserError, match=r"2 of 3 rows have no 'label'"):
        load(parquet(tmp_path / "a", train=table([0, 1], kind), test=table([-1, 0, -1], kind)))
    with pytest.raises(UserError, match=r"1 of 3 rows have no 'label'"):
        load(parquet(tmp_path / "b", train=table(["x", "y", None])))


def test_a_class_that_the_train_table_lacks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lacks in column 'label': emu"):
        load(parquet(tmp_path / "a", train=table(["x", "y"]), val=table(["x", "emu"])))
    with pytest.raises(UserError, match="differ"):
        load(parquet(tmp_path / "b", train=table([1, 2], Value("int64")), val=table(["x", "emu"])))


def test_one_class_in_a_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only one class with images, 'y'"):
        load(parquet(tmp_path, train=table([1, 1], ClassLabel(names=["x", "y"]))))


@pytest.mark.parametrize(("empty", "other", "word"), [("val", "train", "evaluation"), ("train", "val", "train")])
def test_an_empty_split(monkeypatch: pytest.MonkeyPatch, empty: str, other: str, word: str) -> None:
    parts = DatasetDict({empty: table([]), other: table(["x", "y"])})
    monkeypatch.setattr("datasets.load_dataset", lambda _: parts)
    with pytest.raises(UserError, match=f"{word} split has no images"):
        load("someone/pets")


def test_a_dataset_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = DatasetDict({"train": table(list("aabb")), "test": table(list("ab"))})
    asked: list[str] = []
    monkeypatch.setattr("datasets.load_dataset", lambda name: asked.append(name) or parts)
    data = load("someone/pets")
    assert asked == ["someone/pets"]
    assert data.name == "someone-pets"
    assert (len(data.train), len(data.eval)) == (4, 2)
    assert data.train.column_names == ["image", "label"]
    parts["validation"] = parts.pop("train")
    with pytest.raises(UserError, match="someone/pets has no split called train, but test, validation"):
        load("someone/pets")


def test_damaged_and_mixed_shards(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"parquet shards in .* cannot be read"):
        load(tmp_path)
    (tmp_path / "train.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"several kinds \(parquet, tar\)"):
        load(tmp_path)


def test_saved_datasets(tmp_path: Path) -> None:
    train, val = table(list("aabb")), table(list("ab"))
    train.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": train, "validation": val, "extra": val}).save_to_disk(str(tmp_path / "several"))
    assert (len(load(tmp_path / "one").train), len(load(tmp_path / "one").eval)) == (2, 2)
    data = load(tmp_path / "several")
    assert (len(data.train), len(data.eval)) == (4, 2)
    assert noted(data, "not used", "extra")
    assert len(load(tmp_path / "several", eval_split="extra", limit_eval=1).eval) == 1
    with pytest.raises(UserError, match="Perhaps you meant 'extra'"):
        load(tmp_path / "several", eval_split="extr")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(UserError, match="saved dataset but cannot be read"):
        load(tmp_path / "one")


def test_arrow_shards(tmp_path: Path) -> None:
    table(list("aabb")).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "shards").mkdir()
    (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(tmp_path / "shards" / "train-0.arrow")
    data = load(tmp_path / "shards")
    assert (len(data.train), len(data.eval)) == (2, 2)


def write_tar(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, files in samples:
            for extension, content in files.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_webdataset_shards(tmp_path: Path) -> None:
    samples = [(f"s{i}", {"jpg": JPEG, "cls": str(i % 2).encode()}) for i in range(6)]
    write_tar(tmp_path / "train-0.tar", samples)
    write_tar(tmp_path / "val-0.tar", samples[:2])
    data = load(tmp_path)
    assert data.classes == ("0", "1")
    assert label_array(data.train).tolist() == [0, 1, 0, 1, 0, 1]
    assert len(data.eval) == 2
    assert decode(data.train[0]["image"]["bytes"]).shape == (16, 16, 3)
    assert image_name(data.train[3]) == "s3.jpg"


def test_webdataset_without_labels(tmp_path: Path) -> None:
    meta = json.dumps({"a": 1}).encode()
    write_tar(tmp_path / "0.tar", [(f"s{i}", {"jpg": JPEG, "json": meta}) for i in range(3)])
    with pytest.raises(UserError, match=r"no column fits.*jpg, json.*--label-column"):
        load(tmp_path)


class Trap:
    """Unpickling makes the folder at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("extension", ["pkl", "pickle", "pyd", "pth", "pt", "npy"])
def test_nothing_in_a_shard_is_executed(tmp_path: Path, extension: str) -> None:
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    if extension == "npy":
        buffer = io.BytesIO()
        np.save(buffer, np.array([Trap(tmp_path / "sprung")], dtype=object), allow_pickle=True)
        trap = buffer.getvalue()
    samples = [(f"s{i}", {"jpg": JPEG, "cls": str(i % 2).encode(), extension: trap}) for i in range(6)]
    write_tar(tmp_path / "shards" / "train-0.tar", samples)
    try:
        data = load(tmp_path / "shards")
    except UserError as error:
        assert "shards" in str(error)  # noqa: PT017 (either outcome is fine)
    else:
        assert [decode(row["image"]["bytes"]).shape for row in data.train] == [(16, 16, 3)] * len(data.train)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


def test_a_dataset_survives_the_way_to_a_worker(tmp_path: Path, flat: Path) -> None:
    for data in (load(flat), load(parquet(tmp_path / "shards", train=table(list("aabb"))), limit_train=2)):
        copy = pickle.loads(pickle.dumps(data.train))
        assert [row["image"] for row in copy] == [row["image"] for row in data.train]
        assert label_array(copy).tolist() == label_array(data.train).tolist()


def test_names_of_images() -> None:
    assert image_name({"image": {"bytes": None, "path": "a/b.jpg"}, "label": 0}, 3) == "a/b.jpg"
    assert image_name({"image": {"bytes": b"", "path": None}, "label": 0}, 3) == "row 3"
    assert image_name({"image": None}) == "an image without a name"


def test_a_row_takes_its_path_and_sixteen_bytes() -> None:
    """Before rows are chosen and after; besides a few bits."""
    rows, path = 10_000, "/data/photos/train/n00000000/n00000000_{:05d}.JPEG"
    opened = picture_dataset([path.format(row) for row in range(rows)], np.arange(rows) % 10, [*"abcdefghij"])
    for dataset in (opened, take(opened, np.random.default_rng(0).permutation(rows))):
        assert dataset.data.nbytes / rows == pytest.approx(len(path.format(10_000)) + 16, abs=0.25)
