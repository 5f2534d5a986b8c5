"""What refuses a search before anything is written. Imports neither torch nor optuna."""

from __future__ import annotations

import importlib.util
import os

from tuning.errors import UserError
from tuning.flags import Flags
from tuning.searching.spaces import Space


def refuse_to_start(flags: Flags) -> None:
    """Refuse a search that can't be made here, or with these flags.

    Raises:
        UserError: names the remedy.
    """
    run = flags.run
    if importlib.util.find_spec("optuna") is None:
        raise UserError("recipes/sweep.py needs the package optuna: pip install optuna, or pip install -e '.[sweep]'.")
    if importlib.util.find_spec("fcntl") is None:
        raise UserError("recipes/sweep.py needs Linux or macOS: on Windows it could not stop a trial cleanly.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "recipes/sweep.py starts the launchers itself: run it by python, and give the processes of a trial by "
            '--launcher "--multi_gpu --num_processes 2".'
        )
    if flags.sweep.space is None:
        raise UserError("--space is missing: what to search. The names in recipes/sweeps/, or the path of such a file.")
    if flags.data.data == "demo" and run.preset is None and run.config is None:
        raise UserError("--data is missing: the demo sets its stages itself and can't be searched.")
    if run.resume not in ("never", "auto"):
        raise UserError(f"--resume {run.resume}: a search takes never, or auto with the --output of the search.")


def refuse_other_metric(space: Space, best_by: str) -> None:
    """Refuse to search by another metric than that which chooses the weights of a run.

    Raises:
        UserError: names both.
    """
    if space.best_by != best_by:
        raise UserError(
            f"--best-by {best_by} chooses the weights of a run, but {space.where} searches by {space.metric}. Give "
            f"--best-by {space.best_by}, or a copy of the file with the metric eval/{best_by}."
        )
