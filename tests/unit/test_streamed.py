"""Parquet shards read where they lie: the same rows as through the cache, few reads, and errors that name the shard."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Features, Image
from parquet_files import CLASSES, picture_table, write_shards
from pictures import write_classes

from tuning.data import fingerprint
from tuning.data.ahead import to_evaluate, to_train
from tuning.data.broken import Unreadable
from tuning.data.loader import EvalFeed, TrainFeed
from tuning.data.local_order import LocalOrder, train_order
from tuning.data.sampling import EvalOrder
from tuning.data.sources import Data, open_data
from tuning.data.streamed import Shards, StreamedRows
from tuning.data.tables import in_memory, label_array, names_of, spread, take
from tuning.data.transforms import Crop, Normalise
from tuning.errors import UserError
from tuning.preflight.pictures import examine_all
from tuning.sizes import BatchPlan

ROW_GROUP = 5


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 training and 17 evaluation pictures in shards of odd sizes."""
    return write_shards(tmp_path_factory.mktemp("shards"), {"train": [13, 20, 17], "val": [11, 6]}, ROW_GROUP)


def load(data: Path | str, **changes: Any) -> Data:
    arguments: dict[str, Any] = {
        "image_column": None, "label_column": None, "train_split": None, "eval_split": None,
        "val_fraction": 0.25, "seed": 0, "limit_train": None, "limit_eval": None, "streaming": True,
    }  # fmt: skip
    return open_data(str(data), **{**arguments, **changes})


def content(part: Any) -> list[dict[str, Any]]:
    return [part[row] for row in range(len(part))]


