"""``summary.json``: how a run ended, for scripts and for the closing lines."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tuning.tracking.records import number, read_records
from tuning.tracking.run_folder import RunFolder, git_commit

PACKAGES = ("torch", "torchvision", "timm", "accelerate", "datasets", "wandb")
HIGHER_IS_BETTER = {"top1": True, "balanced_accuracy": True, "macro_f1": True, "loss": False}


def better(value: float, best: float | None, metric: str) -> bool:
    """Whether *value* of *metric* beats *best* (anything beats None, and a number beats NaN)."""
    if best is None or math.isnan(best):
        return best is None or not math.isnan(value)
    return value > best if HIGHER_IS_BETTER[metric] else value < best


def best_value(judged: Mapping[str, Mapping[str, float]], best_of: Sequence[str], metric: str) -> float:
    """The best value of *metric* among those that choose ``model/``; of the raw weights before they begin."""
    best = None
    for whose in best_of:
        if whose in judged and better(judged[whose][metric], best, metric):
            best = judged[whose][metric]
    return judged["eval"][metric] if best is None else best


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


def contenders(best_of: str | None, ema_decay: float | None, swa_epochs: int) -> tuple[str, ...]:
    """Whose evaluations choose ``model/``, as they are called in the curves, in the order in which they are made.

    Args:
        best_of, ema_decay, swa_epochs: the flags of these names.
    """
    chosen = best_of or ("any" if swa_epochs else "ema" if ema_decay else "raw")
    kept = {"raw": "eval"} | ({"ema": "eval_ema"} if ema_decay else {}) | ({"swa": "eval_swa"} if swa_epochs else {})
    return tuple(kept.values()) if chosen == "any" else (kept[chosen],)


def make_summary(folder: RunFolder, best_of: Sequence[str], best_by: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The summary of a finished run.

    Args:
        best_of: from `contenders`; the summary names the one whose weights are in ``model/``.
        best_by: metric that chose ``model/``.
        facts: what only the recipe knows: seconds, world size, numbers of images ...
    """
    judged = {whose: evaluations(folder.metrics, whose) for whose in best_of}
    in_order = sorted(((one, whose) for whose in best_of for one in judged[whose]), key=lambda entry: entry[0]["step"])
    best, winner = _best(in_order, best_by)
    return {
        "status": "done",
        "best": best,
        "best_by": best_by,
        "best_of": winner or best_of[0],
        "final": next(iter(judged[winner or best_of[0]][-1:]), None),
        **facts,
        "versions": versions(),
        "git_commit": git_commit(),
    }


def _best(judged: Iterable[tuple[dict[str, Any], str]], best_by: str) -> tuple[dict[str, Any] | None, str | None]:
    """The best evaluation, and whose it is."""
    best, winner, value_of_best = None, None, None
    for one, whose in judged:
        value = one.get(best_by)
        value = math.nan if value is None else value
        if better(value, value_of_best, best_by):
            best, winner, value_of_best = one, whose, value
    return best, winner


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

    A `KeyboardInterrupt` is a request to stop, its text the reason; it gets the folder as a note, for the last words.
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
        error.add_note(str(folder.path))
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
