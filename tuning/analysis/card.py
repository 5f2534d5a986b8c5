"""The data card of a report: where the pictures come from, how many there are of each class, how large they are."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tuning.analysis.mistakes import PerClass
from tuning.data.sources import Data
from tuning.data.tables import spread
from tuning.preflight.pictures import examine
from tuning.preflight.suspects import class_counts

SIZED = 200  # pictures of either part that are looked at for their size
CLASS_ROWS = 30  # shown of the table of classes


@dataclass(frozen=True)
class ClassRow:
    """One class: its name, its images in either part, and how it is recognised; None where nothing can be said."""

    name: str
    train: int
    judged: int
    recall: float | None
    precision: float | None
    f1: float | None


def class_rows(data: Data, counts: PerClass | None) -> list[ClassRow]:
    """Every class in the order of the class map; of more than `CLASS_ROWS`, those of the lowest recall first."""
    train, judged = (part.tolist() for part in class_counts(data).values())
    rows = [
        ClassRow(
            name,
            train[index],
            judged[index],
            counts.recall(index) if counts else None,
            counts.precision(index) if counts else None,
            counts.f1(index) if counts else None,
        )
        for index, name in enumerate(data.classes)
    ]
    if len(rows) > CLASS_ROWS:
        rows.sort(key=lambda row: 2.0 if row.recall is None else row.recall)
    return rows[:CLASS_ROWS]


def data_facts(data: Data, source: str) -> list[tuple[str, str]]:
    """Sentences about the data.

    Args:
        source: what ``--data`` named.
    """
    counts = class_counts(data)
    train, judged = counts["train"], counts["eval"]
    present = train[train > 0]
    return [
        ("source", source),
        ("split", f"{train.sum():,} training and {judged.sum():,} evaluation images"),
        ("classes", f"{len(data.classes):,}; from {present.min():,} to {present.max():,} training images each"),
        ("sizes, train", sizes(data.train)),
        ("sizes, evaluation", sizes(data.eval)),
        *(("note", note) for note in data.notes),
    ]


def sizes(rows: Any) -> str:
    """Widths, heights and encoded bytes, of all pictures or of `SIZED` evenly spaced ones."""
    numbers = spread(rows, SIZED).tolist()
    seen = [fact for fact in _examined(rows, numbers) if fact[0] > 0]
    if not seen:
        return "unknown: no picture could be read"
    widths, heights, weights = zip(*seen, strict=True)
    of = f" (of {len(numbers)} of {len(rows):,})" if len(numbers) < len(rows) else ""
    return f"width {_range(widths)}, height {_range(heights)} pixels, median {_bytes(statistics.median(weights))}{of}"


def _examined(rows: Any, numbers: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    for number in numbers:
        image: Mapping[str, Any] = rows[number]["image"]
        source = image["bytes"] if image["bytes"] is not None else image["path"]
        facts = examine(number, source, image_size=32, in_full=False)
        yield facts.width, facts.height, facts.size


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,} (median {statistics.median(values):,.0f})"


def _bytes(count: float) -> str:
    return f"{count / 1e3:,.1f} kB" if count < 1e6 else f"{count / 1e6:,.1f} MB"
