from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from accelerate import Accelerator
from datasets import Dataset, DatasetDict, Features, Image, Value
from pictures import encode, noise, write_classes
from ranks import run_ranks

from tuning.data import fingerprint
from tuning.data.fingerprint import differences, index, save
from tuning.data.sources import Data, open_data
from tuning.data.tables import picture_dataset
from tuning.errors import UserError
from tuning.safety.data_check import refuse_changed_data


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")


def load(folder: Path | str, **changes: Any) -> Data:
    arguments: dict[str, Any] = {
        "image_column": None, "label_column": None, "train_split": None, "eval_split": None,
        "val_fraction": 0.25, "seed": 0, "limit_train": None, "limit_eval": None,
    }  # fmt: skip
    return open_data(str(folder), **{**arguments, **changes})


@pytest.fixture
def parted(tmp_path: Path) -> Path:
    write_classes(tmp_path / "pets" / "train", {"cat": 4, "dog": 3})
    write_classes(tmp_path / "pets" / "val", {"cat": 2, "dog": 1})
    return tmp_path / "pets"


def table(rows: int, named: bool = True) -> Dataset:
    pictures = [{"bytes": encode(noise(8, 8, i)), "path": f"p{i}.png" if named else None} for i in range(rows)]
    features = Features({"image": Image(), "label": Value("string")})
    return Dataset.from_dict({"image": pictures, "label": ["ab"[i % 2] for i in range(rows)]}, features=features)


def test_folders_have_relative_names_classes_and_sizes(parted: Path) -> None:
    found = index(load(parted)).to_pylist()
    assert len(found) == 10
    size = (parted / "train" / "cat" / "000.jpg").stat().st_size
    assert found[0] == {"split": "train", "name": "train/cat/000.jpg", "label": "cat", "bytes": size}
    assert (found[-1]["split"], found[-1]["name"], found[-1]["label"]) == ("eval", "val/dog/000.jpg", "dog")


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("limit", [None, 4])
def test_shards_have_the_lengths_of_their_bytes(tmp_path: Path, named: bool, limit: int | None) -> None:
    table(12, named).to_parquet(str(tmp_path / "train.parquet"))
    data = load(tmp_path, limit_train=limit)
    found = index(data).filter(pa.compute.field("split") == "train").to_pylist()
    for row, (one, picture) in enumerate(zip(found, data.train, strict=True)):
        assert one["bytes"] == len(picture["image"]["bytes"])
        assert one["name"] == (picture["image"]["path"] if named else f"row {row}")
        assert one["label"] == data.classes[picture["label"]]


def test_saved_datasets(tmp_path: Path) -> None:
    DatasetDict({"train": table(6), "validation": table(4)}).save_to_disk(str(tmp_path / "saved"))
    found = index(load(tmp_path / "saved"))
    assert found["split"].to_pylist() == ["train"] * 6 + ["eval"] * 4
    assert found["bytes"].null_count == 0


def test_the_demo() -> None:
    pytest.importorskip("elpv_dataset")
    found = index(load("demo"))
    assert found.num_rows == 2624
    assert found["bytes"].null_count == 0
    assert found["name"][0].as_py().startswith("images/cell")


def test_only_so_many_files_are_asked_for_their_size(parted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "MOST_FILES", 5)
    found = index(load(parted))
    assert 4 <= 10 - found["bytes"].null_count <= 6


def test_a_million_pictures_take_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(fingerprint, "_stat_all", lambda paths: asked.append(len(paths)) or [1] * len(paths))
    paths = np.char.add("/data/photos/", np.arange(200_000).astype(str)).tolist()
    part = picture_dataset(paths, np.arange(200_000) % 2, ("a", "b"))
    data = Data("x", part, part, ("a", "b"), (), "/data/photos")
    found = index(data)
    assert sum(asked) <= fingerprint.MOST_FILES
    save(found, tmp_path / "data.parquet")
    assert (tmp_path / "data.parquet").stat().st_size < 4_000_000
    assert found["name"][-1].as_py() == "199999"
    assert differences(tmp_path / "data.parquet", found) is None


def remove(folder: Path) -> None:
    (folder / "train" / "cat" / "001.jpg").unlink()


def add(folder: Path) -> None:
    for name in ("x", "y", "z", "zz"):
        shutil.copy(folder / "train" / "cat" / "001.jpg", folder / "train" / "cat" / f"{name}.jpg")


def resize(folder: Path) -> None:
    with (folder / "val" / "cat" / "001.jpg").open("ab") as file:
        file.write(b"more")


