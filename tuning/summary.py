"""``summary.json``: how a run ended, for scripts and for the closing lines."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tuning.records import number, read_records
from tuning.run_folder import RunFolder, git_commit

PACKAGES = ("torch", "torchvision", "timm", "accelerate", "datasets", "wandb")
HIGHER_IS_BETTER = {"top1": True, "balanced_accuracy": True, "loss": False}


def better(value: float, best: float | None, metric: str) -> bool:
    """Whether *value* of *metric* beats *best* (anything beats None, and a number beats NaN)."""
    if best is None or math.isnan(best):
        return best is None or not math.isnan(value)
    return value > best if HIGHER_IS_BETTER[metric] else value < best


def evaluations(metrics: Path, whose: str = "eval") -> list[dict[str, Any]]:
    """The evaluations in ``metrics.jsonl``, oldest first, without ``eval/`` (or ``eval_ema/``) before each name.

    A value that is no finite number is None.
    """
    found, prefix = [], f"{whose}/"
    for record in read_records(metrics):
        if f"{prefix}loss" in record:
            values = {key.removeprefix(prefix): number(v) for key, v in record.items() if key.startswith(prefix)}
            found.append({**values, "step": record["step"], "epoch": record.get("epoch")})
    return found


def make_summary(folder: RunFolder, best_of: str, best_by: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The summary of a finished run.

    Args:
        best_of: whose evaluations: ``eval`` or ``eval_ema``.
        best_by: metric that chose ``model/``.
        facts: what only the recipe knows: seconds, world size, numbers of images ...
    """
    judged = evaluations(folder.metrics, best_of)
    return {
        "status": "done",
        "best": _best(judged, best_by),
        "best_by": best_by,
        "best_of": best_of,
        "final": judged[-1] if judged else None,
        **facts,
        "versions": versions(),
        "git_commit": git_commit(),
    }


def _best(judged: Iterable[dict[str, Any]], best_by: str) -> dict[str, Any] | None:
    best, value_of_best = None, None
    for one in judged:
        value = one.get(best_by)
        value = math.nan if value is None else value
        if better(value, value_of_best, best_by):
            best, value_of_best = one, value
    return best


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that a result depends on; None for one that is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def is_done(folder: RunFolder) -> bool:
    """Whether the run in *folder* has come to its end."""
    return _read(folder).get("status") == "done"


def nothing_left(folder: RunFolder, step: int, last_step: int) -> bool:
    """Whether the run in *folder* is complete at *step*: its last one, or that at which evaluations ended it."""
    ends_here = step >= last_step or _read(folder).get("ended_early_at") == step
    return ends_here and is_done(folder) and folder.report.exists()


def _read(folder: RunFolder) -> dict[str, Any]:
    try:
        summary = json.loads(folder.summary.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return summary if isinstance(summary, dict) else {}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextmanager
def failure_noted(folder: RunFolder, is_main: bool) -> Iterator[None]:
    """Leave ``summary.json`` when the body raises: ``failed`` and the error, or ``preempted`` and the reason.

    A `KeyboardInterrupt` is a request to stop, its text the reason.
    """
    try:
        yield
    except BaseException as error:
        if is_main:
            _note(folder, error)
        raise


def _note(folder: RunFolder, error: BaseException) -> None:
    if isinstance(error, KeyboardInterrupt):
        summary = {"status": "preempted", "reason": str(error) or "Ctrl-C"}
    else:
        summary = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    try:
        folder.write_summary(summary)
    except OSError as unwritten:  # the disk may be what failed
        print(f"warning: {folder.summary} can't be written ({unwritten.strerror}): {summary}", file=sys.stderr)


def add_judged(folder: RunFolder, summary: Mapping[str, Any], judged: Mapping[str, Any]) -> dict[str, Any]:
    """The summary with what the last look at the best weights found, under ``judged``; written anew if there is any."""
    if not judged:
        return dict(summary)
    more = {**summary, "judged": dict(judged)}
    folder.write_summary(more)
    return more
