"""After every stage: what was closed has not moved by a bit, what was open has."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from ranks import run_ranks
from stage_runs import StageRun, run_stages


def check(run: StageRun) -> None:
    """Compare the states around every stage."""
    for opened, before, after, grouped in zip(run.opened, run.states, run.states[1:], run.grouped, strict=False):
        assert set(grouped) == set(opened)
        assert set(grouped.values()) == {1}
        still = {name for name in before if (before[name] == after[name]).all()}
        parameters = {name for name in before if "running_" not in name and "num_batches" not in name}
        assert opened & still == set(), "open parameters that have not moved"
        assert (parameters - opened) <= still, "closed parameters that have moved"
        for name in before.keys() - parameters:
            norm_is_open = name.rsplit(".", 1)[0] + ".weight" in opened
            assert (name in still) != norm_is_open, f"{name}: statistics of a norm that is open: {norm_is_open}"


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    "model",
    [
        "test_efficientnet",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("test_resnet", "mobilenetv3_small_050")),
    ],
)
def test_closed_layers_rest(photos: Path, world_size: int, model: str) -> None:
    argv = ("--data", str(photos), "--model", model, "--weights", "none", "--image-size", "48", "--batch-size", "8")
    argv += ("--freeze-epochs", "1", "--epochs", "4", "--unfreeze", "gradual", "--lr", "1e-2", "--weight-decay", "0.1")
    for run in run_ranks(world_size, run_stages, *argv, "--batch-norm", "train"):
        assert len(run.opened) == 5
        check(run)


def test_frozen_statistics_stay_in_open_layers(photos: Path, tmp_path: Path) -> None:
    preset = tmp_path / "frozen.yaml"
    preset.write_text(
        "stages:\n- {open: 2, epochs: 1, batch_norm: frozen}\n- {open: all, epochs: 1, batch_norm: frozen}\n"
    )
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_efficientnet", num_classes=3).state_dict(), weights)
    argv = ("--data", str(photos), "--model", "test_efficientnet", "--weights", str(weights), "--image-size", "32")
    (run,) = run_ranks(1, run_stages, *argv, "--batch-size", "8", "--preset", str(preset))
    statistics = [name for name in run.states[0] if "running_" in name]
    assert statistics
    assert all((run.states[0][name] == run.states[-1][name]).all() for name in statistics)


@pytest.mark.parametrize("world_size", [1, 2])
def test_open_parts_move_alone(photos: Path, tmp_path: Path, world_size: int) -> None:
    """Norms, then norms and biases, at every depth, between stages that open the head and everything."""
    preset, opened = tmp_path / "parts.yaml", ("norms", "head", "norms-biases", "all")
    preset.write_text("stages:\n" + "".join(f"- {{open: {part}, epochs: 1}}\n" for part in opened))
    argv = ("--data", str(photos), "--model", "test_efficientnet", "--weights", "none", "--image-size", "48")
    argv += ("--batch-size", "8", "--lr", "1e-2", "--weight-decay", "0.1", "--batch-norm", "train", "--lr-ratio", "0.2")
    runs = run_ranks(world_size, run_stages, *argv, "--preset", str(preset), "--drop-path-rate", "0.2")
    assert len(runs) == world_size
    for run in runs:
        sizes = [len(names) for names in run.opened]
        assert sizes[1] < sizes[0] < sizes[2] < sizes[3]
        check(run)
