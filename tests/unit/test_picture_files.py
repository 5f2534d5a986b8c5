"""What ``--images`` names, in the order typed; what names nothing is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pictures import write_classes

from tuning.errors import UserError
from tuning.judging.picture_files import picture_files


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_classes(tmp_path / "in", {"b": 2, "a": 1})
    (tmp_path / "in" / "notes.txt").touch()
    (tmp_path / "in" / ".hidden.jpg").touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("photos")
def test_folders_files_and_globs_in_the_order_typed() -> None:
    found, notes = picture_files(["in/b/001.jpg", "in", "in/*/000.jpg", "in/notes.txt"])
    below = ["in/a/000.jpg", "in/b/000.jpg", "in/b/001.jpg"]
    assert found == ["in/b/001.jpg", *below, "in/a/000.jpg", "in/b/000.jpg", "in/notes.txt"]
    assert len(notes) == 2
    assert "notes.txt" in notes[1]
    assert picture_files(["in/**/*.jpg"])[0] == below


def test_a_file_may_be_named_like_a_glob(photos: Path) -> None:
    (photos / "in/a/000.jpg").rename(photos / "in/[1].jpg")
    assert picture_files(["in/[1].jpg"])[0] == ["in/[1].jpg"]


@pytest.mark.usefixtures("photos")
@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ([], "Give the pictures: --images"),
        (["empty"], "--images empty: the folder holds no pictures"),
        (["in", "emtpy"], "--images emtpy: there is no such file or folder. Perhaps you meant 'empty'"),
        (["in/*.gif"], "no file matches this glob"),
        (["nowhere/x.jpg"], "--images nowhere/x.jpg: there is no such file"),
    ],
)
def test_what_names_no_picture_is_refused(asked: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        picture_files(asked)
    assert words in str(caught.value)


def test_names_that_no_table_can_hold_are_refused(photos: Path) -> None:
    name = os.fsencode(photos / "in") + b"/\xff.jpg"
    Path(os.fsdecode(name)).touch()
    with pytest.raises(UserError, match="is not UTF-8"):
        picture_files([os.fsdecode(name)])