def reads_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Fills with (shard and row group, column) as they are read."""
    reads: list[tuple[str, str]] = []
    real = Shards._column

    def noting(self: Shards, block: int, name: str) -> Any:
        reads.append((self.name(block), name))
        return real(self, block, name)

    monkeypatch.setattr(Shards, "_column", noting)
    return reads


# --- the same rows ---------------------------------------------------------------------------------------------------


def test_streamed_rows_are_those_of_the_cache(shards: Path) -> None:
    streamed, cached = load(shards), load(shards, streaming=False)
    assert isinstance(streamed.train, StreamedRows)
    assert (streamed.classes, streamed.name, streamed.folder) == (cached.classes, cached.name, None)
    for mine, theirs in ((streamed.train, cached.train), (streamed.eval, cached.eval)):
        assert content(mine) == list(theirs)
        assert label_array(mine).tolist() == label_array(theirs).tolist()
        assert (
            names_of(mine, [3, 0, 10])
            == names_of(theirs, [3, 0, 10])
            == [theirs[n]["image"]["path"] for n in (3, 0, 10)]
        )
    assert "11 row groups" in streamed.notes[0]


@pytest.mark.parametrize(
    "changes", [{"limit_train": 20, "limit_eval": 6}, {"train_split": "train", "eval_split": "val"}]
)
def test_limits_and_named_splits_choose_the_same_rows(shards: Path, changes: dict[str, Any]) -> None:
    streamed, cached = load(shards, **changes), load(shards, streaming=False, **changes)
    assert content(streamed.train) == list(cached.train)
    assert content(streamed.eval) == list(cached.eval)


def test_a_part_is_held_out_as_ever(tmp_path: Path) -> None:
    write_shards(tmp_path / "one", {"train": [23, 14]}, ROW_GROUP)
    streamed, cached = load(tmp_path / "one"), load(tmp_path / "one", streaming=False)
    assert len(streamed.eval) > 5
    assert content(streamed.train) == list(cached.train)
    assert content(streamed.eval) == list(cached.eval)


@pytest.mark.parametrize("kind", ["binary", "large_binary", "string"])
def test_other_types_of_the_picture_column(tmp_path: Path, kind: str) -> None:
    """Bytes alone, and paths of pictures that are files of their own."""
    table = picture_table([0, 1, 2, 0, 1])
    pictures = [picture["bytes"] for picture in table["image"].to_pylist()]
    column = pa.array([f"{n}.png" for n in range(5)]) if kind == "string" else pa.array(pictures, getattr(pa, kind)())
    labels = pa.array(["cat", "dog", "emu", "cat", "dog"])
    (tmp_path / "x").mkdir()
    pq.write_table(pa.table({"jpg": column, "cls": labels}), tmp_path / "x/train-0.parquet", row_group_size=2)
    data = load(tmp_path / "x", hold_out=False, image_column="jpg")
    assert data.classes == CLASSES
    wanted = {"bytes": None, "path": "3.png"} if kind == "string" else {"bytes": pictures[3], "path": None}
    assert data.train[3] == {"image": wanted, "label": 0}
    assert names_of(data.train, [3]) == ["3.png" if kind == "string" else "row 3"]


def test_shards_and_row_groups_may_be_empty(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "x", {"train": [9, 8]}, ROW_GROUP)
    table = pq.read_table(root / "train-00000.parquet")
    pq.write_table(table.slice(0, 0), root / "train-00000.parquet")
    with pq.ParquetWriter(root / "train-00002.parquet", table.schema) as writer:
        for part in (table.slice(0, 4), table.slice(0, 0), table.slice(4)):
            writer.write_table(part)
    rows = load(root, hold_out=False).train
    assert [row["image"]["path"] for row in content(rows)] == [f"{n:05d}.png" for n in (*range(9, 17), *range(9))]
    assert all(np.diff(rows.blocks.starts) > 0)


def test_names_of_classes_decide_where_shards_number_them_differently(tmp_path: Path) -> None:
    tmp_path.joinpath("x").mkdir()
    pq.write_table(picture_table([0, 1, 2]), tmp_path / "x/train-0.parquet")
    pq.write_table(picture_table([0, 1], classes=("emu", "cat")), tmp_path / "x/train-1.parquet")
    assert label_array(load(tmp_path / "x", hold_out=False).train).tolist() == [0, 1, 2, 2, 0]


def test_patterns_urls_and_file_systems(shards: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(shards), "/bucket/photos", recursive=True)
    reference = content(load(shards).train)
    for data in (
        f"{shards}/*.parquet",
        f"file://{shards}",
        "memory://bucket/photos",
        "memory://bucket/photos/*.parquet",
    ):
        found = load(data)
        assert (len(found.train), len(found.eval)) == (50, 17), data
        assert content(found.train) == reference
    only = load(f"{shards}/train-0000[12].parquet", hold_out=False)
    assert content(only.train) == reference[13:]


def test_rows_can_be_handed_to_another_process(shards: Path) -> None:
    rows = load(shards).train
    rows[3]
    again = pickle.loads(pickle.dumps(rows))
    assert content(again) == content(rows)
    with pytest.raises(IndexError):
        rows[50]


# --- what is read -----------------------------------------------------------------------------------------------------


def test_opening_reads_no_picture(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = reads_of(monkeypatch)
    data = load(shards)
    fingerprint.index(data)
    assert reads == []
    assert data.train.labels.dtype == np.uint8
    names_of(data.train, range(50))
    assert len(reads) == 11
    assert {column for _, column in reads} == {"image.path"}


def epoch_of(rows: StreamedRows, plan: BatchPlan, rank: int, first: int = 0) -> list[list[Any]]:
    return list(to_train(rows, train_order(len(rows), 0, plan, rank, rows.blocks), 0, first))


def test_an_epoch_reads_every_block_about_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four processes: each has its own part of the shards, in an epoch as in the evaluation."""
    root = write_shards(tmp_path / "x", {"train": [20] * 16}, ROW_GROUP)
    size = pq.ParquetFile(root / "train-00000.parquet").metadata.row_group(0).column(0).total_uncompressed_size
    rows = load(root, hold_out=False, shuffle_gb=size * 8.5 / 1e9).train
    reads = reads_of(monkeypatch)
    counts, opened = [], []
    for rank in range(4):
        order = train_order(len(rows), 0, BatchPlan(32, 8, 4), rank, rows.blocks)
        assert isinstance(order, LocalOrder)
        assert (order.lanes, order.window) == (8, 1)
        items = [item for micro in to_train(rows, order, 0, 0) for item in micro]
        assert all(item.content == rows[item.row] for item in items[:3])
        counts.append(len(items))
    assert counts == [80] * 4
    reads.clear()
    for rank in range(4):
        epoch_of(rows, BatchPlan(32, 8, 4), rank)
        opened.append({name for name, _ in reads})
        assert len(reads) == len(opened[-1]), "a block was read twice in an epoch"
        reads.clear()
    assert set().union(*opened) == {rows.shards.name(block) for block in range(64)}
    assert sum(map(len, opened)) <= 64 + 3
    for rank in range(4):
        list(to_evaluate(rows, EvalOrder(len(rows), 8, rank, 4, together=True)))
    assert len(reads) == 64


