"""`--cache`: decoded pictures kept in memory or on a disk, one copy for all processes and workers of a machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from io import FileIO
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from accelerate import Accelerator
from accelerate.utils import gather_object

from tuning.data.cached import CachedRows
from tuning.data.fingerprint import names, paths_and_sizes
from tuning.data.picture_store import Files, PictureStore, locks_are_there
from tuning.data.reduction import Reduction
from tuning.data.sources import Data
from tuning.data.tables import Table, encoded, label_array, spread
from tuning.data.transforms import CROP_AREA, Crop
from tuning.errors import UserError
from tuning.flags import Flags
from tuning.models.build import ModelInfo
from tuning.plan import StagePlan
from tuning.preflight.memory import free_memory_of_machine
from tuning.preflight.pictures import examine

FORMAT = 1  # of the files, and of what is done to pictures
SIZED = 200  # pictures of each part whose headers are read, to say how large the cache will be
MEMORY_SHARE, DISK_SHARE = 0.8, 0.95  # of what is free that the cache may take
SLACK = 1.25  # times the estimate at which a cache in memory stops to grow
DECODERS = ("torch", "torchvision", "pillow", "simplejpeg")  # whose versions may change pixels


_Found = tuple[str, str, dict[str, Files], list[int]]  # a problem, the sentence, the files, bytes of each part


@dataclass(frozen=True)
class _Part:
    """The training or the evaluation pictures.

    Attributes:
        name: ``train`` or ``eval``.
        reduction: what is done to them.
        bytes: about how many they take then; of the machine's first process.
    """

    name: str
    rows: Table
    reduction: Reduction
    bytes: int


def with_cache(
    accelerator: Accelerator, flags: Flags, data: Data, plan: Sequence[StagePlan], info: ModelInfo, *, dry: bool = False
) -> Data:
    """*data* whose pictures are decoded once, as ``--cache`` asks; as it is without. All processes take part.

    What is not there yet is added when it is first used, so the first epoch costs what it costs without a cache. Among
    `Data.notes` is then a sentence with the size and the place.

    Args:
        dry: only see whether it fits.

    Raises:
        UserError: on every process, when one machine hasn't the room, or not what it takes.
    """
    kind, folder = flags.batch.cache, flags.batch.cache_folder
    if kind == "none":
        return data
    first = accelerator.is_local_main_process
    parts = _parts(data, plan, info, measure=first)
    (problem, note, places), holds = _place(kind, folder, data, parts, dry) if first else (("", "", {}), ())
    sizes = [part.bytes for part in parts]
    _, note, places, sizes = _of_the_machine(accelerator, (problem, note, places, sizes))
    data = replace(data, notes=(*data.notes, note))
    if dry:
        return data
    parts = [replace(part, bytes=size) for part, size in zip(parts, sizes, strict=True)]
    kept = {part.name: _rows(part, places[part.name], holds, kind) for part in parts}
    accelerator.wait_for_everyone()  # until all have opened what the first process holds
    return replace(data, train=kept["train"], eval=kept["eval"])


def _place(
    kind: str, folder: str | None, data: Data, parts: Sequence[_Part], dry: bool
) -> tuple[tuple[str, str, dict[str, Files]], tuple[FileIO, ...]]:
    """A problem, or the sentence and the files of every part; and the open files that must be held."""
    try:
        if kind == "ram":
            note = _refuse_in_memory(parts)
            files, holds = ({}, ()) if dry else _in_memory(parts)
            return ("", note, files), holds
        place = _root(folder) / data.name
        files = _on_disk(parts, place, data.folder)
        return ("", _refuse_on_disk(parts, files, place, dry), files), ()
    except UserError as error:
        return (str(error), "", {}), ()
    except OSError as error:
        return (f"--cache {kind}: {error.filename or folder}: {error.strerror}.", "", {}), ()


def reductions(plan: Sequence[StagePlan], info: ModelInfo) -> tuple[Reduction, Reduction]:
    """What the plan allows to be done to training pictures, and to evaluation pictures, before they are kept."""
    judged = Crop(plan[-1].eval_size, info.interpolation, info.crop_pct)
    largest = max(size for planned in plan for size in (planned.eval_size, planned.image_size, planned.largest_size))
    widest = Crop(largest, info.interpolation, info.crop_pct)
    on_pictures = [planned for planned in plan if not planned.stage.cache_features and planned.stage.augment != "none"]
    random = {(planned.largest_size, CROP_AREA[planned.stage.augment][0]) for planned in on_pictures}
    return (
        Reduction(info.interpolation, widest.shorter_side, tuple(sorted(random)), largest),
        Reduction(info.interpolation, judged.shorter_side, (), judged.size),
    )


def _parts(data: Data, plan: Sequence[StagePlan], info: ModelInfo, measure: bool) -> list[_Part]:
    pairs = zip(("train", "eval"), (data.train, data.eval), reductions(plan, info), strict=True)
    return [_Part(name, rows, how, _estimated(rows, how) if measure else 0) for name, rows, how in pairs]


def _estimated(rows: Table, reduction: Reduction) -> int:
    """Bytes of all pictures when they are kept, from the headers of some; those that can't be read count nothing."""
    numbers, total = spread(rows, SIZED).tolist(), 0
    for number in numbers:
        image = rows[number]["image"]
        source = image["bytes"] if image["bytes"] is not None else image["path"]
        facts = examine(number, source, image_size=reduction.image_size, in_full=False)
        if facts.width > 0:
            height, width = reduction.kept_size(facts.height, facts.width)
            total += 3 * height * width
    return round(total / max(1, len(numbers)) * len(rows))


