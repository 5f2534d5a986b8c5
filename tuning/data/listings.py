"""What lies in a folder, one `scandir` each without a look into a file, and remembered from one run to the next.

A million files take seconds to list, and longer on a network disk. So what a large data folder holds is kept in a file
of the user's cache, and of every folder whose stamp (modification and change time, inode) is the same it is taken from
there: one stat a folder, of which a million files may have a thousand. A folder that changed is listed again, the
others are not. What the stamp of a folder can't tell is left out of the file: a change in the same tick of the clock
(folders changed within `SETTLED` seconds), and what the target of a link has become (folders with links).

The cache decides how quick it is and nothing else: no file, a damaged one or one that can't be written means listing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

LITTER = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "lost+found"))
FORMAT = b"1"  # of the file; another one is listed anew
LEAST = 20_000  # files below a folder that are worth a file in the cache
SETTLED = 2.0  # seconds without a change after which a change would show in the stamp; FAT counts in these
DIGEST = 32  # bytes

Kind = Literal["file", "folder", "hidden", "broken"]


@dataclass(frozen=True)
class Listing:
    """What one folder holds, without what lies deeper.

    Attributes:
        files: names of the files with a wanted extension, in order.
        folders: names of the folders and of links to folders, in order.
        hidden, foreign, broken: counts of what is neither: litter and hidden, other extensions, what can't be used.
        foreign_example, broken_example: the last of those names; empty where there is none.
    """

    files: pa.StringArray
    folders: tuple[str, ...]
    hidden: int = 0
    foreign: int = 0
    broken: int = 0
    foreign_example: str = ""
    broken_example: str = ""


_COLUMNS = pa.schema(
    {
        "path": pa.string(),
        "stamp": pa.string(),
        "files": pa.list_(pa.string()),
        "folders": pa.list_(pa.string()),
        "hidden": pa.int64(),
        "foreign": pa.int64(),
        "broken": pa.int64(),
        "foreign_example": pa.string(),
        "broken_example": pa.string(),
    }
)


def kind_of(entry: os.DirEntry[str]) -> Kind:
    """What an entry of a folder is, links followed."""
    name = entry.name
    if name[0] == "." or name.lower() in LITTER:
        return "hidden"
    try:
        if not name.isascii():
            name.encode()
        if entry.is_file():
            return "file"
        return "folder" if entry.is_dir() else "broken"
    except (OSError, UnicodeEncodeError):  # a link in a circle; a name that is not UTF-8
        return "broken"


def extension(name: str) -> str:
    """The extension in lower case without its dot; empty when there is none."""
    return name.rpartition(".")[2].lower() if "." in name else ""


def scan(folder: str, extensions: frozenset[str]) -> Listing:
    """List a folder."""
    return _scanned(folder, extensions)[0]


def _scanned(folder: str, extensions: frozenset[str]) -> tuple[Listing, bool]:
    """What a folder holds, and whether it has links."""
    names: dict[str, list[str]] = {kind: [] for kind in ("file", "folder", "hidden", "broken", "foreign")}
    links = False
    with os.scandir(folder) as entries:
        for entry in entries:
            kind: str = kind_of(entry)
            if kind == "file" and extension(entry.name) not in extensions:
                kind = "foreign"
            names[kind].append(entry.name)
            links = links or entry.is_symlink()
    foreign, broken = names["foreign"], names["broken"]
    listing = Listing(
        pa.array(sorted(names["file"]), pa.string()),
        tuple(sorted(names["folder"])),
        *(len(names["hidden"]), len(foreign), len(broken)),
        max(foreign, default=""),
        ascii(max(broken)) if broken else "",
    )
    return listing, links


class Listings:
    """The listings of a data folder and of all folders below it, as far as they are asked for.

    Args:
        root: the data folder.
        extensions: of the files that count.
    """

    def __init__(self, root: str, extensions: frozenset[str]) -> None:
        self._root, self._extensions = os.path.join(root, ""), extensions
        self._file = _cache_file(root, extensions)
        self._known = _read(self._file)
        self._asked: dict[str, Listing] = {}
        self._held: dict[str, tuple[str, Listing]] = {}
        self._news = False

    def of(self, folder: str) -> Listing:
        """What *folder* holds, which is the root or lies below it."""
        path = os.path.join(folder, "").removeprefix(self._root)
        if path not in self._asked:
            self._asked[path] = self._listed(path, folder)
        return self._asked[path]

    def _listed(self, path: str, folder: str) -> Listing:
        status, asked = os.stat(folder), time.time()
        stamp = f"{status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
        before, listing = self._known.get(path, ("", None))
        if listing is None or before != stamp:
            listing, links = _scanned(folder, self._extensions)
            if links or asked - max(status.st_mtime, status.st_ctime) < SETTLED:
                return listing
            self._news = True
        self._held[path] = stamp, listing
        return listing

    def keep(self) -> None:
        """Write what the next run may take over, if that is much and new."""
        if self._news and sum(len(listing.files) for _, listing in self._held.values()) >= LEAST:
            with contextlib.suppress(OSError):
                _write(self._file, self._held)


def _cache_file(root: str, extensions: frozenset[str]) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    named = "\0".join((os.path.realpath(root), *sorted(extensions)))
    name = hashlib.blake2b(named.encode(errors="surrogateescape"), digest_size=16).hexdigest()
    return cache / "fine-tuning" / "listings" / f"{name}.arrow"


def _write(file: Path, held: dict[str, tuple[str, Listing]]) -> None:
    """Replace the file as a whole: whoever reads or writes at the same time has one or the other."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = memoryview(_serialised(held))
    descriptor, aside = tempfile.mkstemp(prefix=f".{file.stem}-", dir=file.parent)
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(FORMAT)
            out.write(hashlib.blake2b(content, digest_size=DIGEST).digest())
            out.write(content)
        os.replace(aside, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise


def _serialised(held: dict[str, tuple[str, Listing]]) -> pa.Buffer:
    listings = [listing for _, listing in held.values()]
    ends = np.cumsum([0, *(len(listing.files) for listing in listings)])
    names = pa.concat_arrays([listing.files for listing in listings])
    columns = {
        "path": pa.array(held.keys(), pa.string()),
        "stamp": pa.array((stamp for stamp, _ in held.values()), pa.string()),
        "files": pa.ListArray.from_arrays(pa.array(ends, pa.int32()), names),
    }
    for name in _COLUMNS.names[len(columns) :]:
        columns[name] = pa.array((getattr(listing, name) for listing in listings), _COLUMNS.field(name).type)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, _COLUMNS, options=pa.ipc.IpcWriteOptions(compression="lz4")) as out:
        out.write(pa.record_batch(columns, schema=_COLUMNS))
    return sink.getvalue()


def _read(file: Path) -> dict[str, tuple[str, Listing]]:
    """``{path: (stamp, listing)}``; nothing where there is no file, or not one that was written as a whole."""
    try:
        content = memoryview(file.read_bytes())
    except OSError:
        return {}
    start = len(FORMAT) + DIGEST
    digest = hashlib.blake2b(content[start:], digest_size=DIGEST).digest()
    if content[:start] != FORMAT + digest:
        return {}
    with pa.ipc.open_file(pa.py_buffer(content[start:])) as opened:
        batch = opened.get_batch(0)
    return dict(_listings(batch))


def _listings(batch: pa.RecordBatch) -> Iterator[tuple[str, tuple[str, Listing]]]:
    files = batch.column("files")
    names, ends = files.values, files.offsets.to_numpy()
    paths, stamps, folders, *others = (batch.column(name).to_pylist() for name in _COLUMNS.names if name != "files")
    for row, (path, stamp) in enumerate(zip(paths, stamps, strict=True)):
        own = names.slice(ends[row], ends[row + 1] - ends[row])
        yield path, (stamp, Listing(own, tuple(folders[row]), *(column[row] for column in others)))
