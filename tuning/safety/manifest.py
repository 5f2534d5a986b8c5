"""What a checkpoint's ``manifest.json`` says, and whether the files beside it are those that it lists."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuning.errors import UserError
from tuning.progress import Progress

MANIFEST = "manifest.json"
WEIGHTS, EMA, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.pt"
AVERAGE = "{}.safetensors"  # of averaged weights by name
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk, known to be readable.

    Attributes:
        folder: holds the files.
        progress: where the run stood.
        world_size: processes that made it.
        facts: what else its manifest says: versions, threads, digest of the flags.
    """

    folder: Path
    progress: Progress
    world_size: int
    facts: Mapping[str, Any]


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(manifest: Mapping[str, Any]) -> str:
    """Text of a ``manifest.json`` with a digest of itself: no digit of it can change unseen."""
    return json.dumps({**manifest, "sha256": _digest_of(manifest)}, indent=1)


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read(folder: Path) -> Checkpoint:
    """Check a checkpoint against its manifest, file by file.

    Raises:
        UserError: no manifest, or a file that is missing or differs from it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest.pop("sha256") != _digest_of(manifest):
            raise ValueError
        files = {str(name): (int(file["bytes"]), str(file["sha256"])) for name, file in manifest["files"].items()}
        progress, world_size = Progress.from_json(manifest["progress"]), int(manifest["world_size"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        raise UserError(
            f"{folder} is no complete checkpoint: {MANIFEST} is missing or damaged. --resume auto takes the newest "
            "good one."
        ) from None
    for name in (WEIGHTS, OPTIMIZER, *files):
        if name not in files or not _is_intact(folder / name, *files[name]):
            raise UserError(f"{folder}: {name} is missing or damaged. --resume auto takes the newest good one.")
    return Checkpoint(folder, progress, world_size, manifest)


def _is_intact(path: Path, size: int, sha256: str) -> bool:
    try:
        return path.stat().st_size == size and digest(path) == sha256
    except (OSError, ValueError):
        return False