def _of_the_machine(accelerator: Accelerator, found: _Found) -> _Found:
    """What the first process of this process's machine found; the first problem of any machine is raised everywhere."""
    every: list[_Found] = gather_object([found])
    problems = [problem for problem, *_ in every if problem]
    if problems:
        raise UserError(problems[0])
    first = int(accelerator.process_index - accelerator.local_process_index)
    return every[first]


def _rows(part: _Part, files: Files, holds: tuple[FileIO, ...], kind: str) -> CachedRows:
    rows = encoded(part.rows)
    most = round(SLACK * part.bytes) if kind == "ram" else None
    try:
        store = PictureStore(files, len(rows), most, holds)
    except OSError as error:
        raise UserError(
            f"--cache {kind}: {error.filename}, made by the first process of this machine, can't be opened here "
            f"({error.strerror}). Use --cache disk, with a --cache-folder that all processes of the machine see."
        ) from error
    _, sizes = paths_and_sizes(rows)
    return CachedRows(rows, label_array(rows), store, part.reduction, outlives=kind == "disk" and sizes.null_count > 0)


def _in_memory(parts: Sequence[_Part]) -> tuple[dict[str, Files], tuple[FileIO, ...]]:
    """Files without a name in a folder: the kernel takes them back when the last process that has them open is gone,
    however it ended. Others open them by the number that they have in this process.
    """
    if not hasattr(os, "memfd_create"):
        other = "Use --cache disk, whose files the system keeps in memory, too" if locks_are_there() else "Leave it out"
        raise UserError(f"--cache ram needs Linux. {other}.")
    files = {
        part.name: [FileIO(os.memfd_create(f"pictures-{part.name}"), "r+") for _ in Files._fields] for part in parts
    }
    paths = {name: Files(*(f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in both)) for name, both in files.items()}
    return paths, tuple(file for both in files.values() for file in both)


def _on_disk(parts: Sequence[_Part], folder: Path, pictures: str | None) -> dict[str, Files]:
    """The files of these pictures, reduced in this way: whoever needs the same finds them."""
    if not locks_are_there():
        raise UserError("--cache needs file locks, which this system doesn't have. Leave it out.")
    stems = {part.name: folder / f"{part.name}-{_key(part, pictures)}" for part in parts}
    return {name: Files(f"{stem}.records", f"{stem}.pixels") for name, stem in stems.items()}


def _key(part: _Part, folder: str | None) -> str:
    """A digest of which pictures they are and what becomes of them."""
    rows = encoded(part.rows)
    files = [(file["filename"], os.stat(file["filename"])) for file in getattr(rows, "cache_files", ())]
    read = [(path, seen.st_size, seen.st_mtime_ns) for path, seen in files]
    about = FORMAT, part.reduction, _versions(), read, folder and os.path.realpath(folder)
    _, sizes = paths_and_sizes(rows)
    table = pa.record_batch([names(rows, folder), pc.fill_null(sizes, -1)], ["name", "bytes"])
    return xxhash.xxh3_64_hexdigest(repr(about).encode() + memoryview(table.serialize()))


def _versions() -> dict[str, str | None]:
    """Of what decodes and resizes: another version may give other pixels."""
    found = dict[str, str | None]()
    for name in DECODERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _refuse_in_memory(parts: Sequence[_Part]) -> str:
    """A sentence about the size; refuses what doesn't fit."""
    needed, free = sum(part.bytes for part in parts), free_memory_of_machine()
    if needed > MEMORY_SHARE * free:
        raise UserError(
            f"--cache ram needs about {_gb(needed)} of memory for {_counted(parts)}, and {_gb(free)} are free on this "
            f"machine, of which it may take {MEMORY_SHARE:.0%}. Use --cache disk, smaller pictures (--image-size, a "
            "weaker --augment), or leave it out."
        )
    return f"--cache ram: about {_gb(needed)} of memory for {_counted(parts)}, shared by all processes of a machine."


def _refuse_on_disk(parts: Sequence[_Part], places: Mapping[str, Files], folder: Path, dry: bool) -> str:
    """A sentence about size and place; refuses what doesn't fit. Makes the folder."""
    if not dry:
        folder.mkdir(parents=True, exist_ok=True)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(existing, os.W_OK):
        raise UserError(f"--cache disk: {existing} can't be written. Name another folder with --cache-folder.")
    present = sum(_size(places[part.name].pixels) for part in parts)
    needed, free = sum(part.bytes for part in parts), shutil.disk_usage(existing).free
    if needed - present > DISK_SHARE * free:
        raise UserError(
            f"--cache disk needs about {_gb(needed)} for {_counted(parts)}, {_gb(present)} of it are there, and "
            f"{_gb(free)} are free in {folder}. Name a folder on another disk with --cache-folder, delete old caches, "
            "take smaller pictures (--image-size, a weaker --augment), or leave it out."
        )
    others = sum(file.stat().st_size for file in folder.glob("*.pixels")) - present if folder.is_dir() else 0
    beside = f"; {_gb(others)} beside it belong to other sizes or parts of this data" if others else ""
    return f"--cache disk: about {_gb(needed)} for {_counted(parts)} in {folder}, {_gb(present)} are there{beside}."


def _root(folder: str | None) -> Path:
    if folder is not None:
        return Path(folder).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fine-tuning" / "pictures"


def _counted(parts: Sequence[_Part]) -> str:
    return f"{sum(len(part.rows) for part in parts):,} pictures"


def _size(path: str) -> int:
    return os.stat(path).st_size if os.path.exists(path) else 0


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
