"""What a search found: a table, ``trials.csv``, ``best.yaml``, facts for ``summary.json``. Imports no torch."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from tuning.errors import UserError
from tuning.searching.launching import Ended
from tuning.searching.spaces import Space
from tuning.searching.studies import Outcome
from tuning.tracking.run_folder import CONFIG, write_atomically

BEST, TRIALS, CSV = "best.yaml", "trials", "trials.csv"
MOST_FAILURES = 3


def trial_folder(folder: Path, number: int) -> Path:
    """Run folder of a trial."""
    return folder / TRIALS / f"{number:04d}"


def best_of(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The best finished trial of *outcomes*, which come best first."""
    return next((outcome for outcome in outcomes if outcome.status == "done"), None)


def space_table(space: Space) -> Table:
    """A row a flag of the space: what is searched, then what is fixed."""
    shown = Table("flag", "values", title=f"{space.method} search for the best {space.metric}", box=None)
    for name, parameter in {**space.searched, **space.parameters}.items():
        shown.add_row(name.replace("_", "-"), escape(str(parameter)))
    if space.stopper:
        eta = f", then at every {space.stopper.eta} times as many" if space.stopper.kind == "hyperband" else ""
        shown.add_row("early end", f"{space.stopper.kind}, from evaluation {space.stopper.first}{eta}")
    return shown


def table(outcomes: Sequence[Outcome], metric: str) -> Table:
    """A row a trial, best first."""
    flags = _flags(outcomes)
    shown = Table("trial", metric, *(flag.replace("_", "-") for flag in flags), "seconds", "status", box=None)
    for one in outcomes:
        values = [_told(one.values[flag]) if flag in one.values else "" for flag in flags]
        status = one.status + (f": {_cut(one.reason)}" if one.reason else "")
        row = (str(one.number), "" if one.value is None else _told(one.value), *values, _whole(one.seconds), status)
        shown.add_row(*map(escape, row))
    return shown


def write(folder: Path, outcomes: Sequence[Outcome], metric: str) -> None:
    """``trials.csv`` and, if a trial is done, ``best.yaml``; replaces those of earlier."""
    flags, text = _flags(outcomes), io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["trial", metric, *flags, "seconds", "status", "reason"])
    for one in outcomes:
        values = [one.values.get(flag) for flag in flags]
        rows.writerow([one.number, one.value, *values, one.seconds, one.status, one.reason])
    write_atomically(folder / CSV, text.getvalue())
    best = best_of(outcomes)
    if best is not None:
        told = (
            f"# Trial {best.number} of {len(outcomes)}: {metric} {best.value:.6g}, the best of all and so too good.\n"
        )
        config = (trial_folder(folder, best.number) / CONFIG).read_text(encoding="utf-8")
        write_atomically(folder / BEST, told + config)


def facts(folder: Path, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """For ``summary.json``: the best trial, and how many ended how."""
    best = best_of(outcomes)
    return {
        "best": best
        and {
            "trial": best.number,
            "value": best.value,
            "flags": best.values,
            "run": str(trial_folder(folder, best.number)),
        },
        "trials": dict(Counter(outcome.status for outcome in outcomes)),
    }


def refuse_hopeless(outcomes: Sequence[Outcome], ended: Ended) -> None:
    """End a search in which nothing but failures is to be expected: none went well, and the last one says why.

    Raises:
        UserError: a mistake of the user's, or some failures with no trial that did better.
    """
    if ended.status == "failed" and all(outcome.status == "failed" for outcome in outcomes):
        if ended.mistake:
            raise UserError(f"the trial failed, and so would all: {ended.reason}")
        if len(outcomes) >= MOST_FAILURES:
            raise UserError(f"all of {len(outcomes)} trials failed. The last one: {ended.reason}")


def told_flags(values: Mapping[str, Any]) -> str:
    """Flags in a line for a person."""
    return " ".join(f"--{name.replace('_', '-')} {_told(value)}" for name, value in values.items())


def told(ended: Ended, outcomes: Sequence[Outcome]) -> str:
    """How a trial ended, in a line."""
    best = best_of(outcomes)
    value = f" {ended.value:.4g}" if ended.value is not None else f": {_cut(ended.reason)}" if ended.reason else ""
    so_far = f"; best so far {best.value:.4g}, trial {best.number}" if best else ""
    return f"{ended.status}{value} after {ended.seconds:.0f} s{so_far}"


def closing(folder: Path, best: Outcome, trials: int, metric: str, drawn: Sequence[str]) -> list[str]:
    """What to look at, and what to do next."""
    pictures = "".join(f", plots/{name}.png" for name in drawn)
    return [
        f"Best of {trials}: trial {best.number}, {metric} {best.value:.4g}, by {told_flags(best.values)}",
        "  The best of many is luck in part. Repeat it with other seeds before you believe the number:",
        f"    accelerate launch recipes/finetune.py --preset {folder / BEST} --seed 1",
        f"  {folder}: {CSV}, {BEST}{pictures}",
    ]


def _flags(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(flag for outcome in outcomes for flag in outcome.values))


def _told(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _whole(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.0f}"


def _cut(reason: str) -> str:
    line = " ".join(reason.split())
    return line if len(line) <= 80 else f"{line[:77]}..."
