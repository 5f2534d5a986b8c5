"""Snapshot ensembles (Huang et al. 2017, arXiv:1704.00109): the weights of every SGDR cycle's end, kept and judged."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from tuning.analysis.last_look import BATCHES, Watch, load_weights
from tuning.averaging.norm_statistics import NormStatistics
from tuning.data.broken import Unreadable
from tuning.data.sources import Data
from tuning.entering import Entered
from tuning.errors import UserError
from tuning.feeds import judging_feed
from tuning.judging.final_metrics import mean_of
from tuning.judging.metrics import classification_metrics, rank_classes
from tuning.judging.predicting import in_order, stream
from tuning.models.build import ModelInfo, keep_best
from tuning.plan import StagePlan
from tuning.progress import Progress
from tuning.safety.agreement import average_statistics
from tuning.safety.checkpoint import remove
from tuning.safety.saving import sync_folder, tensors_of
from tuning.tracking import plots
from tuning.tracking.track import Curves

FOLDER, ENSEMBLE, AVERAGED = "snapshots", "ensemble", "averaged"
WEIGHTS = "model.safetensors"


class Snapshots:
    """The snapshots of one run, ``snapshots/01`` and so on: timm folders, complete or absent.

    Which there are follows from the plan and the steps done, so a run that goes on writes those after its checkpoint
    again, the same ones. A snapshot is on the disk before a checkpoint of its step can be.

    Args:
        wanted: False = none are taken.

    Raises:
        UserError: the plan has fewer than two cycles.
    """

    def __init__(self, accelerator: Accelerator, run: Path, plan: Sequence[StagePlan], wanted: bool) -> None:
        self._accelerator, self._folder = accelerator, run / FOLDER
        self._ends = cycle_ends(plan) if wanted else []
        if wanted and len(self._ends) < 2:
            raise UserError(
                f"--snapshots: the run completes {len(self._ends)} sgdr cycles, an ensemble needs 2. Give a shorter "
                "--cycle-epochs, or more --epochs."
            )

    def path(self, number: int) -> Path:
        """Folder of the snapshot of cycle *number*, from 1."""
        return self._folder / f"{number:02d}"

    def take(
        self,
        entered: Entered,
        progress: Progress,
        image_size: int,
        info: ModelInfo,
        classes: Sequence[str],
        anew: NormStatistics,
    ) -> None:
        """Keep the weights if a cycle has just ended, as an evaluation would see them. All processes take part."""
        if progress.step not in self._ends:
            return
        moved = entered.statistics
        average_statistics(self._accelerator, moved.values())
        with anew.estimated(entered.model, list(moved) if anew.wanted else (), image_size):
            weights = tensors_of(entered.model, keep=self._accelerator.is_main_process)
        if self._accelerator.is_main_process:
            at_size = replace(info, input_size=image_size)
            _write(self.path(self._ends.index(progress.step) + 1), entered.model, at_size, classes, weights)

    def judge(
        self,
        model: nn.Module,
        info: ModelInfo,
        data: Data,
        progress: Progress,
        workers: int,
        anew: NormStatistics,
        watch: Watch,
    ) -> dict[str, dict[str, float]]:
        """Metrics of each snapshot, of their ensemble and of their averaged weights; on rank 0. All take part.

        The ensemble is the mean of the probabilities. Of the averaged weights, running statistics in which the
        snapshots differ are taken anew; they are kept in ``snapshots/averaged``.

        Args:
            model: the raw model of the run; it holds other weights afterwards.
            watch: `Boundary.watch`.

        Raises:
            StopRequested: on every process; a run that goes on judges again.
        """
        main, folders = self._accelerator.is_main_process, self._taken(progress)
        found: dict[str, Tensor] = {}
        look, labels = partial(self._look, model, info, data, workers, watch), torch.empty(0)
        for folder in folders:
            found[folder.name], labels = look(load_weights(self._accelerator, model, folder))
        if len(folders) > 1:
            found[ENSEMBLE] = mean_of(list(found.values())) if main else labels
            size = load_weights(self._accelerator, model, folders[-1], lambda: mean_state(folders))
            with anew.estimated(model, self._agreed(_apart(folders) if main else []), size):
                found[AVERAGED], _ = look(size)
                weights = tensors_of(model, keep=main)
            if main:
                _write(self._folder / AVERAGED, model, replace(info, input_size=size), data.classes, weights)
        return {name: _metrics(logits, labels) for name, logits in found.items()} if main else {}

    def _look(
        self, model: nn.Module, info: ModelInfo, data: Data, workers: int, watch: Watch, size: int
    ) -> tuple[Tensor, Tensor]:
        """Logits and labels of all evaluation images at *size* pixels; on rank 0, empty on others. All take part."""
        feed = judging_feed(self._accelerator, data.eval, size, info, workers, Unreadable(data.folder))
        pieces = watch(stream(self._accelerator, model.eval(), feed, BATCHES), "the evaluation of the snapshots")
        kept = [piece for piece in pieces if self._accelerator.is_main_process]
        return in_order(kept)[:2] if kept else (torch.empty(0), torch.empty(0))

    def _taken(self, progress: Progress) -> list[Path]:
        """The snapshots that rank 0 sees, up to where the run stands."""
        numbers = [n for n, end in enumerate(self._ends, start=1) if end <= progress.step and self.path(n).is_dir()]
        return [self.path(int(number)) for number in self._agreed(list(map(str, numbers)))]

    def _agreed(self, names: list[str]) -> list[str]:
        """What rank 0 says."""
        return list(broadcast_object_list([names])[0])


def cycle_ends(plan: Sequence[StagePlan]) -> list[int]:
    """Optimizer steps of the run after which an SGDR cycle is complete."""
    ends, before = list[int](), 0
    for planned in plan:
        ends += [before + end for end in planned.stage.cycle_ends(planned.steps_per_epoch)]
        before += planned.steps
    return ends


def mean_state(folders: Sequence[Path]) -> dict[str, Tensor]:
    """The mean of the weights in timm folders, one in memory at a time; counters are those of the last."""
    mean: dict[str, Tensor] = {}
    for folder in folders:
        for name, value in _state(folder).items():
            if value.is_floating_point():
                mean[name] = mean.get(name, 0) + value.double() / len(folders)
            else:
                mean[name] = value
    return {name: mean[name].to(value.dtype) for name, value in _state(folders[0]).items()}


def _apart(folders: Sequence[Path]) -> list[str]:
    """Names of the running statistics in which the models differ: those that training has moved."""
    first, *others = ({n: v for n, v in _state(one).items() if "running_" in n} for one in folders)
    return [name for name, value in first.items() if any(not torch.equal(value, other[name]) for other in others)]


def _state(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


def _metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    losses = F.cross_entropy(logits, labels, reduction="none")
    return {**classification_metrics(rank_classes(logits), labels, losses, logits.shape[1]), "images": len(labels)}


def _write(
    folder: Path, model: nn.Module, info: ModelInfo, classes: Sequence[str], weights: Mapping[str, Tensor]
) -> None:
    """A timm folder, complete or absent; where the disk refuses, that is said and the run goes on without."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if keep_best(model, info, classes, partial, weights):
        if folder.exists():  # of an earlier part of the run
            remove(folder)
        partial.rename(folder)
        sync_folder(folder.parent)


def tell(
    judged: Mapping[str, Mapping[str, float]], curves: Curves, progress: Progress, folder: Path, best_by: str
) -> str:
    """Write the numbers to the curves and draw them into the *folder* of pictures; a sentence for a person. Rank 0.

    Args:
        judged: from `Snapshots.judge`.
        best_by: the metric to show.
    """
    names = {name: f"eval_snapshot{name}" if name.isdecimal() else f"eval_{name}" for name in judged}
    values = {f"{names[name]}/{key}": value for name, metrics in judged.items() for key, value in metrics.items()}
    curves.write(values, progress.step, progress.epoch, progress.stage)
    shown = {name: metrics[best_by] for name, metrics in judged.items()}
    plots.draw_bars(shown, f"eval {best_by}", folder / "snapshots.png")
    numbers = ", ".join(f"{name} {value:.4f}" for name, value in shown.items())
    return f"Snapshots, {best_by}: {numbers}."
