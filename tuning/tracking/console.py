"""What a person sees: the plan, the progress, the closing lines. Speaks on rank 0 only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from tuning import sharding
from tuning.data.operations import augmentation_sentences
from tuning.data.sources import Data
from tuning.data.tables import label_array
from tuning.lr_search.finder import Found
from tuning.models.build import ModelInfo
from tuning.plan import StagePlan
from tuning.progress import Progress
from tuning.safety.resuming import Start
from tuning.session import precision_name
from tuning.stages import counted
from tuning.tracking.imbalance import class_sentence, sampling_sentences
from tuning.tracking.run_folder import RunFolder

LOG_WIDTH = 140  # of tables in a log file, characters
STAGE_HEADINGS = ("stage", "open", "parameters", "epochs", "steps", "batch", "pixels", "LR stem .. head", "how")


class Speaker:
    """Prints on rank 0 and keeps quiet elsewhere; a live progress bar in a terminal, plain lines in a log file."""

    def __init__(self, is_main: bool) -> None:
        self.console = Console(quiet=not is_main, highlight=False, soft_wrap=True)
        if not self.console.is_terminal:
            self.console.width = LOG_WIDTH
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        live = is_main and self.console.is_terminal
        self._bar = Bar(*columns, console=self.console, disable=not live, transient=True)
        self._task = self._bar.add_task("", total=None, values="")

    def __enter__(self) -> Speaker:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(escape(text))

    def show_progress(self, stage: str, step: int, total: int, latest: Mapping[str, float]) -> None:
        """Move the bar (terminal only)."""
        values = ""
        if latest:
            values = f"loss {latest['loss']:.3f}  lr {latest['lr']:.1e}  {latest['images_per_second']:.0f} images/s"
        self._bar.update(self._task, description=stage, completed=step, total=total, values=values)

    def show_plan(
        self,
        plan: Sequence[StagePlan],
        data: Data,
        info: ModelInfo,
        accelerator: Accelerator,
        folder: RunFolder,
        best_by: str,
    ) -> None:
        """Everything that will happen, before anything is spent."""
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in plan_facts(plan, data, info, accelerator, folder, best_by):
            table.add_row(name, escape(value))
        self.console.print(table)
        for note in data.notes:
            self.say(f"note: {note}")
        self.show_stages(plan)
        self.show_groups(plan)
        for note in (note for planned in plan for note in planned.stage.notes(planned.steps_per_epoch)):
            self.say(f"note: {note}")

    def say_resumed(self, start: Start, world_size: int) -> None:
        """Where the run goes on, if it does; which checkpoints were passed over; what can't be the same."""
        found = start.found
        for sentence in start.damaged:
            self.say(f"warning: {sentence}")
        if found is None:
            if start.damaged:
                self.say("warning: no good checkpoint is left; the run starts from the beginning.")
            return
        self.say(
            f"Going on from {shown_path(found.folder)}: step {found.progress.step:,}, stage {found.progress.stage + 1}."
        )
        if found.world_size != world_size:
            self.say(
                f"note: it was saved by {found.world_size} processes and goes on with {world_size}: the same global "
                "batches in the same order, equal up to float rounding and dropout."
            )
        for name in ("threads", "versions"):
            before, now = found.facts.get(name), start.facts[name]
            if before != now:
                self.say(f"note: {name} were {before}, now {now}: equal up to float rounding.")

    def say_found(self, planned: StagePlan, found: Found, planned_steps: int) -> None:
        """What `--lr auto` found for a stage, and its price."""
        share = found.steps / planned_steps
        self.say(f"{planned.stage.name:>10}  --lr auto: {found.described()} That is {share:.0%} of the run's steps.")
        if found.lr is None:
            self.say(f"{'':>10}  The learning rate stays {planned.stage.lr:g}.")

    def say_evaluation(
        self, stage: str, epoch: float, judged: Mapping[str, Mapping[str, float]], latest: Mapping[str, float]
    ) -> None:
        """One line an evaluation, and one for averaged weights.

        Args:
            judged: metrics of ``eval`` and ``eval_ema``.
            latest: ``loss`` and ``images_per_second`` of training; empty before the first step.
        """
        trained = f"  train loss {latest['loss']:.4f}, {latest['images_per_second']:.0f} images/s" if latest else ""
        for whose, metrics in judged.items():
            numbers = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "images")
            self.say(f"{stage:>10}  epoch {epoch:<4g}  {whose}: {numbers}{trained if whose == 'eval' else ''}")

    def say_stage_over(self, planned: StagePlan, progress: Progress, best_by: str) -> None:
        """That evaluations have ended a stage, if they have."""
        if progress.stage_over:
            done, all_of_it = progress.stage_step // planned.steps_per_epoch, planned.stage.epochs
            self.say(
                f"{planned.stage.name:>10}  ends after {done} of {all_of_it} epochs: "
                f"{counted(progress.waiting, 'evaluation')} in a row without a better {best_by}."
            )

    def say_unreadable(self, names: Sequence[str]) -> None:
        """Pictures that could not be read, if any."""
        if names:
            shown = "".join(f"\n  {name}" for name in names[:10])
            more = f"\n  and {len(names) - 10} more" if len(names) > 10 else ""
            self.say(
                f"warning: {len(names)} pictures could not be read; training took others in their place, evaluation "
                f"left them out:{shown}{more}"
            )

    def say_finished(self, summary: Mapping[str, Any], folder: RunFolder, tracker: str) -> None:
        """The result, where the model lies and how to look at the run."""
        path = shown_path(folder.path)
        best, metric = summary["best"], summary["best_by"]
        if best:
            told = f"Best {metric} {best[metric]:.4f} at epoch {best['epoch']:g}."
        else:
            told = f"No evaluation had a finite {metric}, so no model was kept."
        self.say(f"Done in {summary['seconds']:.0f} s. {told}")
        if best:
            self.say(f"  model    {path}/model    timm.create_model('local-dir:{path}/model', pretrained=True)")
        self.say(f"  curves   {path}/plots/curves.png, {path}/metrics.jsonl")
        if folder.report.exists():
            self.say(f"  report   {path}/report.html    (one file to mail)")
        if tracker == "wandb":
            self.say(
                f"  W&B      wandb leet {path}/wandb/latest-run    (wandb sync {path}/wandb/latest-run uploads it)"
            )
        if tracker == "tensorboard":
            self.say(f"  look     tensorboard --logdir {path}")

    def show_stages(self, plan: Sequence[StagePlan]) -> None:
        """One row a stage."""
        table = Table(title="Stages", title_justify="left", box=None, padding=(0, 2, 0, 0))
        for heading in STAGE_HEADINGS:
            table.add_column(heading, justify="right" if heading in ("parameters", "epochs", "steps") else "left")
        for row in stage_rows(plan):
            table.add_row(*map(escape, row))
        self.console.print(table)

    def show_groups(self, plan: Sequence[StagePlan]) -> None:
        """One row a parameter group, its peak LR in every stage."""
        table = Table(title="Parameter groups, peak LR a stage", title_justify="left", box=None, padding=(0, 2, 0, 0))
        for heading in ("group", "depth", "parameters", "weight decay", *(p.stage.name for p in plan)):
            table.add_column(escape(heading), justify="left" if heading == "group" else "right")
        for across in zip(*(planned.groups for planned in plan), strict=True):
            group = across[0]
            rates = [f"{g.peak_lr:.3g}" if g.open_parameters else "closed" for g in across]
            table.add_row(group.name, str(group.depth), f"{group.parameters:,}", f"{across[-1].weight_decay:g}", *rates)
        self.console.print(table)


