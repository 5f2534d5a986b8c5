"""Folders of pictures: `train/` and `val/` with class folders, or class folders alone.

Quick for a million files (`listings`) and in the same order on every file system.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from tuning.data.listings import Listing, Listings, kind_of, scan
from tuning.data.splits import SPLIT_NAMES, choose_splits, judged_by_test
from tuning.data.tables import Opened, picture_dataset
from tuning.errors import UserError, did_you_mean

PICTURES = frozenset(("jpg", "jpeg", "jfif", "png", "bmp", "gif", "webp", "tif", "tiff", "ppm", "pgm"))


@dataclass
class Skipped:
    """Counts of what a scan left out, for one sentence to the user."""

    hidden: int = 0
    foreign: int = 0
    foreign_example: str = ""
    broken: int = 0
    broken_example: str = ""

    def add(self, listing: Listing) -> None:
        """Count what was left out in one folder, too."""
        self.hidden += listing.hidden
        self.foreign += listing.foreign
        self.broken += listing.broken
        self.foreign_example = listing.foreign_example or self.foreign_example
        self.broken_example = listing.broken_example or self.broken_example

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
    """The pictures of each class below one folder, classes and paths in order of their names.

    Attributes:
        files: of a class, the folders it has pictures in and their names there.
    """

    where: str
    files: dict[str, list[tuple[str, pa.StringArray]]] = field(default_factory=dict)
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
    listings = Listings(folder, PICTURES)
    names = list(listings.of(folder).folders)
    requested = [name for name in (train_split, eval_split) if name is not None]
    if any(name not in names for name in requested):
        return None
    if requested or any(name.lower() == "train" for name in names):
        opened = _open_parts(listings, folder, names, train_split, eval_split)
        if opened or requested:
            return opened
    return _open_classes(listings, folder)


def _open_parts(
    listings: Listings, folder: str, names: list[str], train_split: str | None, eval_split: str | None
) -> Opened | None:
    train_name, eval_name = choose_splits(names, train_split, eval_split, folder)
    train = scan_classes(os.path.join(folder, train_name), listings)
    if not train.files:
        return None
    notes = train.notes()
    judge = scan_classes(os.path.join(folder, eval_name), listings) if eval_name else None
    listings.keep()
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
    notes += judged_by_test(eval_name if judge else None, eval_split)
    classes = tuple(train.files)
    held_back = _dataset(judge, classes) if judge else None
    return Opened(_dataset(train, classes), held_back, classes, tuple(notes), folder)


def _open_classes(listings: Listings, folder: str) -> Opened | None:
    found = scan_classes(folder, listings)
    listings.keep()
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
    labels = {name: label for label, name in enumerate(classes)}
    unknown = [name for name in found.files if name not in labels]
    if unknown:
        raise UserError(
            f"{found.where} has classes that train lacks: {shorten(unknown)}; add pictures of them to train or "
            f"remove them.{did_you_mean(unknown[0], classes)}"
        )
    parts = [(labels[name], *part) for name, parts in found.files.items() for part in parts]
    counts = [len(names) for _, _, names in parts]
    starts = pa.array([os.path.join(folder, "") for _, folder, _ in parts], pa.string())
    names = pa.concat_arrays([names for _, _, names in parts])
    paths = pc.binary_join_element_wise(starts.take(pa.array(np.repeat(np.arange(len(parts)), counts))), names, "")
    return picture_dataset(paths, np.repeat([label for label, _, _ in parts], counts), classes)


def scan_classes(folder: str, listings: Listings) -> ClassFolders:
    """Collect the pictures at any depth below each sub-folder of *folder*; the sub-folder's name is the class."""
    top = listings.of(folder)
    result = ClassFolders(folder, loose=top.files.to_pylist())
    result.skipped.add(top)
    found: dict[str, list[tuple[str, pa.StringArray]]] = {}
    for name in top.folders:
        # macOS stores 'é' as two code points: the same class must have one name on every disk.
        parts = found.setdefault(unicodedata.normalize("NFC", name), [])
        for inner, listing in _walk(os.path.join(folder, name), listings.of):
            result.skipped.add(listing)
            if len(listing.files):
                parts.append((inner, listing.files))
    result.files = {name: found[name] for name in sorted(found) if found[name]}
    result.empty = sorted(name for name in found if not found[name])
    return result


def files_below(folder: str, extensions: frozenset[str], skipped: Skipped) -> list[str]:
    """Paths of the files with one of *extensions*, depth first by name; each real folder is entered once."""
    found: list[str] = []
    for inner, listing in _walk(folder, partial(scan, extensions=extensions)):
        skipped.add(listing)
        found += [os.path.join(inner, name) for name in listing.files.to_pylist()]
    return found


def _walk(folder: str, listed: Callable[[str], Listing]) -> Iterator[tuple[str, Listing]]:
    """Every folder from *folder* down and what it holds, depth first by name; each real folder is entered once."""
    seen = {_identity(folder)}
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        listing = listed(here)
        yield here, listing
        inner = [os.path.join(here, name) for name in listing.folders]
        fresh = [path for path in inner if _identity(path) not in seen]
        seen.update(map(_identity, fresh))
        waiting.extend(reversed(fresh))


def visible(folder: str) -> Iterator[os.DirEntry[str]]:
    """The folders and regular files in *folder* by name, links followed, without hidden ones and litter."""
    with os.scandir(folder) as entries:
        yield from sorted((e for e in entries if kind_of(e) in ("file", "folder")), key=lambda entry: entry.name)


def shorten(names: Iterable[str], most: int = 5) -> str:
    """`a, b, c` with the rest as a count."""
    listed = list(names)
    rest = f" and {len(listed) - most:,} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
