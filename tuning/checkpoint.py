"""Saving and loading the state of a run: complete or absent, never half.

A checkpoint is written into a temporary folder, its manifest last, and renamed into place; older ones are pruned only
then. Everything is loaded without executing code from the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tuning.agreement import average_statistics
from tuning.entering import Entered
from tuning.errors import UserError
from tuning.progress import Progress

MANIFEST = "manifest.json"
WEIGHTS, OPTIMIZER = "model.safetensors", "optimizer.pt"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk, known to be readable."""

    folder: Path
    progress: Progress
    world_size: int


def save(accelerator: Accelerator, run: Path, entered: Entered, progress: Progress, keep: int) -> Path:
    """Write ``checkpoints/step-XXXXXXXX`` and prune to the newest *keep*. All processes call it; rank 0 writes.

    Returns:
        the folder of the checkpoint.
    """
    average_statistics(accelerator, entered.model)
    folder = run / "checkpoints" / f"step-{progress.step:08d}"
    if accelerator.is_main_process:
        temporary = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(tensors_of(entered.model), temporary / WEIGHTS)
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        torch.save({"optimizer": entered.optimizer.state_dict(), "scaler": scaler}, temporary / OPTIMIZER)
        manifest = {"progress": progress.to_json(), "world_size": accelerator.num_processes}
        _finish(temporary, manifest)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        _sync_folder(folder.parent)
        _prune(folder.parent, keep)
    accelerator.wait_for_everyone()
    return folder


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's state on the CPU, tied tensors as copies of their own (safetensors stores no aliases)."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}


def _finish(folder: Path, manifest: dict[str, Any]) -> None:
    """Flush every file to the disk, then write the manifest that lists them."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({**manifest, "files": files}, indent=1), encoding="utf-8")
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    _sync_folder(folder)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):  # Windows can't open a folder
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(handle)
        os.close(handle)


def _prune(folder: Path, keep: int) -> None:
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)


def forget_after(run: Path, step: int) -> None:
    """Remove checkpoints beyond *step*, which the run has gone back behind: damaged ones, or another continuation."""
    for folder in (run / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


def find(run: Path, resume: str) -> Checkpoint | None:
    """The checkpoint that ``--resume`` means: None for never, or for auto without one.

    A damaged checkpoint is passed over by ``auto``.

    Raises:
        UserError: the given path holds no complete checkpoint.
    """
    if resume == "never":
        return None
    if resume != "auto":
        return read(Path(resume))
    for folder in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        try:
            return read(folder)
        except UserError:
            continue
    return None


def read(folder: Path) -> Checkpoint:
    """Check a checkpoint against its manifest, file by file.

    Raises:
        UserError: no manifest, or a file that is missing or differs from it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, progress = manifest["files"], Progress.from_json(manifest["progress"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"--resume {folder}: no complete checkpoint there. Use --resume auto for the newest one."
        ) from None
    for name, expected in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected["bytes"] or _digest(path) != expected["sha256"]:
            raise UserError(
                f"--resume {folder}: {name} is missing or damaged. Use --resume auto for the newest good one."
            )
    return Checkpoint(folder, progress, manifest["world_size"])


def load(accelerator: Accelerator, checkpoint: Checkpoint, entered: Entered) -> None:
    """Put the saved state into a model that has already entered the saved stage. All processes load.

    Learning rates and weight decay stay those of the stage: the optimizer's file would bring its own back.
    """
    entered.model.load_state_dict(load_file(checkpoint.folder / WEIGHTS))
    state = torch.load(checkpoint.folder / OPTIMIZER, map_location="cpu", weights_only=True)
    rates = [{key: group[key] for key in ("peak_lr", "weight_decay")} for group in entered.optimizer.param_groups]
    entered.optimizer.load_state_dict(state["optimizer"])
    for group, rate in zip(entered.optimizer.param_groups, rates, strict=True):
        group.update(rate)
    if accelerator.scaler is not None and state["scaler"] is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
