"""PNG pictures of a model's mistakes."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from PIL import Image

from tuning.analysis.overview import Case, Overview
from tuning.tracking import figures

LONGEST_NAME = 24  # characters of a class on an axis
ANNOTATED = 16  # classes up to which the cells hold their counts
COLUMNS, CAPTION = 6, 20  # of the sheet of mistakes; characters of a line under a picture


def draw_all(overview: Overview, folder: Path) -> None:
    """``confusion.png``, ``precision_recall.png`` and ``mistakes.png`` in *folder*; the last needs a mistake."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # names in scripts that the font lacks
        draw_confusion(overview, folder / "confusion.png")
        draw_precision_recall(overview, folder / "precision_recall.png")
        draw_cases(overview.worst, overview.classes, folder / "mistakes.png")


def short(name: str, length: int = LONGEST_NAME) -> str:
    """*name*, in its middle cut down to *length* characters."""
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[: length - 1 - half]}…{name[-half:]}"


def draw_confusion(overview: Overview, path: Path) -> None:
    """Rows: labels, columns: predictions; the colour is the share of the row, the number counts images.

    None where no pair of many classes was confused.
    """
    if not overview.drawn:
        path.unlink(missing_ok=True)
        return
    names = [short(overview.classes[index]) for index in overview.drawn]
    matrix, others = overview.confusion, len(overview.classes) - len(names)
    if others:
        names.append(f"{others:,} others")
    else:
        matrix = matrix[:-1, :-1]
    totals = matrix.sum(axis=1, keepdims=True)
    shares = np.divide(matrix, totals, out=np.zeros(matrix.shape), where=totals > 0)
    side = min(11.0, 3.2 + 0.34 * len(names))
    figure, axes = plt.subplots(figsize=(side + 1, side), layout="constrained")
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks, size = np.arange(len(names)), 8 if len(names) <= ANNOTATED else 10  # the larger picture is shown smaller
    axes.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor", fontsize=size, parse_math=False)
    axes.set_yticks(ticks, names, fontsize=size, parse_math=False)
    part = f"the {len(overview.drawn)} most confused of {len(overview.classes):,} classes" if others else ""
    axes.set(xlabel="predicted", ylabel="label", title=part)
    if len(names) <= ANNOTATED:
        _write_counts(axes, matrix, shares)
    figure.colorbar(image, ax=axes, label="share of the label's images", shrink=0.8)
    figures.save(figure, path)


def _write_counts(axes: Any, matrix: Any, shares: Any) -> None:
    for row, column in zip(*np.nonzero(matrix), strict=True):
        colour = "white" if shares[row, column] > 0.55 else "#223"
        count = f"{matrix[row, column]:,}"
        axes.text(column, row, count, ha="center", va="center", fontsize=8, color=colour)


def draw_precision_recall(overview: Overview, path: Path) -> None:
    """One curve a class, with its average precision; none where all images belong to one class."""
    if not overview.curves:
        path.unlink(missing_ok=True)
        return
    figure, axes = plt.subplots(figsize=(6, 4.6), layout="constrained")
    for one in overview.curves:
        label = f"{short(overview.classes[one.index])}  {one.area:.3f}".replace("$", r"\$")
        axes.plot(one.recall, one.precision, linewidth=1.5, label=label)
    part = len(overview.curves) < len(overview.classes)
    title = f"the {len(overview.curves)} classes with the most mistakes" if part else ""
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.02), title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, title="average precision", title_fontsize=8)
    figures.save(figure, path)


def draw_cases(cases: Sequence[Case], classes: Sequence[str], path: Path) -> None:
    """A sheet of pictures, each with its label and what it was taken for; an older sheet goes where there is none."""
    if not cases:
        path.unlink(missing_ok=True)
        return
    rows = -(-len(cases) // COLUMNS)
    figure, grid = plt.subplots(rows, COLUMNS, figsize=(10, 2.25 * rows), squeeze=False, layout="constrained")
    for axes, case in zip(grid.flat, [*cases, *[None] * (rows * COLUMNS - len(cases))], strict=True):
        axes.axis("off")
        if case is None:
            continue
        if case.picture is not None:
            axes.imshow(Image.open(io.BytesIO(case.picture)))
        told = f"{classes[case.label]}\ntaken for {short(classes[case.predicted], CAPTION)} {case.top:.0%}"
        lines = [textwrap.shorten(line, 2 * CAPTION, placeholder="…") for line in told.split("\n")]
        axes.set_title("\n".join(lines), fontsize=7, parse_math=False)
    figures.save(figure, path)
