"""`--data`: a folder, shards, a Hugging Face dataset or the demo, opened as train, eval and one class map."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tuning.data import elpv, parquet, shards
from tuning.data.folders import open_pictures, shorten, visible
from tuning.data.listings import extension
from tuning.data.splits import stratified_split, stratified_subset
from tuning.data.tables import Opened, Table, label_array, take
from tuning.errors import UserError, did_you_mean

DEMO = "demo"


@dataclass(frozen=True)
class Data:
    """What a run trains on and is judged by.

    `train` and `eval` have two columns, `image` (`{'bytes', 'path'}`, never decoded) and `label` (an index into
    `classes`, the one class map, from train). `notes` are sentences for the plan; `name` serves run folders; `folder`
    is set where every picture is a file of its own below it.
    """

    name: str
    train: Table
    eval: Table
    classes: tuple[str, ...]
    notes: tuple[str, ...]
    folder: str | None = None


def open_data(
    data: str,
    *,
    image_column: str | None,
    label_column: str | None,
    train_split: str | None,
    eval_split: str | None,
    val_fraction: float,
    seed: int,
    limit_train: int | None,
    limit_eval: int | None,
    streaming: bool = False,
    shuffle_gb: float = 2.0,
    hold_out: bool = True,
) -> Data:
    """Open the images and labels that *data* names; the same arguments give the same rows in the same order everywhere.

    Args:
        data: a folder, a Hugging Face dataset id, or the word `demo`.
        image_column, label_column: columns of a table; None finds them.
        train_split, eval_split: splits or sub-folders; None finds them.
        val_fraction: the part of each class held out where there is no split to evaluate on, in (0, 1).
        seed: of the held-out part and of the limits.
        limit_train, limit_eval: keep at most this many images, stratified by class; None keeps all.
        streaming: read parquet shards where they lie, a row group at a time.
        shuffle_gb: 10^9 bytes of streamed pictures that are shuffled at a time.
        hold_out: hold a part out where there is no split to evaluate on; else all images are evaluated, whatever their
            classes.

    Raises:
        UserError: for anything wrong with the arguments or the data.
    """
    _check_numbers(val_fraction, limit_train, limit_eval)
    if streaming and data == DEMO:
        raise UserError(f"--data {DEMO} is pictures in files, not parquet shards. {parquet.LEAVE_OUT}.")
    where = data, image_column, label_column, train_split, eval_split
    try:
        opened = parquet.open_streamed(*where, shuffle_gb) if streaming else _open(*where)
    except OSError as error:
        raise UserError(f"--data {data!r} cannot be read: {error.filename}: {error.strerror}.") from error
    notes = list(opened.notes)
    train, judge = opened.train, opened.eval
    if hold_out:
        _check_train(data, train, opened.classes)
    if judge is None and not hold_out:
        notes.append(f"No split to evaluate on: all {len(train):,} images are evaluated.")
        judge = train
    if judge is None:
        train, judge = _hold_out(data, train, opened.classes, val_fraction, seed, notes)
    if len(judge) == 0:
        raise UserError(f"--data {data!r}: the evaluation split has no images; name another with --eval-split.")
    train = _limit(train, limit_train, seed, "--limit-train", notes)
    judge = _limit(judge, limit_eval, seed, "--limit-eval", notes)
    _note_missing(train, judge, opened.classes, notes)
    return Data(_short_name(data), train, judge, opened.classes, tuple(notes), opened.folder)


def image_name(example: Mapping[str, Any], row: int | None = None) -> str:
    """A name that a person can find an image by: its path or, where it has none, its row in the dataset."""
    image = example.get("image")
    path = image.get("path") if isinstance(image, Mapping) else None
    if path:
        return str(path)
    return "an image without a name" if row is None else f"row {row}"


def _open(
    data: str, image_column: str | None, label_column: str | None, train_split: str | None, eval_split: str | None
) -> Opened:
    if data == DEMO:
        ignored = _ignored(image_column, label_column, train_split, eval_split)
        if os.path.isdir(DEMO):
            ignored.append("The word demo means the built-in photos; for the folder of that name give ./demo.")
        return _with_notes(elpv.open_demo(), ignored)
    folder = os.path.expanduser(data)
    if not os.path.exists(folder):
        return shards.open_hub(data, image_column, label_column, train_split, eval_split)
    if not os.path.isdir(folder):
        raise UserError(f"--data {data!r} is a file; give the folder that holds the class folders or the shards.")
    if shards.is_saved(folder):
        return shards.open_saved(folder, image_column, label_column, train_split, eval_split)
    pictures = open_pictures(folder, train_split, eval_split)
    if pictures is not None:
        return _with_notes(pictures, _ignored(image_column, label_column, None, None))
    table = shards.open_shards(folder, image_column, label_column, train_split, eval_split)
    return table if table is not None else _nothing_found(folder, train_split, eval_split)


def _ignored(
    image_column: str | None, label_column: str | None, train_split: str | None, eval_split: str | None
) -> list[str]:
    flags = {
        "--image-column": image_column,
        "--label-column": label_column,
        "--train-split": train_split,
        "--eval-split": eval_split,
    }
    return [f"{flag} {value!r} has no effect on this data." for flag, value in flags.items() if value is not None]


def _with_notes(opened: Opened, notes: list[str]) -> Opened:
    return replace(opened, notes=(*opened.notes, *notes))


def _nothing_found(folder: str, train_split: str | None, eval_split: str | None) -> Opened:
    """Raise the error that says most about a folder without a usable layout."""
    entries = list(visible(folder))
    names = [entry.name for entry in entries if entry.is_dir()]
    for flag, wanted in (("--train-split", train_split), ("--eval-split", eval_split)):
        if wanted is not None and wanted not in names:
            has = shorten(names) or "none"
            raise UserError(
                f"{flag} {wanted!r} is not a sub-folder of {folder}, which has: {has}.{did_you_mean(wanted, names)}"
            )
    expected = "expected class folders with pictures, train/ and val/ with class folders, or parquet/arrow/tar shards"
    files = [entry.name for entry in entries if not entry.is_dir()]
    if any(extension(name) in ("zip", "gz", "tgz", "7z", "rar") for name in files):
        raise UserError(f"{folder} holds archives but no pictures in folders; unpack them first ({shorten(files)}).")
    if files:
        raise UserError(f"{folder} has no class folders with pictures, only files ({shorten(files)}); {expected}.")
    raise UserError(f"{folder} holds no pictures: {expected}.")


def _check_numbers(val_fraction: float, limit_train: int | None, limit_eval: int | None) -> None:
    if not 0 < val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction} must lie between 0 and 1, for example 0.2.")
    for flag, limit in (("--limit-train", limit_train), ("--limit-eval", limit_eval)):
        if limit is not None and limit < 1:
            raise UserError(f"{flag} {limit} must be at least 1; leave it out to use all images.")


def _check_train(data: str, train: Table, classes: tuple[str, ...]) -> None:
    present = np.unique(label_array(train))
    if len(present) < 2:
        raise UserError(
            f"--data {data!r} has only one class with images, {classes[present[0]]!r}, and needs two or more; if the "
            "classes are folders further down, point --data at the folder that holds them."
        )


def _hold_out(
    data: str, train: Table, classes: tuple[str, ...], fraction: float, seed: int, notes: list[str]
) -> tuple[Table, Table]:
    labels = label_array(train)
    kept, held = stratified_split(labels, fraction, seed)
    if len(held) == 0:
        raise UserError(
            f"--data {data!r} has one image in each class, so nothing can be held out to evaluate on; add images."
        )
    counts = np.bincount(labels, minlength=len(classes))
    single = [classes[index] for index in np.flatnonzero(counts == 1)]
    if single:
        notes.append(f"Classes with one image, which stays in train: {shorten(single)}.")
    notes.append(
        f"No split to evaluate on: {len(held):,} of {len(labels):,} images are held out "
        f"(--val-fraction {fraction:g}, stratified, seed {seed})."
    )
    return take(train, kept), take(train, held)


def _limit(dataset: Table, limit: int | None, seed: int, flag: str, notes: list[str]) -> Table:
    if limit is None or limit >= len(dataset):
        return dataset
    labels = label_array(dataset)
    present = len(np.unique(labels))
    if limit < present and flag == "--limit-train":
        raise UserError(f"--limit-train {limit} is less than the {present} classes; give each at least one image.")
    notes.append(f"{flag}: {limit:,} of {len(dataset):,} images are used.")
    return take(dataset, stratified_subset(labels, limit, seed))


def _note_missing(train: Table, judge: Table, classes: tuple[str, ...], notes: list[str]) -> None:
    for part, verb in ((train, "train on"), (judge, "evaluate on")):
        counts = np.bincount(label_array(part), minlength=len(classes))
        missing = [name for name, count in zip(classes, counts, strict=True) if not count]
        if missing:
            notes.append(f"Classes without an image to {verb}: {shorten(missing)}.")


def _short_name(data: str) -> str:
    folder = os.path.expanduser(data)
    name = os.path.basename(os.path.abspath(folder)) if data != DEMO and os.path.isdir(folder) else data
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "data"
