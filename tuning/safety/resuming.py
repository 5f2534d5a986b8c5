"""Where a run starts: in a folder of its own, or at the newest good checkpoint of an earlier part of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from tuning import session
from tuning.cli import launcher
from tuning.cli.coerce import read_yaml
from tuning.data.sources import Data
from tuning.flags import RunFlags
from tuning.progress import Progress
from tuning.safety import checkpoint
from tuning.safety.agreement import refuse_different_steps
from tuning.safety.data_check import refuse_changed_data
from tuning.safety.manifest import Checkpoint
from tuning.safety.saving import manifest_facts
from tuning.tracking import run_folder
from tuning.tracking.records import keep_until
from tuning.tracking.run_folder import RunFolder

RUNS = Path("runs")


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        folder: of the run.
        found: the checkpoint to go on from; None at the beginning.
        damaged: a sentence for every newer checkpoint that was passed over.
        facts: of this part of the run, for the manifests of its checkpoints.
    """

    folder: RunFolder
    found: Checkpoint | None
    damaged: tuple[str, ...]
    facts: Mapping[str, Any]

    @property
    def progress(self) -> Progress:
        """Where the run stands; what happens to it stays with the caller."""
        return Progress.from_json(self.found.progress.to_json()) if self.found else Progress()


def earlier_config(run: RunFlags) -> dict[str, Any] | None:
    """``config.yaml`` of the run that goes on; None where none does. The same on every process, which all take part."""
    output, resume = session.same_everywhere(launcher.first_start(run.output, run.resume, RUNS))
    if resume == "never":
        return None
    path = run_folder.choose(output, resume, "", "", 0.0).path / run_folder.CONFIG
    return session.same_everywhere(read_yaml(path, str(path)) if path.is_file() else None)


def locate(run: RunFlags, config: str, model: str, data: str, started: float) -> Start:
    """Find folder and checkpoint without writing anything. All processes take part.

    Args:
        config: content of ``config.yaml`` under today's flags.
        model, data: names for a folder that has none.
        started: `time.time()` at which the run began.

    Raises:
        UserError: the folder holds another run, was made under other flags, or is not the same for all processes.
    """
    output, resume = session.same_everywhere(launcher.first_start(run.output, run.resume, RUNS))
    folder = run_folder.choose(output, resume, model, data, session.same_everywhere(started))
    run_folder.refuse_other_run(folder, resume, config)
    found, damaged = checkpoint.find(folder.path, resume)
    refuse_different_steps(found.progress.step if found else None)
    facts = manifest_facts(config)
    checkpoint.refuse_other_config(found, facts)
    return Start(folder, found, tuple(damaged), facts)


def take_up(accelerator: Accelerator, start: Start, config: str, data: Data) -> None:
    """Make the folder ready to go on from exactly there: what came after is forgotten. All processes take part.

    Raises:
        UserError: another run is training in the folder, or the data has changed since the run began.
    """
    accelerator.wait_for_everyone()  # all have looked at the folder before rank 0 writes into it
    folder, step = start.folder, start.progress.step
    if accelerator.is_main_process:
        run_folder.lock(folder)
    refuse_changed_data(accelerator, folder.path, data, resumed=start.found is not None)
    if accelerator.is_main_process:
        folder.create(config)
        launcher.leave_token(folder.path)
        keep_until(folder.metrics, step)
        checkpoint.forget_after(folder.path, step)
