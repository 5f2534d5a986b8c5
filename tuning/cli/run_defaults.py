"""What recipes that open a finished run take over from it before the command line is read.

What only these recipes need is imported in the functions: every recipe reads this before it answers `--help`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tuning.cli.coerce import field_types, read_yaml
from tuning.flags import DataFlags

OPENING = ("recipes/evaluate.py", "recipes/predict.py", "recipes/export.py")
KEPT = (*field_types(DataFlags), "seed")  # the seed decides which pictures are held out


def run_of(folder: Path) -> Path | None:
    """The run that a folder belongs to: itself, or that of its ``model/``, a checkpoint or a snapshot."""
    from tuning.tracking.run_folder import CONFIG

    folder = folder.expanduser().resolve()
    above = {"model": folder.parent, "checkpoints": folder.parent.parent, "snapshots": folder.parent.parent}
    for found in (folder, above.get(folder.name), above.get(folder.parent.name)):
        if found is not None and (found / CONFIG).is_file():
            return found
    return None


def data_of_run(run: Path, data: str | None) -> tuple[dict[str, Any], str]:
    """The data flags of a run, and the file they stand in; none when *data* is other data than the run's.

    Args:
        run: what ``--run`` names.
        data: ``--data`` as typed; None = the run's own.

    Raises:
        UserError: the run's ``config.yaml`` can't be read.
    """
    from tuning.tracking.run_folder import CONFIG

    folder = run_of(run)
    if folder is None:
        return {}, ""
    config = read_yaml(folder / CONFIG, str(folder / CONFIG))
    if data is not None and not is_same(data, config.get("data")):
        return {}, ""
    values = {key: config[key] for key in KEPT if key in config}
    return {**values, **({} if data is None else {"data": data})}, str(folder / CONFIG)


def is_same(data: str, other: Any) -> bool:
    """Whether two values of ``--data`` name the same data."""
    if data == other:
        return True
    if not isinstance(other, str):
        return False
    one, two = (os.path.realpath(os.path.expanduser(path)) for path in (data, other))
    return os.path.exists(one) and one == two
