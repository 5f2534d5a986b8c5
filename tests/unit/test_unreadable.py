from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from pictures import write_classes
from ranks import run_ranks

from tuning.data.broken import Broken, why_gone
from tuning.data.loader import EvalFeed, TrainFeed
from tuning.data.sampling import EvalOrder, TrainOrder
from tuning.data.sources import Data, open_data
from tuning.data.transforms import Crop, Normalise
from tuning.errors import UserError
from tuning.safety.unreadable import UnreadablePictures
from tuning.sizes import BatchPlan

CROP, NORMALISE = Crop(8, "bilinear", 1.0), Normalise((0.5,) * 3, (0.5,) * 3)


def load(folder: Path) -> Data:
    return open_data(
        str(folder), image_column=None, label_column=None, train_split=None, eval_split=None,
        val_fraction=0.25, seed=0, limit_train=None, limit_eval=None,
    )  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Data:
    """30 + 10 pictures."""
    write_classes(tmp_path / "photos", {"cat": 20, "dog": 20})
    return load(tmp_path / "photos")


def train_feed(data: Data, unreadable: UnreadablePictures, workers: int = 0) -> TrainFeed:
    order = TrainOrder(len(data.train), 0, BatchPlan(batch_size=6, micro_batch=6, world_size=1), 0)
    return TrainFeed(
        data.train, order, CROP, NORMALISE, augment="light", flip="none", workers=workers,
        device=torch.device("cpu"), unreadable=unreadable.train,
    )  # fmt: skip


def eval_feed(data: Data, unreadable: UnreadablePictures, batch: int = 4) -> EvalFeed:
    order = EvalOrder(len(data.eval), batch, 0, 1)
    device = torch.device("cpu")
    return EvalFeed(data.eval, order, CROP, NORMALISE, workers=0, device=device, unreadable=unreadable.evaluation)


def path_of(rows: Any, row: int) -> Path:
    return Path(rows[row]["image"]["path"])


def collector(folder: Path, data: Data, limit: float = 0.01, *, resumed: bool = False) -> UnreadablePictures:
    return UnreadablePictures(Accelerator(cpu=True), folder, data, limit, resumed=resumed)


def listed(folder: Path) -> list[list[str]]:
    return [line.split("\t") for line in (folder / "unreadable.txt").read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_vanished_and_a_damaged_file_are_counted_and_listed(tmp_path: Path, data: Data, workers: int) -> None:
    path_of(data.train, 3).unlink()
    path_of(data.eval, 5).write_bytes(b"hello")
    unreadable = collector(tmp_path, data)
    for epoch in range(2):
        assert sum(float(micro.weights.sum()) for micro in train_feed(data, unreadable, workers).epoch(epoch)) == 30
        assert sum(float(micro.weights.sum()) for micro in eval_feed(data, unreadable)) == 9
        unreadable.check()
        assert len(unreadable.news()) == (2 if epoch == 0 else 0)
    assert unreadable.counts == {"train": 1, "eval": 1}
    gone, broken = listed(tmp_path)
    assert gone == ["train", "3", str(path_of(data.train, 3)), "No such file or directory"]
    assert broken[:3] == ["eval", "5", str(path_of(data.eval, 5))]


def test_one_may_be_unreadable_and_a_share(tmp_path: Path, data: Data) -> None:
    unreadable = collector(tmp_path, data, limit=0.1)
    for row in range(3):
        unreadable.train.found[row] = Broken(row, f"{row}.jpg", "bad")
        unreadable.check()  # 3 of 30 are 10 %
    unreadable.evaluation.found[0] = Broken(0, "e.jpg", "bad")
    unreadable.check()
    unreadable.train.found[1] = Broken(1, "1.jpg", "bad")  # again, as in the next epoch
    unreadable.check()
    unreadable.train.found[7] = Broken(7, "7.jpg", "cut off")
    with pytest.raises(UserError, match=r"(?s)4 of 30 training pictures.*--max-unreadable 0\.1 .*7\.jpg: cut off"):
        unreadable.check()


def test_the_message_shows_ten_and_the_list_holds_all(tmp_path: Path, data: Data) -> None:
    unreadable = collector(tmp_path, data)
    unreadable.train.found.update((row, Broken(row, f"{row}.jpg", "bad")) for row in range(14))
    with pytest.raises(UserError, match=r"(?s)14 of 30.*and 4 more.*unreadable\.txt") as caught:
        unreadable.check()
    assert str(caught.value).count(".jpg: bad") == 10
    assert len(listed(tmp_path)) == 14


def test_a_run_that_goes_on_keeps_the_list(tmp_path: Path, data: Data) -> None:
    first = collector(tmp_path, data)
    first.train.found[2] = Broken(2, "odd\tname\n猫.jpg", "bad")
    first.check()
    again = collector(tmp_path, data, resumed=True)
    assert again.counts == {"train": 1, "eval": 0}
    again.train.found[2] = Broken(2, "odd\tname\n猫.jpg", "bad")
    again.check()
    assert again.news() == []
    again.train.found[4] = Broken(4, "4.jpg", "bad")
    with pytest.raises(UserError, match="2 of 30"):
        again.check()
    assert listed(tmp_path) == [["train", "2", "odd?name?猫.jpg", "bad"], ["train", "4", "4.jpg", "bad"]]
    assert collector(tmp_path, data).counts == {"train": 0, "eval": 0}
    assert not (tmp_path / "unreadable.txt").exists()


def test_a_damaged_list_is_no_obstacle(tmp_path: Path, data: Data) -> None:
    (tmp_path / "unreadable.txt").write_bytes(b"train\t1\ta.jpg\tbad\n\xff\xfe\ntrain\tx\ty\tz\nnonsense\t1\ta\tb\n")
    assert collector(tmp_path, data, resumed=True).counts == {"train": 1, "eval": 0}


def test_a_list_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, data: Data) -> None:
    unreadable = collector(tmp_path / "nowhere", data)
    unreadable.train.found[2] = Broken(2, "2.jpg", "bad")
    unreadable.check()
    assert any("can't be written" in line for line in unreadable.news())


