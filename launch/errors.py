"""Errors meant for the person who typed the command."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class LaunchError(Exception):
    """Something the user must change: what is wrong, the value seen and the remedy. Exit status 2."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` Perhaps you meant 'x'.`` for the nearest of *known*, or an empty string when nothing is near."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Perhaps you meant {near[0]!r}." if near else ""