@pytest.mark.parametrize("in_full", [False, True])
def test_preflight_reads_every_block_once(shards: Path, monkeypatch: pytest.MonkeyPatch, in_full: bool) -> None:
    rows, done = load(shards).train, list[int]()
    reads = reads_of(monkeypatch)
    options: dict[str, Any] = {"image_size": 16, "in_full": in_full, "workers": 0, "progress": done.append}
    found = [one for part in (range(22), range(22, 50)) for one in examine_all(rows, part, **options)]
    assert [one.row for one in found] == list(range(50))
    assert all(one.problem is None for one in found)
    assert sum(done) == 50
    assert len(reads) == 11
    assert [len(part) for part in rows.by_block(range(3, 22))] == [2, 5, 3, 5, 4]


def test_going_on_within_an_epoch_reads_no_earlier_picture(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, plan = load(shards, shuffle_gb=1e-6).train, BatchPlan(10, 10, 1)
    whole = epoch_of(rows, plan, 0)
    reads = reads_of(monkeypatch)
    assert epoch_of(rows, plan, 0, first=4) == whole[4:]
    assert len(reads) <= 4
    assert {item.content["label"] for item in whole[4]} <= {0, 1, 2}  # type: ignore[index]


def test_examples_come_from_few_places(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = load(shards).train
    chosen = spread(rows, 12)
    assert len(spread(rows, 30)) > 20
    assert 8 <= len(chosen) <= 12
    assert len({rows.locate(int(row))[0] for row in chosen}) == 4
    assert spread(take(rows, np.arange(3)), 12).tolist() == [0, 1, 2]


def test_few_rows_can_be_taken_into_memory(shards: Path) -> None:
    data = load(shards)
    few = take(data.train, np.array([3, 17, 4, 40]))
    held = in_memory(few, data.classes)
    assert not isinstance(held, StreamedRows)
    assert list(held) == content(few)
    assert in_memory(held, data.classes) is held


def test_labels_and_nothing_else_stay_in_memory(tmp_path: Path) -> None:
    """400,000 rows: a byte each, and a few numbers a row group."""
    tmp_path.joinpath("x").mkdir()
    features = Features({"image": Image(), "label": ClassLabel(names=list(CLASSES))})
    images = pa.nulls(100_000, features.arrow_schema.field("image").type)
    table = pa.table({"image": images, "label": pa.array(np.arange(100_000) % 3)}, schema=features.arrow_schema)
    for number in range(4):
        pq.write_table(table, tmp_path / f"x/train-{number}.parquet", row_group_size=1000)
    rows = load(tmp_path / "x", hold_out=False).train
    assert len(rows) == 400_000
    assert len(pickle.dumps(rows)) < 430_000
    half = take(rows, np.arange(0, 400_000, 2))
    assert len(pickle.dumps(half)) < 430_000 + 200_000 * 5
    order = train_order(400_000, 0, BatchPlan(256, 256, 1), 0, rows.blocks)
    next(order.micro_batches(0, 700))
    assert len(pickle.dumps(order)) < 20_000


# --- batches ----------------------------------------------------------------------------------------------------------


def train_feed(rows: Any, workers: int, blocks: Any) -> TrainFeed:
    normalise = Normalise((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    order = train_order(len(rows), 0, BatchPlan(8, 4, 1), 0, blocks)
    options: dict[str, Any] = {"augment": "light", "flip": "both", "workers": workers, "device": torch.device("cpu")}
    return TrainFeed(rows, order, Crop(16, "bilinear", 1.0), normalise, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_rows_in_memory(shards: Path, workers: int) -> None:
    """The same order over the rows of the cache: crops and flips belong to the row."""
    streamed, cached = load(shards, shuffle_gb=1e-5).train, load(shards, streaming=False).train
    mine, theirs = (train_feed(rows, workers, streamed.blocks) for rows in (streamed, cached))
    for epoch in (0, 1):
        for one, other in zip(mine.epoch(epoch, 2), theirs.epoch(epoch, 2), strict=True):
            assert torch.equal(one.rows, other.rows)
            assert torch.equal(one.inputs, other.inputs)
            assert torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_pictures_are_replaced_and_named(tmp_path: Path, workers: int) -> None:
    root = tmp_path / "x"
    root.mkdir()
    table = picture_table([0, 1, 2] * 8)
    pictures = table["image"].to_pylist()
    pictures[7] = {"bytes": b"no picture", "path": "bad.png"}
    pictures[9] = None
    broken = pa.array(pictures, table.schema.field("image").type)
    pq.write_table(table.set_column(0, table.schema.field(0), broken), root / "train-0.parquet", row_group_size=4)
    rows = load(root, hold_out=False).train
    feed = train_feed(rows, workers, rows.blocks)
    assert all(float(micro.inputs.abs().sum()) > 0 for micro in feed.epoch(0))
    assert {row: str(one) for row, one in feed.unreadable.found.items()} == {
        7: "bad.png: not a picture in a known format, or its header is damaged",
        9: "row 9: it is empty",
    }
    order, noted = EvalOrder(24, 5, 0, 1, together=True), Unreadable()
    crop, normalise = Crop(16, "bilinear", 1.0), Normalise((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    judged = EvalFeed(rows, order, crop, normalise, workers=workers, device=torch.device("cpu"), unreadable=noted)
    assert sorted(int(r) for m in judged for r, w in zip(m.rows, m.weights, strict=True) if not w) == [7, 9]
    assert sorted(noted.found) == [7, 9]


# --- what changed, what is wrong --------------------------------------------------------------------------------------


def test_changed_shards_are_told_apart(shards: Path, tmp_path: Path) -> None:
    copy, note = tmp_path / "copy", tmp_path / "data.parquet"
    shutil.copytree(shards, copy)
    fingerprint.save(fingerprint.index(load(copy)), note)
    moved = shutil.copytree(copy, tmp_path / "moved")
    assert fingerprint.differences(note, fingerprint.index(load(moved))) is None

    table = pq.read_table(copy / "train-00001.parquet")
    labels = table["label"].to_pylist()
    labels[6] = (labels[6] + 1) % 3
    changed = table.set_column(1, table.schema.field(1), pa.array(labels))
    pq.write_table(changed, copy / "train-00001.parquet", row_group_size=ROW_GROUP)
    found = fingerprint.differences(note, fingerprint.index(load(copy)))
    assert found == "1 row group is with another label (train-00001.parquet: row group 1)"

    (moved / "train-00002.parquet").unlink()
    found = fingerprint.differences(note, fingerprint.index(load(moved)))
    assert found is not None
    assert "4 row groups are gone (train-00002.parquet: row group 0" in found
    limited = fingerprint.differences(note, fingerprint.index(load(shards, limit_train=30)))
    assert limited is not None
    assert "with another label" in limited


def test_a_shard_that_vanishes_or_changes_is_named(shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy")
    rows = load(copy, shuffle_gb=1e-6).train
    (copy / "train-00001.parquet").unlink()
    with pytest.raises(UserError, match=r"train-00001.parquet can't be read as it was.*it is not there.*--resume auto"):
        epoch_of(rows, BatchPlan(10, 10, 1), 0)
    shutil.copy(copy / "train-00000.parquet", copy / "train-00001.parquet")
    with pytest.raises(UserError, match=r"train-00001.parquet can't be read as it was"):
        content(rows)


def test_a_truncated_shard_is_named(shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy")
    for name in ("train-00002.parquet", "train-00000.parquet"):
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=rf"The shard .*{name} can't be read: .*(footer|magic)"):
            load(copy)
        (copy / name).write_bytes(whole)


def test_a_damaged_row_group_is_named(shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy")
    path = copy / "train-00000.parquet"
    place = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    damaged = bytearray(path.read_bytes())
    damaged[place : place + 400] = b"\xff" * 400
    path.write_bytes(damaged)
    rows = load(copy).train
    with pytest.raises(UserError, match=r"train-00000.parquet can't be read as it was"):
        content(rows)


def test_missing_columns_and_labels_are_named(shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy")
    table = pq.read_table(copy / "train-00001.parquet")
    pq.write_table(table.drop(["label"]), copy / "train-00001.parquet")
    with pytest.raises(UserError, match=r"train-00001.parquet lacks the column 'label'; it has image"):
        load(copy)
    hidden = table.set_column(1, table.schema.field(1), pa.array([-1, None] + [0] * 18))
    pq.write_table(hidden, copy / "train-00001.parquet")
    with pytest.raises(UserError, match=r"2 of 50 rows have no 'label'"):
        load(copy)
    pq.write_table(table, copy / "train-00001.parquet")
    with pytest.raises(UserError, match=r"--image-column 'imgae' is not a column.*Perhaps you meant 'image'"):
        load(copy, image_column="imgae")
    pq.write_table(picture_table([0, 1], classes=("cat", "yak")), copy / "val-00001.parquet")
    with pytest.raises(UserError, match=r"classes that train lacks in column 'label': yak"):
        load(copy)


def test_what_can_not_be_streamed_is_refused(tmp_path: Path, shards: Path) -> None:
    write_classes(tmp_path / "photos", {"cat": 2, "dog": 2})
    load(shards, streaming=False).eval.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/train-0.tar").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    expected = {
        "demo": "pictures in files, not parquet shards. Leave --streaming out",
        str(tmp_path / "photos"): "holds no parquet shards.*Leave --streaming out",
        str(tmp_path / "saved"): "saved dataset.*nothing to stream. Leave --streaming out",
        str(tmp_path / "tars"): "holds webdataset shards.*Convert them to parquet",
        str(tmp_path / "empty/*.parquet"): "no parquet files there",
        str(tmp_path / "absent/*.parquet"): "can't be listed",
        str(tmp_path / "absent"): "can't be listed",
        "memory://nothing/here": "can't be listed|no parquet files",
        "nonsense://x/y": "can't be listed",
    }
    for data, message in expected.items():
        with pytest.raises(UserError, match=message):
            load(data)


def test_notes_warn_of_sorted_data_and_of_large_row_groups(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "x", {"train": [40, 40, 40]}, ROW_GROUP, sort=True)
    size = pq.ParquetFile(root / "train-00000.parquet").metadata.row_group(0).column(0).total_uncompressed_size
    few, more = (load(root, hold_out=False, shuffle_gb=size * held / 1e9).notes for held in (3, 20))
    assert "of them shuffled at a time" in few[0]
    assert any("row groups fit into --shuffle-gb" in note for note in few)
    assert any("hold one class only" in note for note in more)
    assert not any("fit into" in note for note in more)
    mixed = write_shards(tmp_path / "y", {"train": [40, 40, 40]}, ROW_GROUP)
    assert len(load(mixed, hold_out=False, shuffle_gb=size * 20 / 1e9).notes) == 2  # and that all are evaluated
