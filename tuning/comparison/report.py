"""A comparison of runs for a person and for programs: tables, a picture, ``comparison.json``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from rich.markup import escape
from rich.table import Table

from tuning.comparison.paired import LEVEL, RESAMPLES, SEED
from tuning.comparison.runs import METRICS, Group, Match, judged_alike, rounded
from tuning.tracking import figures
from tuning.tracking.run_folder import write_atomically

COMPARISON, PICTURE = "comparison.json", "comparison.png"
WORDS = {"balanced_accuracy": "balanced accuracy", "top1": "top 1", "loss": "loss"}
LOG_WIDTH = 140  # of tables in a log file, characters
LONGEST_NAME, LETTERS = 48, "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def letter(number: int) -> str:
    """A short name of a group: A, B ... Z, group 27 ..."""
    return LETTERS[number] if number < len(LETTERS) else f"group {number + 1}"


def group_table(found: Sequence[Group]) -> Table:
    """One row a group: mean and spread over its seeds."""
    table = _table("Runs whose flags differ in the seed alone: mean ± standard deviation over seeds")
    for heading in ("", "flags", "seeds", *WORDS.values()):
        table.add_column(heading, justify="right" if heading in WORDS.values() else "left", overflow="fold")
    for number, group in enumerate(found):
        seeds = ", ".join(str(run.seed) for run in group.runs)
        table.add_row(letter(number), escape(group.name), seeds, *(_mean(group, metric) for metric in METRICS))
    return table


def _mean(group: Group, metric: str) -> str:
    spread = group.spread(metric)
    return f"{group.mean(metric):.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def run_table(found: Sequence[Group]) -> Table:
    """One row a run."""
    table = _table("Runs: the weights in model/ on every evaluation image")
    for heading in ("", "run", "seed", "images", *WORDS.values()):
        table.add_column(heading, justify="left" if heading in ("", "run") else "right")
    for number, group in enumerate(found):
        for run in group.runs:
            values = (f"{run.metrics[metric]:.4f}" for metric in METRICS)
            table.add_row(letter(number), escape(run.name), str(run.seed), f"{len(run.kept.ids):,}", *values)
    return table


def match_table(found: Sequence[Group], matched: Sequence[Match]) -> Table:
    """One row a pair of runs on the same images."""
    table = _table(f"Against {letter(0)} on the same images: difference with its {LEVEL:.0%} bootstrap interval")
    for heading in ("", "seeds", "balanced accuracy", "top 1", "only A right", "only it right", "McNemar p"):
        table.add_column(heading, justify="left" if heading in ("", "seeds") else "right")
    for match in matched:
        said = match.result
        seeds = str(match.first.seed) if match.first.seed == match.second.seed else _seeds(match)
        table.add_row(
            letter(list(found).index(match.group)),
            seeds,
            _signed(said.balanced_accuracy, said.balanced_accuracy_interval),
            _signed(said.top1, said.top1_interval),
            f"{said.only_first:,}",
            f"{said.only_second:,}",
            f"{said.p:.2g}",
        )
    return table


def _seeds(match: Match) -> str:
    return f"{match.first.seed} and {match.second.seed}"


def _signed(value: float, interval: tuple[float, float]) -> str:
    return f"{value:+.4f}  {interval[0]:+.4f} .. {interval[1]:+.4f}"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))


def notes(found: Sequence[Group], matched: Sequence[Match]) -> Iterator[str]:
    """What the numbers don't say by themselves."""
    for number, group in enumerate(found):
        own = [match.result for match in matched if match.group is group]
        if len(own) > 1:
            values = [one.balanced_accuracy for one in own]
            mean, spread = statistics.fmean(values), statistics.stdev(values)
            yield (
                f"{letter(number)} - {letter(0)} over {len(own)} seeds: balanced accuracy {mean:+.4f} ± {spread:.4f} "
                "(mean and standard deviation of the differences)."
            )
        if not judged_alike(group):
            yield (
                f"{letter(number)}: its seeds were judged on different images (the seed draws the split), so their "
                "spread holds that of the images, too."
            )
    if not matched:
        yield "All runs are repetitions of one another: there is nothing to test."
        return
    yield (
        "p and intervals speak of the images alone, not of another training; p is not corrected for the number of "
        "rows, and the images also chose each run's best weights."
    )


