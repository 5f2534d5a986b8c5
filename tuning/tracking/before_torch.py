"""What is imported before torch, because then it takes a third of the time. Imports no torch."""

from __future__ import annotations

import os
from contextlib import suppress

from tuning.flags.run import RunFlags


def import_tracker(run: RunFlags) -> None:
    """Import what W&B imports when it starts a run, on the process that starts it; to be called first in a recipe.

    W&B builds sixty classes there, and the source of each is searched for among all modules that are loaded: a few
    hundred before torch, timm and datasets, some 4,000 after them.
    """
    if run.tracker == "wandb" and not run.dry_run and os.environ.get("RANK", "0") == "0":
        with suppress(ImportError):
            import wandb.sdk.launch.inputs.internal  # noqa: F401
