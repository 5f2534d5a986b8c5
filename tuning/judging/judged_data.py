"""The images that a finished model is judged on, their labels as outputs of that model, and their names."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tuning.cli.coerce import read_yaml
from tuning.cli.run_defaults import is_same, run_of
from tuning.data import fingerprint
from tuning.data.sources import Data, open_data
from tuning.data.tables import Table, label_array
from tuning.errors import UserError
from tuning.flags import DataFlags
from tuning.judging.class_maps import outputs_for
from tuning.tracking.run_folder import CONFIG


def open_judged(flags: DataFlags, seed: int, run: str | None) -> tuple[Data, bool]:
    """The data to judge on, and whether it is the run's own, split as it was in training.

    Other data is judged on its evaluation split where it has one, else on all of its images.

    Args:
        flags: for the run's own data those of the run.
        seed: of the run.
        run: what ``--run`` names.

    Raises:
        UserError: from `open_data`.
    """
    folder = run_of(Path(run)) if run is not None else None
    own = folder is not None and is_same(flags.data, read_yaml(folder / CONFIG, str(folder / CONFIG)).get("data"))
    try:
        return open_data(**vars(flags), seed=seed, hold_out=own), own
    except UserError as error:
        if folder is None or not own:
            raise
        raise UserError(
            f"{error} It is the data of the run {run}; if it has moved, give its place as --data."
        ) from None


def changed_since(run: Path | None, data: Data) -> tuple[str, ...]:
    """A sentence on how the data of *run* differs from what it was when the run began, if it does."""
    if run is None or not (run / fingerprint.FILE).exists():
        return ()
    try:
        changed = fingerprint.differences(run / fingerprint.FILE, fingerprint.index(data))
    except (OSError, UserError) as error:
        changed = str(error)
    return (f"the data is not what the run was trained on: {changed}.",) if changed else ()


def labels_for(rows: Table, data: Data, classes: tuple[str, ...]) -> Tensor:
    """The label of every row as an output of the model: ``(N,)`` int64.

    Args:
        rows: a part of *data*; only classes that occur in it have to be known to the model.
        classes: of the model.

    Raises:
        UserError: from `outputs_for`.
    """
    labels = torch.from_numpy(label_array(rows).copy())
    present = sorted(set(labels.tolist()))
    place = torch.zeros(len(data.classes), dtype=torch.int64)
    place[present] = outputs_for([data.classes[number] for number in present], classes, f"--data {data.name}")
    return place[labels]