def to_json(found: Sequence[Group], matched: Sequence[Match]) -> dict[str, Any]:
    """Everything, as `json` can write it."""
    listed = [
        {
            "group": letter(number),
            "flags": group.name,
            "runs": [
                {"run": r.name, "seed": r.seed, "images": len(r.kept.ids), **_rounded(r.metrics)} for r in group.runs
            ],
            "mean": {metric: rounded(group.mean(metric)) for metric in METRICS},
            "std": {metric: rounded(group.spread(metric)) for metric in METRICS},
        }
        for number, group in enumerate(found)
    ]
    tests = [{"first": match.first.name, "second": match.second.name, **vars(match.result)} for match in matched]
    bootstrap = {"level": LEVEL, "resamples": RESAMPLES, "seed": SEED, "method": "percentile, paired"}
    return {"groups": listed, "paired": tests, "bootstrap": bootstrap}


def _rounded(metrics: dict[str, float]) -> dict[str, float | None]:
    return {name: rounded(value) for name, value in metrics.items()}


def write(folder: Path, found: Sequence[Group], matched: Sequence[Match]) -> None:
    """Write ``comparison.json`` and ``comparison.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    draw(found, matched, folder / PICTURE)
    write_atomically(folder / COMPARISON, json.dumps(to_json(found, matched), indent=1, ensure_ascii=False) + "\n")


def draw(found: Sequence[Group], matched: Sequence[Match], path: Path) -> None:
    """Every seed as a point, mean and spread as a bar; beside it the paired differences with their intervals."""
    panels = 3 if matched else 2
    height = 1.6 + 0.5 * max(len(found), len(matched))
    figure, axes = plt.subplots(1, panels, figsize=(4.2 * panels, height), layout="constrained")
    for place, metric in zip(axes, METRICS[:2], strict=False):
        _draw_groups(place, found, metric)
    names = [f"{letter(n)}  {_short(group.name)}" for n, group in enumerate(found)]
    axes[0].set_yticks(range(len(found)), names, fontsize=8, parse_math=False)
    axes[1].set_yticks(range(len(found)), [letter(n) for n in range(len(found))], fontsize=8)
    if matched:
        _draw_matches(axes[2], found, matched)
    figures.save(figure, path)


def _draw_groups(axes: Any, found: Sequence[Group], metric: str) -> None:
    for row, group in enumerate(found):
        values = [run.metrics[metric] for run in group.runs]
        axes.plot(values, [row] * len(values), "o", color="C0", alpha=0.5, markersize=6, markeredgewidth=0)
        axes.errorbar(group.mean(metric), row, xerr=group.spread(metric), fmt="|", color="black", capsize=4, ms=14)
    axes.set(xlabel=WORDS[metric], ylim=(len(found) - 0.4, -0.6))
    axes.grid(axis="x", alpha=0.3)


def _draw_matches(axes: Any, found: Sequence[Group], matched: Sequence[Match]) -> None:
    centre = np.array([match.result.balanced_accuracy for match in matched])
    ends = np.array([match.result.balanced_accuracy_interval for match in matched])
    rows = np.arange(len(matched))
    errors = np.abs(ends.T - centre)
    axes.errorbar(centre, rows, xerr=errors, fmt="o", color="C3", capsize=4, markersize=5)
    axes.axvline(0, color="grey", linewidth=0.8)
    names = [f"{letter(list(found).index(m.group))}, seed {m.second.seed}" for m in matched]
    axes.set_yticks(rows, names, fontsize=8)
    axes.set(xlabel=f"balanced accuracy minus that of {letter(0)}", ylim=(len(matched) - 0.4, -0.6))
    axes.grid(axis="x", alpha=0.3)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…"
