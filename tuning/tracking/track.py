"""Curves: every step and every evaluation to ``metrics.jsonl`` and to the tracker, under the same names."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, WandBTracker
from accelerate.utils import broadcast_object_list

from tuning.cli.checks import flat
from tuning.cli.command_line import Command
from tuning.engine import Step
from tuning.errors import UserError
from tuning.flags import RunFlags, TrackerName
from tuning.progress import Progress
from tuning.safety.numerical_faults import NumericalFaults
from tuning.tracking import weights_and_biases
from tuning.tracking.records import RecordFile, read_records
from tuning.tracking.run_folder import RunFolder
from tuning.tracking.tracker_history import history
from tuning.tracking.weights_and_biases import Chart


class Curves:
    """Writes the curves of one run. All processes call it, at the same steps; rank 0 writes.

    Losses and gradient norms stay on the device until `flush`, which waits for the device once.

    Args:
        every: optimizer steps between flushes.
        faults: counts the steps that were left out, and ends the run when there are too many.
        step: optimizer steps completed when the run goes on. The tracker is handed what it lacks of those before.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: RunFolder,
        tracker: GeneralTracker | None,
        every: int,
        faults: NumericalFaults,
        step: int,
    ) -> None:
        self._tracker, self._every, self._faults = tracker, every, faults
        self._steps: list[tuple[Step, int]] = []
        self._window_start = time.perf_counter()
        self._trained = (0, 0.0)  # images, seconds
        self._file = RecordFile(folder.metrics) if accelerator.is_main_process else None
        self.latest: dict[str, float] = {}
        if accelerator.is_main_process:
            self._tracker_has = history(tracker, folder.path, step)
            for record in read_records(folder.metrics):
                self._hand_over(record)

    def add(self, step: Step, progress: Progress) -> None:
        """Keep one step's values; `flush` every `every` steps and at the end of a stage."""
        self._steps.append((step, progress.stage))
        if len(self._steps) >= self._every or step.ends_stage:
            self.flush(progress)

    def flush(self, progress: Progress) -> None:
        """Write the kept steps.

        Raises:
            UserError: too many steps in a row were left out.
        """
        if not self._steps:
            return
        rows = torch.stack([torch.stack((s.loss, s.grad_norm.float())) for s, _ in self._steps]).tolist()
        speed = self._speed(sum(step.images for step, _ in self._steps))
        steps, self._steps = self._steps, []
        for (step, stage), (loss, norm) in zip(steps, rows, strict=True):
            values = {"train/loss": loss, "train/grad_norm": norm, **{f"lr/{n}": lr for n, lr in step.lrs.items()}}
            if step.image_size is not None:
                values["train/image_size"] = step.image_size
            if step is steps[-1][0]:
                values |= {"perf/images_per_second": speed, "perf/memory_gb": memory_gb()}
                values["perf/micro_batch"] = step.order.batch.micro_batch
            self.write(values, step.step, step.epoch, stage)
            self._faults.count(step, loss, norm, progress)
        top = steps[-1][0]
        self.latest = {"loss": rows[-1][0], "lr": max(top.lrs.values(), default=0.0), "images_per_second": speed}

    def begin_stage(self, name: str, progress: Progress) -> None:
        """Mark the start of a stage in the curves, once also in a run that went on within the stage."""
        if progress.stage_step == 0:
            self.write({"stage/name": name}, progress.step, progress.epoch, progress.stage)
        self._resume_clock()

    def write_evaluation(
        self,
        judged: Mapping[str, Mapping[str, float]],
        epoch: float,
        progress: Progress,
        counts: Mapping[str, float] | None = None,
    ) -> None:
        """The metrics of one evaluation as ``eval/...`` and ``eval_ema/...``; the time it took is no training time.

        Args:
            judged: ``{"eval": metrics of the raw weights, "eval_ema": of the averaged ones}``.
            counts: what follows from it, such as ``stage/waiting``.
        """
        values = {f"{whose}/{name}": value for whose, metrics in judged.items() for name, value in metrics.items()}
        self.write({**values, **(counts or {})}, progress.step, epoch, progress.stage)
        self._resume_clock()

    def writer_at(self, progress: Progress) -> Callable[[Mapping[str, float], int], None]:
        """A function that writes the numbered records of an LR finder at the place where the run stands."""

        def write(values: Mapping[str, float], number: int) -> None:
            self.write({"lr_finder/number": number, **values}, progress.step, progress.epoch, progress.stage)

        return write

    def _resume_clock(self) -> None:
        self._window_start = time.perf_counter()

    @property
    def images_per_second(self) -> float | None:
        """Training speed over the run so far, all processes together; None before the first step."""
        images, seconds = self._trained
        return images / seconds if seconds else None

    def write(self, values: Mapping[str, float | str | None], step: int, epoch: float, stage: int) -> None:
        """One line of ``metrics.jsonl`` and one record of the tracker."""
        if self._file is None:
            return
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
        record = {"step": step, "epoch": round(epoch, 6), "stage": stage, **finite}
        self._file.append(record)
        self._hand_over(record)

    def _hand_over(self, record: Mapping[str, Any]) -> None:
        if self._tracker is not None and not self._tracker_has(record):
            logged = {key: value for key, value in record.items() if value is not None}
            # W&B has axes of its own (`name_axes`), and a step of its own would put records in another order.
            self._tracker.log(logged, step=None if self._tracker.name == "wandb" else record["step"])

    def sync(self) -> None:
        """Put the records on the disk, before a checkpoint that counts on them; on rank 0."""
        if self._file is not None:
            self._file.sync()
        if self._tracker is not None and self._tracker.name == "tensorboard":
            self._tracker.writer.flush()

    def close(self) -> None:
        """No more records will come."""
        if self._file is not None:
            self._file.close()

    def finish(self, summary: Mapping[str, Any], plots: Path, charts: Sequence[Chart] = ()) -> None:
        """Hand the summary, the pictures in the folder *plots* and the error analysis to W&B; rank 0 only."""
        if isinstance(self._tracker, WandBTracker):
            weights_and_biases.log_results(self._tracker.run, summary, plots, charts)

    def _speed(self, images: int) -> float:
        now = time.perf_counter()
        seconds, self._window_start = now - self._window_start, now
        self._trained = (self._trained[0] + images, self._trained[1] + seconds)
        return images / seconds


