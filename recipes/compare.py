"""Compare finished runs: mean and spread over seeds, and a paired test on the same images.

    python recipes/compare.py runs/a0 runs/a1 runs/b0 runs/b1       # a and b differ in a flag, 0 and 1 in their seed
    python recipes/compare.py runs/a runs/b --output runs/a-or-b

Reads what the runs kept; no model is built. Prints tables, writes comparison.json and comparison.png into --output.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from tuning.cli.plain_command import run_plain


@dataclass(frozen=True)
class Asked:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders of finished runs, two or more. The group of the first is what the others are compared with."""
    output: str | None = None
    """Folder for comparison.json and comparison.png. Default: runs/<time>-comparison."""


def compare(asked: Asked) -> None:
    """Compare finished runs: a table with seeds, mean and spread, and a paired test on the same images."""
    # The command line is known to be right by now; only here numpy and the rest are imported.
    from rich.console import Console

    from tuning.cli.outputs import refuse_used_folder
    from tuning.comparison.report import LOG_WIDTH, PICTURE, group_table, match_table, notes, run_table, write
    from tuning.comparison.runs import groups, matches, read_runs

    folder = Path(asked.output or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-comparison")
    refuse_used_folder(folder)

    # 1. The runs, and which of them are repetitions of one another.
    found = groups(read_runs(asked.runs))

    # 2. Every group against the first, image by image.
    matched = matches(found)

    # 3. For a person, and for programs.
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    for table in (group_table(found), run_table(found), *([match_table(found, matched)] if matched else [])):
        console.print(table)
        console.print()
    for note in notes(found, matched):
        console.print(f"note: {note}", markup=False)
    write(folder, found, matched)
    console.print(f"See {folder / PICTURE}.", markup=False)


if __name__ == "__main__":
    run_plain(compare, Asked, "recipes/compare.py")