def add_class(folder: Path) -> None:
    write_classes(folder / "train", {"emu": 1})


def remove_class(folder: Path) -> None:
    shutil.rmtree(folder / "train" / "dog")
    shutil.rmtree(folder / "val" / "dog")
    write_classes(folder / "train", {"bee": 1})


CHANGES: list[tuple[Callable[[Path], None], str]] = [
    (remove, r"1 picture is gone \(train/cat/001\.jpg\)"),
    (add, r"4 pictures are new \(train/cat/x\.jpg, train/cat/y\.jpg, train/cat/z\.jpg and 1 more\)"),
    (resize, r"1 picture is of another size \(val/cat/001\.jpg\)"),
    (add_class, r"new classes: emu; 1 picture is new \(train/emu/000\.jpg\)"),
    (
        remove_class,
        r"classes gone: dog; new classes: bee; 4 pictures are gone \(.*and 1 more\); 1 picture is",
    ),
]


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_what_changed_is_named(tmp_path: Path, parted: Path, change: Callable[[Path], None], words: str) -> None:
    save(index(load(parted)), tmp_path / "data.parquet")
    assert differences(tmp_path / "data.parquet", index(load(parted))) is None
    change(parted)
    found = differences(tmp_path / "data.parquet", index(load(parted)))
    assert found is not None
    assert re.match(words, found), found


def rows(*names: str, split: str = "train", label: str = "a", size: int | None = 1) -> pa.Table:
    count = len(names)
    columns = {"split": [split] * count, "name": list(names), "label": [label] * count}
    sizes = pa.array([size] * count, pa.int64())
    return pa.table({**columns, "bytes": sizes}).replace_schema_metadata({b"classes": b'["a", "b"]'})


@pytest.mark.parametrize(
    ("new", "words"),
    [
        (rows("y", "x"), "the pictures are in another order"),
        (rows("x", "y", split="eval"), "2 pictures are in the other of training and evaluation (x, y)"),
        (rows("x", "y", label="b"), "2 pictures are with another label (x, y)"),
        (rows("y", "x", size=5), "the pictures are in another order; 2 pictures are of another size (x, y)"),
        (rows("x", "y", "y"), "1 picture is new (y)"),
        (rows("x", "y", size=None), None),
        (rows("x", "y").replace_schema_metadata({b"classes": b'["b", "a"]'}), "the classes have another order"),
    ],
)
def test_order_split_label_and_unknown_sizes(tmp_path: Path, new: pa.Table, words: str | None) -> None:
    save(rows("x", "y"), tmp_path / "data.parquet")
    assert differences(tmp_path / "data.parquet", new) == words


def test_a_moved_folder_is_the_same_data(tmp_path: Path, parted: Path) -> None:
    save(index(load(parted)), tmp_path / "data.parquet")
    parted.rename(tmp_path / "elsewhere")
    assert differences(tmp_path / "data.parquet", index(load(tmp_path / "elsewhere"))) is None


def test_a_damaged_file_is_named(tmp_path: Path, parted: Path) -> None:
    (tmp_path / "data.parquet").write_bytes(b"PAR1 or so")
    with pytest.raises(UserError, match=r"data\.parquet is damaged"):
        differences(tmp_path / "data.parquet", index(load(parted)))


def test_a_run_goes_on_with_its_own_data_only(tmp_path: Path, parted: Path) -> None:
    accelerator = Accelerator(cpu=True)
    refuse_changed_data(accelerator, tmp_path, load(parted), resumed=True)  # an older run noted nothing
    refuse_changed_data(accelerator, tmp_path, load(parted), resumed=True)
    remove(parted)
    with pytest.raises(UserError, match=r"1 picture is gone.*Put it back.*another --output"):
        refuse_changed_data(accelerator, tmp_path, load(parted), resumed=True)
    refuse_changed_data(accelerator, tmp_path, load(parted), resumed=False)
    refuse_changed_data(accelerator, tmp_path, load(parted), resumed=True)
    with pytest.raises(UserError, match="can't be used: No such file"):
        refuse_changed_data(accelerator, tmp_path / "none", load(parted), resumed=False)


def test_all_processes_hear_of_it(tmp_path: Path, parted: Path) -> None:
    save(index(load(parted)), tmp_path / "data.parquet")
    remove(parted)
    first, second = run_ranks(2, _refused, tmp_path, load(parted))
    assert "1 picture is gone" in first
    assert first == second


def _refused(folder: Path, data: Data) -> str:
    try:
        refuse_changed_data(Accelerator(cpu=True), folder, data, resumed=True)
    except UserError as error:
        return str(error)
    return "nothing"