def memory_gb() -> float:
    """Memory of this process in GB: peak on the GPU when there is one, else resident now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return float(psutil.Process().memory_info().rss) / 1e9


def described(command: Command, accelerator: Accelerator) -> dict[str, Any]:
    """What is trained, for the tracker: every flag, the stages as they were resolved, processes and precision."""
    stages = {f"stage_{n}": str(vars(stage)) for n, stage in enumerate(command.stages)}
    hardware = {"world_size": accelerator.num_processes, "mixed_precision": accelerator.mixed_precision}
    return {**flat(command.flags), **stages, **hardware}


def check_tracker(name: TrackerName) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        UserError: names the package.
    """
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UserError(
            f"--tracker {name}: the package {name} is not installed. pip install {name}, or --tracker none."
        )


def open_tracker(
    accelerator: Accelerator, run: RunFlags, folder: RunFolder, config: Mapping[str, Any], progress: Progress
) -> GeneralTracker | None:
    """Accelerate's tracker for this run, started on rank 0. W&B without a login runs offline, without a question.

    Args:
        config: what is trained, shown beside the curves.
        progress: where the run goes on: in the same run of W&B; TensorBoard forgets what comes from that step on.
    """
    name = run.tracker
    if name == "none":
        return None
    settings: dict[str, Any] = {}
    if name == "wandb" and accelerator.is_main_process:
        settings = {"wandb": weights_and_biases.settings(folder.path, run.run_name, progress.tracker_id)}
    elif name == "tensorboard" and progress.step:
        settings = {"tensorboard": {"purge_step": progress.step}}
    accelerator.project_configuration.set_directories(str(folder.path))
    accelerator.log_with = [name]
    shown = {key: value if isinstance(value, int | float | str) else str(value) for key, value in config.items()}
    accelerator.init_trackers(run.project, config=shown, init_kwargs=settings)
    tracker = accelerator.get_tracker(name)
    if name == "wandb" and accelerator.is_main_process:
        weights_and_biases.name_axes(tracker.run)
    return tracker  # type: ignore[no-any-return]


def tracker_id(accelerator: Accelerator, tracker: GeneralTracker | None) -> str | None:
    """W&B's id of the run, on every process; None without W&B."""
    own = tracker.run.id if isinstance(tracker, WandBTracker) and accelerator.is_main_process else None
    return broadcast_object_list([own])[0]  # type: ignore[no-any-return]