def test_evaluation_ends_before_the_whole_set_was_tried(
    tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuning.data.loader.CHECK_EVERY", 3)
    for row in range(len(data.eval)):
        path_of(data.eval, row).write_bytes(b"x")
    feed = iter(eval_feed(data, collector(tmp_path, data), batch=1))
    assert [float(next(feed).weights) for _ in range(2)] == [0.0, 0.0]
    with pytest.raises(UserError, match="3 of 10 evaluation pictures"):
        next(feed)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("how", ["removed", "emptied"])
def test_a_vanished_data_folder_ends_the_run_by_name(tmp_path: Path, data: Data, how: str, workers: int) -> None:
    unreadable = collector(tmp_path, data, limit=1.0)
    train, judge = train_feed(data, unreadable, workers), eval_feed(data, unreadable)
    shutil.rmtree(tmp_path / "photos")
    if how == "emptied":
        (tmp_path / "photos").mkdir()
    for batches in (train.epoch(0), iter(judge)):
        with pytest.raises(UserError, match=rf"pictures in {tmp_path / 'photos'} can't be read any more.*mounted"):
            list(batches)


def test_a_vanished_class_is_not_the_whole_folder(tmp_path: Path, data: Data) -> None:
    shutil.rmtree(tmp_path / "photos" / "cat")
    unreadable = collector(tmp_path, data)
    list(train_feed(data, unreadable).epoch(0))
    with pytest.raises(UserError, match="15 of 30 training pictures"):
        unreadable.check()


def test_why_a_folder_is_gone(tmp_path: Path) -> None:
    assert why_gone(str(tmp_path / "none")) == "No such file or directory"
    assert why_gone(str(tmp_path)) == "it is empty"
    (tmp_path / "file").touch()
    assert why_gone(str(tmp_path)) is None


def test_processes_agree_on_what_is_unreadable(tmp_path: Path, data: Data) -> None:
    assert run_ranks(2, _on_ranks, tmp_path, data) == [(["1.jpg: bad", "a.jpg: bad", "b.jpg: bad"], "3 of 30")] * 2
    assert len(listed(tmp_path)) == 4


def _on_ranks(folder: Path, data: Data) -> tuple[list[str], str]:
    accelerator = Accelerator(cpu=True)
    unreadable = UnreadablePictures(accelerator, folder, data, 0.07, resumed=False)
    unreadable.train.found[0] = Broken(0, "a.jpg", "bad")  # both
    unreadable.check()
    if accelerator.process_index == 1:
        unreadable.train.found[1] = Broken(1, "b.jpg", "bad")
        unreadable.evaluation.found[1] = Broken(1, "1.jpg", "bad")
    unreadable.check()
    news = sorted(unreadable.news())
    if accelerator.process_index == 0:
        unreadable.train.found[5] = Broken(5, "c.jpg", "bad")
    try:
        unreadable.check()
    except UserError as error:
        return news, str(error).partition(" training")[0]
    return news, "nothing"
