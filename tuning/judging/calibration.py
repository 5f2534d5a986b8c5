"""One number that makes probabilities honest: the temperature of Guo et al. (2017), stored with the model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tuning.cli.coerce import read_yaml
from tuning.cli.run_defaults import is_same, run_of
from tuning.errors import UserError
from tuning.flags import DataFlags
from tuning.judging.finished import CALIBRATION, TIMM_CONFIG
from tuning.tracking.run_folder import CONFIG, write_atomically

LOWEST, HIGHEST = 0.05, 20.0


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T for which ``softmax(logits / T)`` has the lowest cross-entropy, within [0.05, 20].

    No prediction changes by it: the order of the classes stays. Where every image is right the best T would be 0, and
    the lower limit is the answer.

    Args:
        logits: ``(N, K)``.
        labels: ``(N,)`` int64.
    """
    exact = logits.double()
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=100, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(exact / log_t.clamp(math.log(LOWEST), math.log(HIGHEST)).exp(), labels)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return min(max(math.exp(float(log_t.detach())), LOWEST), HIGHEST)


def calibrated(logits: Tensor, labels: Tensor, data: str) -> dict[str, Any]:
    """The fitted temperature and what it was fitted on, to be stored; losses and ECE are of those same images."""
    temperature = fit_temperature(logits, labels)
    before, after = (float(F.cross_entropy(logits.double() / t, labels)) for t in (1.0, temperature))
    return {
        "temperature": temperature,
        "fitted_on": f"{len(labels):,} evaluation images of {data}",
        "images": len(labels),
        "loss_before": before,
        "loss_after": after,
    }


def place_for(opened: Path, data: DataFlags) -> Path:
    """The timm folder whose ``config.json`` takes the temperature.

    Args:
        opened: what ``--run`` names.
        data: to fit on.

    Raises:
        UserError: a checkpoint, which holds state and no model folder; other images than those that the run was judged
            on in training.
    """
    if opened.resolve().parent.name == "checkpoints":
        raise UserError(
            f"--calibrate stores the temperature with a model, and {opened} is a checkpoint. Give the run, or a timm "
            "folder."
        )
    folder = run_of(opened)
    config = read_yaml(folder / CONFIG, str(folder / CONFIG)) if folder else {}
    other = [key for key, value in vars(data).items() if key in config and key != "data" and config[key] != value]
    if folder and (other or not is_same(data.data, config.get("data"))):
        flag = f"--{(other or ['data'])[0].replace('_', '-')}"
        raise UserError(f"--calibrate fits on the evaluation images of the run {folder}: leave {flag} out.")
    return opened / "model" if folder == opened.resolve() else opened


def store(folder: Path, calibration: dict[str, Any]) -> None:
    """Write *calibration* (its ``temperature`` and where that is from) into the ``config.json`` of a timm folder.

    timm ignores the key; a run that goes on writes the file anew with its next best weights, without it.
    """
    path = folder / TIMM_CONFIG
    content = json.loads(path.read_text(encoding="utf-8")) | {CALIBRATION: calibration}
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
