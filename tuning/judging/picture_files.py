"""The pictures that ``--images`` names: files, folders and globs, in the order in which they were typed."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence

from tuning.data.folders import PICTURES, Skipped, files_below
from tuning.errors import UserError, did_you_mean


def picture_files(asked: Sequence[str]) -> tuple[list[str], list[str]]:
    """Paths of all pictures, and sentences on what was left out.

    A folder stands for the pictures at any depth below it, by name; a glob (``**`` crosses folders) for what it
    matches; a file for itself, whatever its name ends in. Nothing is read yet.

    Raises:
        UserError: nothing of that name; a folder without pictures; a glob that matches none; a name that is not UTF-8.
    """
    if not asked:
        raise UserError("Give the pictures: --images FILE, FOLDER or 'GLOB', as many as you like.")
    found: list[str] = []
    notes: list[str] = []
    for name in asked:
        path = os.path.expanduser(name)
        if os.path.isdir(path):
            found += _below(name, path, notes)
        elif os.path.exists(path):
            found.append(path)
        elif glob.has_magic(path):
            found += _matching(name, path)
        else:
            raise UserError(f"--images {name}: there is no such file or folder.{_near(path)}")
    for path in found:
        if not path.isprintable() and "\udc80" <= max(path) <= "\udcff":
            raise UserError(f"--images: the name {path!a} is not UTF-8. Rename it.")
    return found, notes


def _below(name: str, folder: str, notes: list[str]) -> list[str]:
    skipped = Skipped()
    files = files_below(folder, PICTURES, skipped)
    notes += skipped.notes(name)
    if not files:
        raise UserError(
            f"--images {name}: the folder holds no pictures, at no depth. Looked for: {', '.join(sorted(PICTURES))}."
        )
    return files


def _matching(name: str, pattern: str) -> list[str]:
    files = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not files:
        raise UserError(f"--images {name}: no file matches this glob. Quote it, so that the shell leaves it alone.")
    return files


def _near(path: str) -> str:
    folder, name = os.path.split(path)
    try:
        return did_you_mean(name, os.listdir(folder or "."))
    except OSError:
        return ""
