"""Folders of pictures: `train/` and `val/` with class folders, or class folders alone.

Quick for a million files (one `scandir` a folder, no stat and no look into a picture) and in the same order on every
file system.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset

from tuning.data.splits import SPLIT_NAMES, choose_splits
from tuning.data.tables import Opened, picture_dataset
from tuning.errors import UserError, did_you_mean

PICTURES = frozenset(("jpg", "jpeg", "jfif", "png", "bmp", "gif", "webp", "tif", "tiff", "ppm", "pgm"))
LITTER = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "lost+found"))


@dataclass
class Skipped:
    """Counts of what a scan left out, for one sentence to the user."""

    hidden: int = 0
    foreign: int = 0
    foreign_example: str = ""
    broken: int = 0
    broken_example: str = ""

    def notes(self, where: str) -> Iterator[str]:
        """One sentence for each kind of thing that was left out below *where*."""
        if self.hidden:
            yield f"{where}: skipped hidden files or folders: {self.hidden:,}."
        if self.foreign:
            yield (
                f"{where}: skipped files without a picture's extension: {self.foreign:,}, "
                f"e.g. {self.foreign_example!r}."
            )
        if self.broken:
            yield (
                f"{where}: skipped broken links, special files or names that are not UTF-8: {self.broken:,}, "
                f"e.g. {self.broken_example!r}."
            )


@dataclass
class ClassFolders:
    """The pictures of each class below one folder, classes and paths in order of their names."""

    where: str
    files: dict[str, list[str]] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)
    loose: list[str] = field(default_factory=list)
    skipped: Skipped = field(default_factory=Skipped)

    def notes(self) -> list[str]:
        """What the user should know about this folder before training on it."""
        notes = list(self.skipped.notes(self.where))
        if self.empty:
            notes.append(f"{self.where}: left out class folders without pictures: {shorten(self.empty)}.")
        if self.loose:
            notes.append(f"{self.where}: left out pictures outside every class folder: {shorten(self.loose)}.")
        return notes


def open_pictures(folder: str, train_split: str | None, eval_split: str | None) -> Opened | None:
    """Open a folder of pictures; None where it holds no class folders with pictures, or lacks a requested sub-folder.

    Raises:
        UserError: for parts without class folders, or a class to evaluate that train lacks.
    """
    names = [entry.name for entry in visible(folder, Skipped()) if is_folder(entry)]
    requested = [name for name in (train_split, eval_split) if name is not None]
    if any(name not in names for name in requested):
        return None
    if requested or any(name.lower() == "train" for name in names):
        opened = _open_parts(folder, names, train_split, eval_split)
        if opened or requested:
            return opened
    return _open_classes(folder)


def _open_parts(folder: str, names: list[str], train_split: str | None, eval_split: str | None) -> Opened | None:
    train_name, eval_name = choose_splits(names, train_split, eval_split, folder)
    train = scan_classes(os.path.join(folder, train_name))
    if not train.files:
        return None
    notes = train.notes()
    judge = scan_classes(os.path.join(folder, eval_name)) if eval_name else None
    if judge is not None:
        notes += judge.notes()
        if not judge.files:
            if eval_split is not None:
                raise UserError(f"--eval-split {eval_split!r}: {judge.where} holds no class folders with pictures.")
            notes.append(f"{judge.where} holds no class folders with pictures and is not used.")
            judge = None
    unused = [name for name in names if name not in (train_name, eval_name)]
    if unused:
        notes.append(f"{folder}: folders that are not used: {shorten(unused)}.")
    classes = tuple(train.files)
    held_back = _dataset(judge, classes) if judge else None
    return Opened(_dataset(train, classes), held_back, classes, tuple(notes), folder)


def _open_classes(folder: str) -> Opened | None:
    found = scan_classes(folder)
    if not found.files:
        return None
    if all(name.lower() in SPLIT_NAMES for name in found.files):
        raise UserError(
            f"{folder} holds pictures in {shorten(found.files)}, but train/ needs one sub-folder a class with "
            "pictures in it: train/<class>/<picture>."
        )
    classes = tuple(found.files)
    return Opened(_dataset(found, classes), None, classes, tuple(found.notes()), folder)


def _dataset(found: ClassFolders, classes: tuple[str, ...]) -> Dataset:
    unknown = [name for name in found.files if name not in classes]
    if unknown:
        raise UserError(
            f"{found.where} has classes that train lacks: {shorten(unknown)}; add pictures of them to train or "
            f"remove them.{did_you_mean(unknown[0], classes)}"
        )
    paths = [path for files in found.files.values() for path in files]
    labels = np.repeat([classes.index(name) for name in found.files], [len(files) for files in found.files.values()])
    return picture_dataset(paths, labels, classes)


def scan_classes(folder: str) -> ClassFolders:
    """Collect the pictures at any depth below each sub-folder of *folder*; the sub-folder's name is the class."""
    result = ClassFolders(folder)
    found: dict[str, list[str]] = {}
    for entry in visible(folder, result.skipped):
        if is_folder(entry):
            # macOS stores 'é' as two code points: the same class must have one name on every disk.
            name = unicodedata.normalize("NFC", entry.name)
            found.setdefault(name, []).extend(files_below(entry.path, PICTURES, result.skipped))
        elif extension(entry.name) in PICTURES:
            result.loose.append(entry.name)
        else:
            result.skipped.foreign += 1
            result.skipped.foreign_example = entry.name
    result.files = {name: found[name] for name in sorted(found) if found[name]}
    result.empty = sorted(name for name in found if not found[name])
    return result


def files_below(folder: str, extensions: frozenset[str], skipped: Skipped) -> list[str]:
    """Paths of the files with one of *extensions*, depth first by name; each real folder is entered once."""
    found: list[str] = []
    seen = {_identity(folder)}
    waiting = [folder]
    while waiting:
        inner: list[str] = []
        for entry in visible(waiting.pop(), skipped):
            if is_folder(entry):
                inner.append(entry.path)
            elif extension(entry.name) in extensions:
                found.append(entry.path)
            else:
                skipped.foreign += 1
                skipped.foreign_example = entry.name
        fresh = [path for path in inner if _identity(path) not in seen]
        seen.update(map(_identity, fresh))
        waiting.extend(reversed(fresh))
    return found


def visible(folder: str, skipped: Skipped) -> Iterator[os.DirEntry[str]]:
    """The folders and regular files in *folder* by name, links followed, without hidden ones and litter."""
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        name = entry.name
        if name[0] == "." or name.lower() in LITTER:
            skipped.hidden += 1
        elif _is_sound(entry):
            yield entry
        else:
            skipped.broken += 1
            skipped.broken_example = ascii(name)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether *entry* is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def extension(name: str) -> str:
    """The extension in lower case without its dot; empty when there is none."""
    return name.rpartition(".")[2].lower() if "." in name else ""


def shorten(names: Iterable[str], most: int = 5) -> str:
    """`a, b, c` with the rest as a count."""
    listed = list(names)
    rest = f" and {len(listed) - most:,} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest


def _is_sound(entry: os.DirEntry[str]) -> bool:
    try:
        if not entry.name.isascii():
            entry.name.encode()
        return entry.is_file() or entry.is_dir()
    except (OSError, UnicodeEncodeError):
        return False


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
