"""Tables of pictures: parquet, arrow and webdataset shards, saved datasets, and the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import datasets
import huggingface_hub.utils.logging as hub_logging
from datasets import Dataset, DatasetDict
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from tuning.data.columns import standardise
from tuning.data.folders import Skipped, files_below, shorten
from tuning.data.listings import extension
from tuning.data.splits import SPLIT_NAMES, choose_splits, judged_by_test
from tuning.data.tables import Opened
from tuning.errors import UserError, did_you_mean

KINDS = {"parquet": "parquet", "arrow": "arrow", "tar": "webdataset"}
# load_dataset takes these for "any such files in the current folder", which nobody means by --data.
FORMATS = frozenset(("arrow", "csv", "imagefolder", "json", "parquet", "text", "webdataset", "xml"))
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def is_saved(folder: str) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote this folder."""
    files = set(os.listdir(folder))
    return "dataset_dict.json" in files or {"dataset_info.json", "state.json"} <= files


def open_saved(
    folder: str, image_column: str | None, label_column: str | None, train_split: str | None, eval_split: str | None
) -> Opened:
    """Open a folder written by `save_to_disk`, mapped into memory where it lies."""
    try:
        with _quiet():
            loaded = datasets.load_from_disk(folder)
    except Exception as error:
        raise UserError(f"{folder} looks like a saved dataset but cannot be read: {_first_line(error)}") from error
    parts = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
    return _open_parts(parts, folder, image_column, label_column, train_split, eval_split)


def open_hub(
    name: str, image_column: str | None, label_column: str | None, train_split: str | None, eval_split: str | None
) -> Opened:
    """Open a data set of the Hugging Face hub, from the local cache where it is there.

    Raises:
        UserError: when *name* is neither a folder nor reachable.
    """
    if name in FORMATS or not HUB_ID.fullmatch(name):
        raise UserError(f"--data {name!r}: there is no such folder.{_near_folder(name)}")
    try:
        with _quiet():
            parts = datasets.load_dataset(name)
    except Exception as error:
        raise UserError(
            f"--data {name!r} is neither an existing folder nor a Hugging Face dataset that can be reached "
            f"({_first_line(error)}).{_near_folder(name)}"
        ) from error
    return _open_parts(parts, name, image_column, label_column, train_split, eval_split)


def open_shards(
    folder: str, image_column: str | None, label_column: str | None, train_split: str | None, eval_split: str | None
) -> Opened | None:
    """Open a folder of shards, through the cache of `datasets`; None when it holds none.

    The split of a shard is the sub-folder it lies in (`train/0.parquet`) or the start of its name
    (`train-00000-of-00003.parquet`); shards that name none belong to train.
    """
    files = files_below(folder, frozenset(KINDS), Skipped())
    if not files:
        return None
    kinds = sorted({extension(path) for path in files})
    if len(kinds) > 1:
        raise UserError(f"{folder} holds shards of several kinds ({', '.join(kinds)}); keep one kind in a folder.")
    wanted, train, judge, notes = choose_shards(files, folder, train_split, eval_split)
    loaded = {name: _load_shards(KINDS[kinds[0]], paths) for name, paths in wanted.items()}
    opened = _open_parts(loaded, folder, image_column, label_column, train, judge)
    return Opened(opened.train, opened.eval, opened.classes, (*opened.notes, *notes))


def choose_shards(
    files: list[str], folder: str, train_split: str | None, eval_split: str | None
) -> tuple[dict[str, list[str]], str, str | None, list[str]]:
    """The shards of the splits to use, the name of the one to train on, of the one to evaluate on, and notes.

    Raises:
        UserError: from `choose_splits`.
    """
    requested = [name for name in (train_split, eval_split) if name is not None]
    parts, stray = _shards_by_split(files, folder, {*SPLIT_NAMES, *requested})
    train, judge = choose_splits(sorted(parts), train_split, eval_split, folder)
    wanted = {name: parts[name] for name in (train, judge) if name is not None}
    unused = [name for name in sorted(parts) if name not in wanted] + [os.path.basename(path) for path in stray]
    notes = [f"{folder}: splits or shards that are not used: {shorten(unused)}."] if unused else []
    notes += judged_by_test(judge, eval_split)
    return wanted, train, judge, notes


def _shards_by_split(files: list[str], folder: str, known: set[str]) -> tuple[dict[str, list[str]], list[str]]:
    parts: dict[str, list[str]] = {}
    nameless: list[str] = []
    for path in files:
        split = _split_of(os.path.relpath(path, folder), known)
        (nameless if split is None else parts.setdefault(split, [])).append(path)
    if nameless and "train" not in parts:
        parts["train"], nameless = nameless, []
    return parts, nameless


def _split_of(path: str, known: set[str]) -> str | None:
    *folders, name = path.split(os.sep)
    for part in folders:
        if part in known or part.lower() in known:
            return part
    stem = name.rpartition(".")[0]
    fitting = [split for split in known if re.match(rf"{re.escape(split)}(?![A-Za-z])", stem, re.IGNORECASE)]
    return max(fitting, key=len) if fitting else None


def _load_shards(kind: str, paths: list[str]) -> Dataset:
    try:
        with _quiet():
            loaded: Dataset = datasets.load_dataset(kind, data_files={"train": paths}, split="train")
    except Exception as error:
        cause = error.__cause__ or error  # the builder wraps the reason
        raise UserError(
            f"The {kind} shards in {os.path.dirname(paths[0])} cannot be read: {_first_line(cause)}"
        ) from error
    return loaded


def _open_parts(
    parts: Mapping[str, Dataset],
    where: str,
    image_column: str | None,
    label_column: str | None,
    train_split: str | None,
    eval_split: str | None,
) -> Opened:
    train, judge = choose_splits(list(parts), train_split, eval_split, where)
    opened = standardise(parts[train], parts[judge] if judge else None, image_column, label_column)
    unused = [name for name in parts if name not in (train, judge)]
    notes = [f"{where}: splits that are not used: {shorten(unused)}."] if unused else []
    notes += judged_by_test(judge, eval_split)
    return Opened(opened.train, opened.eval, opened.classes, tuple(notes))


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no log lines from the data libraries; their settings are put back afterwards."""
    level, hub_level = datasets.logging.get_verbosity(), hub_logging.get_verbosity()
    bars_off, hub_bars_off = datasets.utils.are_progress_bars_disabled(), are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    hub_logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if not bars_off:
            datasets.enable_progress_bars()
        if not hub_bars_off:
            enable_progress_bars()


def _near_folder(name: str) -> str:
    parent = os.path.dirname(name) or "."
    if not os.path.isdir(parent):
        return ""
    near = [entry.name for entry in os.scandir(parent) if entry.is_dir()]
    return did_you_mean(os.path.basename(name), near)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
