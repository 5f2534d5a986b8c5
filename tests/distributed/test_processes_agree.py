"""One process or several: the same learning rates, the same parameters up to rounding, no drift between ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import run_ranks
from recipe_runs import finetune_here
from stage_runs import largest_difference, run_stages

# A ViT without BatchNorm: statistics of small batches would rightly differ.
MODEL = ("--model", "test_vit", "--weights", "none", "--image-size", "32")
STAGES = ("--freeze-epochs", "1", "--epochs", "2", "--unfreeze", "gradual", "--batch-size", "8", "--lr-ratio", "0.2")


@pytest.mark.parametrize(
    "optimizer", [("--optimizer", "adamw"), ("--optimizer", "sgd", "--lr", "0.05", "--clip-norm", "0")]
)
def test_two_processes_equal_one(photos: Path, optimizer: tuple[str, ...]) -> None:
    argv = ("--data", str(photos), *MODEL, *STAGES, *optimizer, "--label-smoothing", "0.1", "--augment", "medium")
    (alone,) = run_ranks(1, run_stages, *argv)
    first, second = run_ranks(2, run_stages, *argv)
    assert len(alone.states) == 4
    for after_one, on_first, on_second in zip(alone.states, first.states, second.states, strict=True):
        assert largest_difference(on_first, on_second) == 0
        assert largest_difference(on_first, after_one) < 1e-5
    assert first.metrics == second.metrics
    assert first.losses == second.losses
    assert first.losses == pytest.approx(alone.losses, abs=1e-5)


def test_accumulation_and_processes_give_the_same_run(photos: Path) -> None:
    argv = ("--data", str(photos), *MODEL, *STAGES, "--warmup-epochs", "0.5", "--schedule", "sgdr")
    argv += ("--cycle-epochs", "0.4", "--lr-floor", "0.01", "--cycle-decay", "0.8")
    runs = {
        "1 x 4": run_ranks(1, run_stages, *argv, "--micro-batch", "2")[0],
        "2 x 2": run_ranks(2, run_stages, *argv, "--micro-batch", "2")[0],
        "4 x 1": run_ranks(4, run_stages, *argv, "--micro-batch", "2")[0],
        "1 x 1": run_ranks(1, run_stages, *argv, "--micro-batch", "8")[0],
    }
    reference = runs.pop("1 x 1")
    assert len({tuple(step.items()) for step in reference.lrs}) > 10
    for run in runs.values():
        assert run.lrs == reference.lrs
        assert largest_difference(run.states[-1], reference.states[-1]) < 1e-5


@pytest.mark.parametrize(
    "loss",
    [
        ("--loss", "cross-entropy", "--class-weights", "balanced", "--label-smoothing", "0.1"),
        ("--loss", "bce", "--label-smoothing", "0.1"),
        ("--loss", "focal", "--focal-gamma", "1.5", "--class-weights", "balanced"),
    ],
    ids=["cross-entropy", "bce", "focal"],
)
def test_mixed_pictures_agree(photos: Path, loss: tuple[str, ...]) -> None:
    """Micro-batches of 4 hold the same pictures on any number of processes, so that each has the same partners."""
    argv = ("--data", str(photos), *MODEL, *STAGES, "--micro-batch", "4", *loss, "--optimizer", "sgd", "--lr", "0.05")
    (plain,) = run_ranks(1, run_stages, *argv)
    argv += ("--mixup", "0.4", "--cutmix", "1")
    (alone,) = run_ranks(1, run_stages, *argv)
    first, second = run_ranks(2, run_stages, *argv)
    for after_one, on_first, on_second in zip(alone.states, first.states, second.states, strict=True):
        assert largest_difference(on_first, on_second) == 0
        assert largest_difference(on_first, after_one) < 1e-5
    assert first.losses == second.losses
    assert first.losses == pytest.approx(alone.losses, abs=1e-5)
    assert first.metrics == second.metrics
    assert largest_difference(plain.states[-1], alone.states[-1]) > 1e-4, "nothing was mixed"


def test_bf16_stays_in_sync(photos: Path) -> None:
    argv = ("--data", str(photos), *MODEL, *STAGES, "--precision", "bf16", "--drop-rate", "0.2")
    first, second = run_ranks(2, run_stages, *argv)
    for on_first, on_second in zip(first.states, second.states, strict=True):
        assert largest_difference(on_first, on_second) == 0
    (full,) = run_ranks(1, run_stages, *argv[:-4])
    assert largest_difference(full.states[-1], first.states[-1]) > 1e-6, "bf16 left no trace: did it run in fp32?"


def test_batch_statistics_agree_after_every_stage(photos: Path) -> None:
    model = ("--model", "test_efficientnet", "--weights", "none", "--image-size", "32", "--batch-norm", "train")
    first, second = run_ranks(2, run_stages, "--data", str(photos), *model, *STAGES)
    for on_first, on_second in zip(first.states, second.states, strict=True):
        assert largest_difference(on_first, on_second) == 0
    assert first.metrics == second.metrics


def test_cached_features_agree(photos: Path) -> None:
    argv = (
        "--data",
        str(photos),
        *MODEL,
        "--freeze-epochs",
        "5",
        "--epochs",
        "1",
        "--batch-size",
        "8",
        "--cache-features",
    )
    (alone,) = run_ranks(1, run_stages, *argv)
    first, second = run_ranks(2, run_stages, *argv)
    assert largest_difference(first.states[-1], second.states[-1]) == 0
    assert largest_difference(first.states[1], alone.states[1]) < 1e-5
    assert first.metrics == second.metrics
    assert first.metrics[0]["top1"] == alone.metrics[0]["top1"]


def test_strong_augmentation_agrees(photos: Path) -> None:
    """Operations and boxes; mixed within micro-batches of 4, which are the same on any number of processes."""
    argv = (
        "--data",
        str(photos),
        *MODEL,
        "--freeze-epochs",
        "0",
        "--epochs",
        "2",
        "--optimizer",
        "sgd",
        "--lr",
        "0.05",
    )
    argv += ("--batch-size", "8", "--micro-batch", "4", "--augment", "strong", "--mixup", "0.4")
    (alone,) = run_ranks(1, run_stages, *argv)
    first, second = run_ranks(2, run_stages, *argv)
    assert largest_difference(first.states[-1], second.states[-1]) == 0
    assert largest_difference(first.states[-1], alone.states[-1]) < 1e-5
    assert first.losses == second.losses
    assert first.losses == pytest.approx(alone.losses, abs=1e-5)
    (whole,) = run_ranks(1, run_stages, *argv, "--random-erasing", "0")
    assert whole.losses != pytest.approx(alone.losses, abs=1e-4), "nothing was erased"


def test_sampled_classes_agree(photos: Path) -> None:
    """On cached features first, then on pictures."""
    argv = ("--data", str(photos), *MODEL, "--freeze-epochs", "1", "--epochs", "1", "--cache-features")
    argv += ("--batch-size", "8", "--augment", "medium", "--optimizer", "sgd", "--lr", "0.05")
    (plain,) = run_ranks(1, run_stages, *argv)
    argv += ("--sampling", "balanced")
    (alone,) = run_ranks(1, run_stages, *argv)
    first, second = run_ranks(2, run_stages, *argv)
    for after_one, on_first, on_second in zip(alone.states, first.states, second.states, strict=True):
        assert largest_difference(on_first, on_second) == 0
        assert largest_difference(on_first, after_one) < 1e-5
    assert first.losses == second.losses
    assert first.losses == pytest.approx(alone.losses, abs=1e-5)
    assert first.metrics == second.metrics
    assert len(plain.losses) == len(alone.losses)
    assert plain.losses[:5] != pytest.approx(alone.losses[:5], abs=1e-3), "nothing was sampled of the features"
    assert plain.losses[5:] != pytest.approx(alone.losses[5:], abs=1e-3), "nothing was sampled of the pictures"


def test_statistics_agree_when_a_run_stops_inside_an_epoch(photos: Path, tmp_path: Path) -> None:
    """BatchNorm in training mode, stopped after three of five steps: the mean of the ranks is judged and saved."""
    model = ("--model", "test_efficientnet", "--weights", "none", "--image-size", "32", "--freeze-epochs", "0")
    flags = ("--data", str(photos), *model, "--batch-size", "8", "--tracker", "none", "--max-steps", "3")
    codes = run_ranks(2, finetune_here, *flags, "--output", str(tmp_path / "run"))
    assert codes == [0, 0]
    assert json.loads((tmp_path / "run/summary.json").read_text())["world_size"] == 2
