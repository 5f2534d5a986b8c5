"""Checkpoints on disk: complete or absent, never half; checked by digest, and read without executing code from them.

`tuning.safety.saving` writes them, `tuning.safety.manifest` checks them; this module finds, loads and prunes them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from tuning.entering import Entered
from tuning.errors import UserError
from tuning.safety.manifest import AVERAGE, OPTIMIZER, WEIGHTS, Checkpoint, read
from tuning.sharding import load_whole, split_like


def checkpoints(run: Path) -> Path:
    """The folder of a run's checkpoints."""
    return run / "checkpoints"


def name_of(step: int) -> str:
    """Name of the checkpoint after *step* optimizer steps."""
    return f"step-{step:08d}"


def find(run: Path, resume: str) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint that ``--resume`` means, and what is wrong with newer ones that were passed over.

    Returns:
        the checkpoint, None for never or for auto without a good one; a sentence for every damaged one.

    Raises:
        UserError: the given path holds no complete checkpoint.
    """
    if resume == "never":
        return None, []
    if resume != "auto":
        return read(Path(resume)), []
    damaged: list[str] = []
    for folder in _newest_first(run):
        try:
            return read(folder), damaged
        except UserError as error:
            damaged.append(str(error))
    return None, damaged


def refuse_other_config(found: Checkpoint | None, facts: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that was made under other flags than ``config.yaml`` now says.

    Raises:
        UserError: names the checkpoint.
    """
    if found is not None and found.facts.get("config_sha256") != facts["config_sha256"]:
        raise UserError(
            f"--resume: {found.folder} was made under other flags than the run's config.yaml says. Put that back, or "
            "start a new run in another --output."
        )


def _newest_first(run: Path) -> list[Path]:
    """Folders that are named like checkpoints; others are somebody else's."""
    folders = [path for path in checkpoints(run).glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def prune(run: Path, keep: int, best: int | None) -> None:
    """Remove all checkpoints but the newest *keep* and that of step *best*.

    Each is renamed before it is removed, so that a kill in between leaves nothing that looks like a checkpoint.
    """
    for old in _newest_first(run)[keep:]:
        if best is None or old.name != name_of(best):
            remove(old)


def remove(folder: Path) -> None:
    """Remove a checkpoint; it is complete or gone at any moment."""
    doomed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def forget_after(run: Path, step: int) -> None:
    """Remove what the run has gone back behind, damaged or of another continuation, and what a kill left half done."""
    for folder in _newest_first(run):
        if int(folder.name.removeprefix("step-")) > step:
            remove(folder)
    for half in checkpoints(run).glob(".step-*"):
        shutil.rmtree(half, ignore_errors=True)


def load(
    accelerator: Accelerator, checkpoint: Checkpoint, entered: Entered, averages: Mapping[str, nn.Module] | None = None
) -> None:
    """Put the saved state into a model that has already entered the saved stage. All processes load.

    Learning rates and weight decay stay those of the stage: the optimizer's file would bring its own back. Every
    process gets its own running statistics of norms, or their mean where the number of processes has changed.

    Args:
        averages: the models with averaged weights that had begun, by name.
    """
    load_whole(entered.model, load_file(checkpoint.folder / WEIGHTS))
    for name, average in (averages or {}).items():
        load_whole(average, load_file(checkpoint.folder / AVERAGE.format(name)))
    state = torch.load(checkpoint.folder / OPTIMIZER, map_location="cpu", weights_only=True)
    rates = [{key: group[key] for key in ("peak_lr", "weight_decay")} for group in entered.optimizer.param_groups]
    entered.optimizer.load_state_dict(_split(state["optimizer"], entered.optimizer))
    for group, rate in zip(entered.optimizer.param_groups, rates, strict=True):
        group.update(rate)
    if accelerator.scaler is not None and state["scaler"] is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    if checkpoint.world_size == accelerator.num_processes:
        moved = {**entered.statistics, **statistics_of(averages or {}, entered)}
        for name, of_all in state["statistics"].items():
            moved[name].copy_(of_all[accelerator.process_index])


def _split(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """*state*, in which what is shaped like a parameter is split as that parameter is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    of = dict(zip(numbers, parameters, strict=True))
    split = {
        number: {
            key: split_like(v, of[number]) if isinstance(v, Tensor) and v.shape == of[number].shape else v
            for key, v in held.items()
        }
        for number, held in state["state"].items()
    }
    return {**state, "state": split}


def statistics_of(averages: Mapping[str, nn.Module], entered: Entered) -> dict[str, Tensor]:
    """The running statistics that training moves as averaged models have them, ``{"ema/bn1.running_mean": ...}``."""
    return {
        f"{kind}/{name}": buffer
        for kind, model in averages.items()
        for name, buffer in model.named_buffers()
        if name in entered.statistics
    }
