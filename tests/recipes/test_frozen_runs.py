"""Head-only stages through the real command line: what is chosen for them is the run's, whatever clocks say later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_runs import Run, run_forked
from safetensors.torch import load_file

from tuning import frozen_choice
from tuning.frozen_choice import Timed

SMALL = ("--model", "test_efficientnet", "--weights", "none", "--image-size", "32", "--batch-size", "8")
STAGES = ("--workers", "0", "--freeze-epochs", "1", "--epochs", "0", "--tracker", "none", "--output", "run")
BF16 = {"fp32": Timed(0.01, 0.0), "bf16": Timed(0.006, 0.01), "bf16-channels-last": Timed(0.004, 0.01)}
FP32 = {"fp32": Timed(0.01, 0.0), "bf16": Timed(0.03, 0.01)}


def losses(run: Path) -> list[float]:
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


def clock(monkeypatch: pytest.MonkeyPatch, timed: dict[str, Timed]) -> None:
    """Stages of any length are timed, with this result; runs are forked from this process."""
    monkeypatch.setattr(frozen_choice, "SHARE", 1e6)
    monkeypatch.setattr(frozen_choice, "time_candidates", lambda model, images: timed)


def summary(run: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return read


@pytest.mark.slow
def test_a_run_goes_on_with_its_choice(
    photos: Path,
    finetune: Run,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped in the head's stage and gone on under a clock that says otherwise: the uninterrupted run, bit for bit."""
    flags, home = ("--data", str(photos), *SMALL, *STAGES), tmp_path_factory.mktemp("whole")
    clock(monkeypatch, BF16)
    whole = run_forked(home, *flags)
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("closed layers run in bf16-channels-last, 1.0% from fp32") == 1
    assert summary(home / "run")["frozen_forward"] == "bf16-channels-last"
    assert summary(home / "run")["precision"] == "fp32"
    stopped = finetune(*flags, "--max-steps", "3")
    assert stopped.returncode == 0, stopped.stderr
    clock(monkeypatch, FP32)
    resumed = finetune(*flags, "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert "closed layers run" not in resumed.stdout
    assert summary(tmp_path / "run")["frozen_forward"] == "bf16-channels-last"
    assert losses(tmp_path / "run") == losses(home / "run")
    last = "run/checkpoints/step-00000005/model.safetensors"
    ours, theirs = load_file(tmp_path / last), load_file(home / last)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_views_of_features_resume(photos: Path, finetune: Run, tmp_path: Path) -> None:
    """Three epochs on two views, stopped within the third: the uninterrupted run, bit for bit."""
    flags: tuple[str, ...] = ("--data", str(photos), *SMALL, *STAGES)
    flags += ("--freeze-epochs", "3", "--cache-features", "--feature-views", "2", "--augment", "strong")
    whole = finetune(*flags, "--output", "whole")
    assert whole.returncode == 0, whole.stderr
    assert "features of 2 views: 0.1 MB" in whole.stdout
    assert "random erasing 0.25, 2 views of every picture, drawn once" in whole.stdout
    assert summary(tmp_path / "whole")["frozen_forward"] is None
    assert finetune(*flags, "--max-steps", "12").returncode == 0
    resumed = finetune(*flags, "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_the_upper_part_on_features_resumes(photos: Path, finetune: Run, tmp_path: Path) -> None:
    """From a fitted head, with an average, stopped within the second epoch: the uninterrupted run, bit for bit."""
    (tmp_path / "half.yaml").write_text("stages: [{open: 0.5, epochs: 3, cache_features: true}]\n")
    flags: tuple[str, ...] = ("--data", str(photos), *SMALL, "--workers", "0", "--tracker", "none")
    flags += ("--preset", "half.yaml", "--head-init", "fitted", "--augment", "none", "--ema-decay", "0.9")
    whole = finetune(*flags, "--output", "whole")
    assert whole.returncode == 0, whole.stderr
    assert "none: features are computed once (top-50%)" in whole.stdout
    judged = [line for line in whole.stdout.splitlines() if "eval:" in line]
    assert [line.split()[0] for line in judged] == ["fitted", *["top-50%"] * 3], "after every epoch"
    assert finetune(*flags, "--output", "run", "--max-steps", "7").returncode == 0
    resumed = finetune(*flags, "--output", "run", "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    best = [summary(tmp_path / run)["best"] for run in ("run", "whole")]
    assert best[0] == best[1]


@pytest.mark.parametrize("depth", ["head", "0.5"])
def test_features_that_an_average_would_not_have_are_refused(
    depth: str, photos: Path, finetune: Run, tmp_path: Path
) -> None:
    """After a stage that opens everything the average's lower layers lag behind those that make the features."""
    stages = f"stages: [{{open: all, epochs: 1}}, {{open: {depth}, epochs: 2, cache_features: true}}]"
    (tmp_path / "back.yaml").write_text(f"{stages}\n")
    flags = ("--data", str(photos), *SMALL, "--preset", "back.yaml", "--workers", "0", "--augment", "none", "--dry-run")
    refused = finetune(*flags, "--ema-decay", "0.9")
    assert refused.returncode == 2
    assert "the average lags behind the layers that the features come from" in refused.stderr
    assert finetune(*flags).returncode == 0
