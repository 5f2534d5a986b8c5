"""``summary.json``: how a run ended, for scripts and for the closing lines."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tuning.run_folder import RunFolder, git_commit

PACKAGES = ("torch", "torchvision", "timm", "accelerate", "datasets", "wandb")
HIGHER_IS_BETTER = {"top1": True, "balanced_accuracy": True, "loss": False}


def better(value: float, best: float | None, metric: str) -> bool:
    """Whether *value* of *metric* beats *best* (anything beats None, and a number beats NaN)."""
    if best is None or math.isnan(best):
        return best is None or not math.isnan(value)
    return value > best if HIGHER_IS_BETTER[metric] else value < best


def evaluations(metrics: Path) -> list[dict[str, Any]]:
    """The evaluations in ``metrics.jsonl``, oldest first, without the ``eval/`` before each name."""
    found = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "eval/loss" in record:
            numbers = {key.removeprefix("eval/"): value for key, value in record.items() if key.startswith("eval/")}
            found.append({"step": record["step"], "epoch": record["epoch"], **numbers})
    return found


def make_summary(folder: RunFolder, best_by: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The summary of a finished run.

    Args:
        best_by: metric that chose ``model/``.
        facts: what only the recipe knows: seconds, world size, numbers of images ...
    """
    judged = evaluations(folder.metrics)
    best: dict[str, Any] | None = None
    for one in judged:
        if better(one[best_by], best[best_by] if best else None, best_by):
            best = one
    return {
        "status": "done",
        "best": best,
        "best_by": best_by,
        "final": judged[-1] if judged else None,
        **facts,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "git_commit": git_commit(),
    }


@contextmanager
def failure_noted(folder: RunFolder, is_main: bool) -> Iterator[None]:
    """Leave ``status: failed`` (``preempted`` after Ctrl-C) and the error in ``summary.json`` when the body raises."""
    try:
        yield
    except BaseException as error:
        status = "preempted" if isinstance(error, KeyboardInterrupt) else "failed"
        if is_main:
            folder.write_summary({"status": status, "error": f"{type(error).__name__}: {error}"})
        raise
