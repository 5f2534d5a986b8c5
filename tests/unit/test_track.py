"""What trackers are handed: the records of ``metrics.jsonl``, at their optimizer steps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tuning.tracking.run_folder import RunFolder
from tuning.tracking.track import Curves


class Tracker:
    """Notes what it is handed."""

    def __init__(self, name: str) -> None:
        self.name, self.got = name, list[tuple[dict[str, Any], int | None]]()

    def log(self, values: dict[str, Any], step: int | None) -> None:
        self.got.append((values, step))


@pytest.mark.parametrize(("name", "steps"), [("tensorboard", [3, 7]), ("mlflow", [3, 7]), ("wandb", [None, None])])
def test_every_tracker_gets_the_step_but_wandb_whose_axes_are_its_own(
    tmp_path: Path, name: str, steps: list[int | None]
) -> None:
    tracker: Any = Tracker(name)
    main: Any = SimpleNamespace(is_main_process=True)
    faults: Any = None
    curves = Curves(main, RunFolder(tmp_path), tracker, 1, faults, 0)
    curves.write({"eval/top1": 0.5, "eval/loss": float("nan")}, 3, 0.5, 0)
    curves.write({"eval/top1": 0.6}, 7, 1.0, 0)
    curves.close()
    assert [step for _, step in tracker.got] == steps
    assert tracker.got[0][0] == {"step": 3, "epoch": 0.5, "stage": 0, "eval/top1": 0.5}