def plan_facts(
    plan: Sequence[StagePlan], data: Data, info: ModelInfo, accelerator: Accelerator, folder: RunFolder, best_by: str
) -> list[tuple[str, str]]:
    """What a run is, in named sentences."""
    counts = np.bincount(label_array(data.train), minlength=len(data.classes))
    pixels, judged_at = sorted({size for planned in plan for size in planned.sizes}), plan[-1].eval_size
    evaluated = "" if pixels == [judged_at] else f", evaluated at {judged_at}"
    return [
        ("data", f"{data.name}: {len(data.train):,} training and {len(data.eval):,} evaluation images"),
        ("classes", class_sentence(data.classes, counts)),
        *(("sampling", told) for told in sampling_sentences(data.classes, counts, [p.stage for p in plan])),
        *(("augmentation", told) for told in augmentation_sentences([p.stage for p in plan])),
        ("model", f"{info.name}, {sum(g.parameters for g in plan[0].groups):,} parameters; {info.weights}"),
        (
            "input",
            f"{', '.join(map(str, pixels))} pixels{evaluated}, mean {info.mean}, std {info.std}, {info.interpolation}",
        ),
        (
            "hardware",
            f"{accelerator.num_processes} x {accelerator.device.type}, {precision_name(accelerator)}"
            + (f", {torch.get_num_threads()} threads each" if accelerator.device.type == "cpu" else "")
            + (", one model split over all (FSDP2)" if sharding.asked() else ""),
        ),
        ("steps", f"{sum(planned.steps for planned in plan):,} optimizer steps"),
        ("best", f"model/ keeps the weights with the best {best_by} of the evaluations"),
        ("output", shown_path(folder.path)),
    ]


def stage_rows(plan: Sequence[StagePlan]) -> list[tuple[str, ...]]:
    """One row a stage, under `STAGE_HEADINGS`."""
    rows: list[tuple[str, ...]] = []
    for planned in plan:
        stage, batch = planned.stage, planned.batch
        rates = [group.peak_lr for group in planned.groups if group.open_parameters]
        rows.append(
            (
                stage.name,
                f"{stage.open:.0%}" if isinstance(stage.open, float) else str(stage.open),
                f"{planned.open_parameters:,}",
                str(stage.epochs),
                f"{planned.steps:,}",
                f"{batch.batch_size} = {batch.world_size} x {batch.accumulation} x {batch.micro_batch}",
                ", ".join(map(str, planned.sizes)),
                f"{rates[0]:.3g} .. {rates[-1]:.3g}" + (" or found" if stage.find_lr else ""),
                f"{stage.optimizer}, {stage.schedule}" + _cached(planned) + _said(planned),
            )
        )
    return rows


def _cached(planned: StagePlan) -> str:
    """What is computed once, and the memory that it takes on every process."""
    views = planned.stage.feature_views
    what = "features once" if views == 1 else f"features of {views} views"
    return f", {what}: {planned.feature_bytes / 1e6:,.1f} MB" if planned.stage.cache_features else ""


def _said(planned: StagePlan) -> str:
    """What becomes of BatchNorm, and how many weights SWA averages."""
    norm, averaged = f", BatchNorm {planned.stage.batch_norm}", len(planned.swa_steps)
    if planned.stage.batch_norm == "sync" and planned.batch.world_size == 1:
        norm += " (one process: train)"
    return (norm if planned.keeps_statistics else "") + (f", SWA of {averaged}" if averaged else "")


def shown_path(path: Path) -> str:
    """Relative to the working directory where that is shorter."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
