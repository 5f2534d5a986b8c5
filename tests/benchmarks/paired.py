"""Times of jobs that take turns, so that a machine that slows down slows every job down.

What they are good for is a ratio: its median over rounds, with the lowest and the highest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from tuning.tracking.hardware import hardware


def paired(jobs: Mapping[str, Callable[[], float | None]], pairs: int = 3) -> dict[str, list[float]]:
    """Run the jobs in turn, *pairs* rounds, the order turned around every other round.

    Returns:
        Of every job the seconds of each run, in the order of rounds: what it returned, or how long it took.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(pairs):
        names = list(jobs)
        for name in reversed(names) if number % 2 else names:
            began = time.perf_counter()
            returned = jobs[name]()
            seconds[name].append(time.perf_counter() - began if returned is None else returned)
    return seconds


def ratio(times: Mapping[str, list[float]], a: str, b: str) -> tuple[float, float, float]:
    """Median, lowest and highest of what *a* took by what *b* took in the same round."""
    ratios = [ours / theirs for ours, theirs in zip(times[a], times[b], strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


@dataclass(frozen=True)
class Row:
    """One line of a benchmark's table.

    Attributes:
        what: is compared.
        found: median, lowest and highest ratio, as `ratio` gives them.
        bar: what it should be, ">= 0.97" for one.
        note: absolute figures, for orientation.
    """

    what: str
    found: tuple[float, float, float]
    bar: str = ""
    note: str = ""


def hardware_line() -> str:
    """What the figures were measured on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return f"{hardware(device)}, torch {torch.__version__}"


def table(title: str, rows: Iterable[Row]) -> str:
    """The benchmark's results as Markdown: title, hardware and one line a comparison."""
    cells = [["measured", "ratio", "lowest to highest", "bar", "figures"], ["---"] * 5]
    for row in rows:
        median, lowest, highest = row.found
        cells.append([row.what, f"{median:.3g}", f"{lowest:.3g} to {highest:.3g}", row.bar, row.note])
    lines = "\n".join(f"| {' | '.join(cell)} |" for cell in cells)
    return f"{title}\n\n{hardware_line()}\n\n{lines}"
