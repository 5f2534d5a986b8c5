"""What the tracker already holds of a run that goes on, so that its curves get every record once.

``metrics.jsonl`` is the truth. A killed run may have handed the tracker more than the checkpoint it goes on from, or
less: W&B's offline file loses what was not flushed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, WandBTracker

from tuning.tracking.records import OTHER, order

Has = Callable[[Mapping[str, Any]], bool]
TIMEOUT_SECONDS = 120


def history(tracker: GeneralTracker | None, folder: Path, step: int) -> Has:
    """A function that tells whether the tracker holds a record of ``metrics.jsonl`` from an earlier part of the run.

    W&B online says which step it has seen last; offline, its files are read. TensorBoard is told by `open_tracker` to
    forget what comes after the checkpoint, and everything before has been flushed with it.

    Args:
        folder: of the run.
        step: optimizer steps completed when the run goes on.
    """
    if not isinstance(tracker, WandBTracker):
        return lambda record: record["step"] < step
    seen = None if tracker.run.offline else tracker.run.summary.get("step")
    if isinstance(seen, int):
        return lambda record: order(record) <= (seen, OTHER, 0)
    offline = offline_records(folder / "wandb", tracker.run.id)
    return lambda record: order(record) in offline


def offline_records(folder: Path, run_id: str) -> set[tuple[int, int, int]]:
    """Places (`records.order`) of the records in W&B's offline files of a run; a killed run's file ends somewhere."""
    found: set[tuple[int, int, int]] = set()
    for segment in sorted(folder.glob(f"offline-run-*-{run_id}")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(segment)]
        try:
            lines = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS).stdout.splitlines()
        except (OSError, subprocess.SubprocessError):
            continue
        found |= {place for place in map(_place, lines) if place is not None}
    return found


def _place(line: str) -> tuple[int, int, int] | None:
    try:
        record = json.loads(line)["history"]["item"]
        return order(record) if isinstance(record["step"], int) else None
    except (ValueError, KeyError, TypeError):
        return None
