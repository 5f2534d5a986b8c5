"""A run goes on with the data it was started on, or not at all: order and draws belong to the rows."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from tuning.data import fingerprint
from tuning.data.sources import Data
from tuning.errors import UserError


def refuse_changed_data(accelerator: Accelerator, run_folder: Path, data: Data, resumed: bool) -> None:
    """Note in the run folder what the data is; when *resumed*, compare it with what it was. All processes take part.

    Args:
        resumed: the run goes on from a checkpoint; otherwise what an earlier try noted is replaced.

    Raises:
        UserError: on every process: the data changed (says how), or the note can't be written.
    """
    problem = _problem(run_folder / fingerprint.FILE, data, resumed) if accelerator.is_main_process else None
    problem = broadcast_object_list([problem])[0]
    if problem is not None:
        raise UserError(problem)


def _problem(path: Path, data: Data, resumed: bool) -> str | None:
    table = fingerprint.index(data)
    try:
        if not resumed or not path.exists():
            fingerprint.save(table, path)
            return None
        changed = fingerprint.differences(path, table)
    except OSError as error:
        return f"{path} can't be used: {error.strerror}."
    except UserError as error:
        return str(error)
    if changed is None:
        return None
    return (
        f"--resume: the data is not what this run was started on: {changed}. Put it back as it was, or start a new run "
        "in another --output."
    )
