"""Steps that were left out because something was not finite: counted, and the run ended with what to look at."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tuning.data.tables import Table, names_of
from tuning.engine import Step
from tuning.errors import UserError
from tuning.progress import Progress
from tuning.tracking.run_folder import write_atomically


class NumericalFaults:
    """Counts steps with a loss or gradient that is not finite; the same on every process.

    Args:
        limit: such steps in a row that end the run.
        folder: gets ``step-XXXXXXXX.json`` of the first of these steps: images, learning rates, what was seen.
        rows: training images.
        writes: whether this process writes the file.
    """

    def __init__(self, limit: int, folder: Path, rows: Table, writes: bool) -> None:
        self._limit, self._folder, self._rows, self._writes = limit, folder, rows, writes
        self._first: tuple[Step, float, float] | None = None

    def count(self, step: Step, loss: float, grad_norm: float, progress: Progress) -> None:
        """Count *step* in *progress* if it was left out.

        Raises:
            UserError: too many in a row.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            progress.skipped_in_a_row, self._first = 0, None
            return
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        self._first = self._first or (step, loss, grad_norm)
        if progress.skipped_in_a_row >= self._limit:
            self._end(progress)

    def _end(self, progress: Progress) -> None:
        assert self._first is not None
        step, loss, grad_norm = self._first
        path = self._folder / f"step-{step.step:08d}.json"
        if self._writes:
            self._folder.mkdir(parents=True, exist_ok=True)
            described = self._described(step, progress.stage) | {"loss": str(loss), "grad_norm": str(grad_norm)}
            write_atomically(path, json.dumps(described, indent=1) + "\n")
        raise UserError(
            f"{progress.skipped_in_a_row} optimizer steps in a row had a loss or gradient that is not finite, first "
            f"step {step.step} in stage {progress.stage + 1} (loss {loss}, gradient norm {grad_norm}, head LR "
            f"{max(step.lrs.values()):.3g}); its images are listed in {path}. Lower --lr, add --warmup-epochs, lower "
            "--clip-norm, or look at these images."
        )

    def _described(self, step: Step, stage: int) -> dict[str, Any]:
        rows = step.rows
        names = names_of(self._rows, rows)
        place = {"step": step.step, "epoch": step.place[0], "stage": stage, "lr": step.lrs}
        return {**place, "rows": rows, "images": names}
