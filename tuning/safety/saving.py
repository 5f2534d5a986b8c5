"""Writing checkpoints beside the training: staged in memory, written by a thread, visible only when complete."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from tuning.entering import Entered
from tuning.progress import Progress
from tuning.safety.checkpoint import checkpoints, name_of, prune, remove, statistics_of
from tuning.safety.manifest import AVERAGE, FORMAT, MANIFEST, OPTIMIZER, WEIGHTS, digest, sealed
from tuning.sharding import is_sharded, whole
from tuning.tracking.run_folder import settled_hash
from tuning.tracking.summary import versions


@dataclass(frozen=True)
class _Staged:
    """A copy of everything a checkpoint holds; training goes on meanwhile."""

    step: int
    best_step: int | None
    weights: dict[str, Tensor]
    averages: dict[str, dict[str, Tensor]]
    optimizer: dict[str, Any]
    manifest: dict[str, Any]


def manifest_facts(config: str) -> dict[str, Any]:
    """What a checkpoint's manifest says besides progress and files.

    Args:
        config: content of ``config.yaml``.
    """
    return {"config_sha256": settled_hash(config), "versions": versions(), "threads": torch.get_num_threads()}


class Saver:
    """Saves the state of one run. Leaving the context waits for the disk.

    A checkpoint is written into a temporary folder, every file flushed to the disk, the manifest last, and renamed into
    place; older ones are pruned only then. One that can't be written is reported and given up: those before it stay.

    Args:
        run: folder of the run.
        keep: newest checkpoints to keep, besides the best.
        facts: what the manifest says besides progress and files.
        stop_on_error: whether a checkpoint that can't be written ends the run.
    """

    def __init__(
        self, accelerator: Accelerator, run: Path, keep: int, facts: Mapping[str, Any], stop_on_error: bool = False
    ) -> None:
        self._accelerator, self._run, self._keep, self._facts = accelerator, run, keep, dict(facts)
        self._stop_on_error = stop_on_error
        self._thread: threading.Thread | None = None
        self.failure = ""

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wait()

    def save(
        self,
        entered: Entered,
        progress: Progress,
        averages: Mapping[str, nn.Module] | None = None,
        first: Callable[[], None] = lambda: None,
    ) -> None:
        """Stage the state of this step and begin to write ``checkpoints/step-XXXXXXXX``. All processes call it.

        Nothing that is trained changes by it. Waits for the checkpoint before.

        Args:
            averages: the models with averaged weights that have begun, by name.
            first: called in the writing thread before the checkpoint appears.
        """
        averages = averages or {}
        moved = {**entered.statistics, **statistics_of(averages, entered)}
        statistics = _of_all_processes(self._accelerator, moved)
        main = self._accelerator.is_main_process
        if main:
            self.wait()
        if main or is_sharded(entered.model):  # then all gather the shares, and rank 0 keeps them
            staged = self._stage(entered, progress, averages, statistics)
        if main:
            self._thread = threading.Thread(target=self._write, args=(staged, first), name="checkpoint")
            self._thread.start()

    def wait(self) -> None:
        """Return when the last checkpoint is on the disk, or has been given up."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def must_stop(self) -> bool:
        """Whether a checkpoint could not be written and that is to end the run."""
        return self._stop_on_error and bool(self.failure)

    def _stage(
        self,
        entered: Entered,
        progress: Progress,
        averages: Mapping[str, nn.Module],
        statistics: dict[str, Tensor],
    ) -> _Staged:
        scaler, keep = self._accelerator.scaler, self._accelerator.is_main_process
        weights = tensors_of(entered.model, keep)
        averaged = {name: tensors_of(average, keep) for name, average in averages.items()}
        for name, of_all in statistics.items() if keep else ():
            kind, _, own = name.rpartition("/")
            (averaged[kind] if kind else weights)[own] = of_all.mean(0)
        state = {
            "optimizer": _copied(entered.optimizer.state_dict(), keep),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "statistics": statistics,
        }
        world_size = self._accelerator.num_processes
        manifest = {"format": FORMAT, "progress": progress.to_json(), "world_size": world_size, **self._facts}
        return _Staged(progress.step, progress.best_step, weights, averaged, state, manifest)

    def _write(self, staged: _Staged, first: Callable[[], None]) -> None:
        folder = checkpoints(self._run) / name_of(staged.step)
        temporary = folder.with_name(f".{folder.name}.partial")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            save_file(staged.weights, temporary / WEIGHTS)
            for name, average in staged.averages.items():
                save_file(average, temporary / AVERAGE.format(name))
            torch.save(staged.optimizer, temporary / OPTIMIZER)
            _finish(temporary, staged.manifest)
            first()
            if folder.exists():  # of an earlier continuation
                remove(folder)
            temporary.rename(folder)
            sync_folder(folder.parent)
            self.failure = ""
            prune(self._run, self._keep, staged.best_step)
        except Exception as error:  # safetensors and torch.save have types of their own for a full disk
            shutil.rmtree(temporary, ignore_errors=True)
            self._report(folder, error)

    def _report(self, folder: Path, error: Exception) -> None:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        free = shutil.disk_usage(self._run).free / 1e6 if self._run.exists() else 0.0
        self.failure = f"{folder} could not be written ({reason}; {free:,.0f} MB free). Earlier checkpoints are intact."
        print(f"warning: {self.failure}", file=sys.stderr, flush=True)


def tensors_of(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """The model's whole state on the CPU, tied tensors as copies of their own (safetensors stores no aliases).

    Args:
        keep: False = only take part in gathering a sharded model, and return nothing.
    """
    state = ((name, whole(tensor.detach())) for name, tensor in model.state_dict().items())
    return {name: tensor.cpu().contiguous().clone() for name, tensor in state if keep}


def _of_all_processes(accelerator: Accelerator, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Running statistics of every process, ``{name: (processes, ...)}`` on the CPU, in one exchange."""
    if not statistics or accelerator.num_processes == 1:
        return {}
    mine = torch.cat([buffer.flatten() for buffer in statistics.values()])
    every = accelerator.gather(mine[None]).cpu()
    parts = every.split([buffer.numel() for buffer in statistics.values()], dim=1)
    return {
        name: part.reshape(len(every), *buffer.shape).clone()
        for (name, buffer), part in zip(statistics.items(), parts, strict=True)
    }


def _copied(value: Any, keep: bool) -> Any:
    """The same nested dicts and lists, with whole tensors copied to the CPU; None for these unless *keep*."""
    if isinstance(value, Tensor):
        full = whole(value.detach())
        return full.to("cpu", copy=True) if keep else None
    if isinstance(value, dict):
        return {key: _copied(item, keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(item, keep) for item in value]
    return value


def _finish(folder: Path, manifest: dict[str, Any]) -> None:
    """Flush every file to the disk, then write the manifest that lists them."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": digest(path)} for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(sealed({**manifest, "files": files}), encoding="utf-8")
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Put the names in *folder* on the disk."""
    if hasattr(os, "O_DIRECTORY"):  # Windows can't open a folder
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(handle)
        os.close(handle)
