"""Figures without a screen, and their way into a file."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt


def save(figure: Any, path: Path, tight: bool = False) -> None:
    """Write the picture and let it go; a disk that refuses costs the picture only.

    Args:
        tight: cut to what is drawn, or grow to it; for figures without a layout of their own.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        quick = {"compress_level": 1}  # a third of the time of a picture is its compression
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # its place in the picture shows it
            figure.savefig(path, dpi=110, bbox_inches="tight" if tight else None, pil_kwargs=quick)
    except OSError as error:  # a full disk; no run shall end for a picture
        print(f"warning: {path} can't be written ({error.strerror}).", file=sys.stderr)
    finally:
        plt.close(figure)
