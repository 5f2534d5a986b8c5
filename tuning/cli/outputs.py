"""Where a recipe writes: nothing that is there already is overwritten, and what can't be written is refused early."""

from __future__ import annotations

import os
from pathlib import Path

from tuning.errors import UserError


def refuse_used_folder(path: Path) -> None:
    """Refuse an ``--output`` folder with anything in it, and one that can't be made.

    Raises:
        UserError: names it.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"--output {path} is a file. Choose a folder.")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"--output {path} exists and is not empty. Choose another folder, or empty it.")
    _refuse_unwritable(path, next(p for p in (path, *path.absolute().parents) if p.exists()))


def refuse_used_file(path: Path, kinds: tuple[str, ...]) -> None:
    """Refuse an ``--output`` file that exists, of another kind than *kinds*, or in a folder that doesn't exist.

    Raises:
        UserError: names it.
    """
    if path.suffix.lower().removeprefix(".") not in kinds:
        raise UserError(f"--output {path}: the name must end in {', '.join(f'.{kind}' for kind in kinds)}.")
    if path.exists():
        raise UserError(f"--output {path} exists. Choose another name, or remove it.")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"--output {path}: the folder {folder} does not exist. Make it, or choose another.")
    _refuse_unwritable(path, folder)


def _refuse_unwritable(path: Path, existing: Path) -> None:
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"--output {path}: {existing} can't be written. Choose another --output.")
