"""Weights & Biases: the one module that names it. Imports no torch."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuning.errors import UserError
from tuning.flags.run import RunFlags


@dataclass(frozen=True)
class Chart:
    """A table, and how it is drawn.

    Attributes:
        name: of the curve or table, such as ``analysis/mistakes``.
        columns, rows: cells are text, numbers, or a JPEG as bytes; None where there is nothing.
        drawn_as: name of one of W&B's Vega charts; empty = the table itself is shown.
        fields: what the chart calls its columns -> ours.
        title: of the chart.
    """

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    drawn_as: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    title: str = ""


def import_tracker(run: RunFlags) -> None:
    """Import what W&B imports when it starts a run, on the process that starts it; to be called first in a recipe.

    W&B builds sixty classes there, and the source of each is searched for among all modules that are loaded: a few
    hundred before torch, timm and datasets, some 4,000 after them.
    """
    if run.tracker == "wandb" and not run.dry_run and os.environ.get("RANK", "0") == "0":
        with suppress(ImportError):
            import wandb.sdk.launch.inputs.internal  # noqa: F401


def settings(folder: Path, run_name: str | None, run_id: str | None) -> dict[str, Any]:
    """What W&B is started with: its files in the run's folder, offline where there is no login.

    Args:
        run_id: of the run to go on with.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_DATA_DIR", str(folder.resolve() / "wandb"))  # pictures of tables, until uploaded
    offline = "WANDB_MODE" not in os.environ and not _logged_in()
    return {
        "dir": str(folder),
        "name": run_name or folder.resolve().name,
        "id": run_id,
        "resume": "allow" if run_id else None,
        "mode": "offline" if offline else None,
    }


def name_axes(run: Any) -> None:
    """Curves are over optimizer steps, those of the LR finder over its learning rates."""
    run.define_metric("*", step_metric="step")
    for loss in ("loss", "race_loss"):
        run.define_metric(f"lr_finder/{loss}", step_metric="lr_finder/log10_lr")


def log_results(run: Any, summary: Mapping[str, Any], plots: Path, charts: Sequence[Chart]) -> None:
    """The summary, the pictures in the folder *plots* and the error analysis of a run that is over."""
    import wandb

    run.log({f"plots/{path.stem}": wandb.Image(str(path)) for path in sorted(plots.glob("*.png"))})
    run.summary.update(_flat(summary))
    _log_charts(run, charts)


def _log_charts(run: Any, charts: Sequence[Chart]) -> None:
    try:
        run.log({chart.name: _drawn(chart) for chart in charts})
    except Exception as error:  # their pictures go through a folder of W&B's own; the run is complete without them
        print(f"warning: W&B lacks the error analysis: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def _drawn(chart: Chart) -> Any:
    """The table for W&B, its pictures included, or the chart of it."""
    import wandb
    from PIL import Image

    def cell(value: Any) -> Any:
        return wandb.Image(Image.open(io.BytesIO(value)), file_type="jpg") if isinstance(value, bytes) else value

    table = wandb.Table(columns=list(chart.columns), data=[[cell(value) for value in row] for row in chart.rows])
    if not chart.drawn_as:
        return table
    return wandb.plot_table(chart.drawn_as, table, dict(chart.fields), {"title": chart.title})


def _flat(summary: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in summary.items():
        flat |= {f"{key}/{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return flat


def check_artifact() -> None:
    """Refuse to begin what ends with an upload to W&B that can't be made.

    Raises:
        UserError: W&B is offline or has no login.
    """
    if os.environ.get("WANDB_MODE", "online") != "online" or not _logged_in():
        raise UserError(
            "--push-wandb continues the training run, which W&B does online only, and here it has no login or is "
            "offline: run wandb login (and unset WANDB_MODE). --dry-run needs neither."
        )


def push_artifact(folder: Path, name: str, run_id: str, project: str, facts: Mapping[str, Any]) -> None:
    """Upload *folder* as a version of the artifact *name*, made by the training run *run_id*: that is its lineage.

    Raises:
        UserError: W&B refused; the export is complete.
    """
    import wandb

    try:
        with wandb.init(project=project, id=run_id, resume="must") as run:
            artifact = wandb.Artifact(name, type="model", metadata=dict(facts))
            artifact.add_dir(str(folder))
            run.log_artifact(artifact).wait()
    except (wandb.Error, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--push-wandb: W&B didn't take the artifact of run {run_id} ({reason}). The export is complete in "
            f"{folder}. A run that was tracked offline must be uploaded first: wandb sync."
        ) from error


def _logged_in() -> bool:
    """Whether W&B takes this run online; False without a login, and where it can't be reached or refuses the key."""
    import wandb

    try:
        return bool(wandb.login(prompt=False))
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        print(f"note: W&B runs offline ({reason}); wandb sync uploads the run later.", file=sys.stderr)
        return False
