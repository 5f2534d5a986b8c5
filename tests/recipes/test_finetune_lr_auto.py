"""`--lr auto` in the real recipe: what it finds is what is trained with, and the search leaves nothing else behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import offline_wandb
import pytest
import torch
from ranks import run_ranks
from recipe_runs import Run, finetune_here
from safetensors.torch import load_file

SMALL = ("--model", "test_efficientnet", "--weights", "none", "--image-size", "32", "--batch-size", "12")
HOW = ("--workers", "0", "--lr-ratio", "0.5", "--drop-rate", "0.2", "--freeze-epochs", "1", "--epochs", "5")
SEARCH = ("--lr", "auto", "--finder-steps", "12", "--finder-sweeps", "1", "--finder-race", "20")


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def trained(run: Path) -> list[dict[str, Any]]:
    """Training and evaluation records without what a clock or a memory says."""
    kept = [r for r in records(run) if not any(key.startswith("lr_finder/") for key in r)]
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in kept]


def found(run: Path) -> list[dict[str, Any]]:
    return [r for r in records(run) if any(key.startswith("lr_finder/") for key in r)]


@pytest.fixture(scope="module")
def searched(coloured: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from recipe_runs import run_forked

    folder = tmp_path_factory.mktemp("searched")
    done = run_forked(folder, "--data", str(coloured), *SMALL, *HOW, *SEARCH, "--output", "run")
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder / "run"


def test_the_search_is_in_the_curves(searched: Path) -> None:
    swept = [r for r in found(searched) if "lr_finder/loss" in r]
    raced = [r for r in found(searched) if "lr_finder/race_loss" in r]
    (answer,) = [r["lr_finder/chosen"] for r in found(searched) if "lr_finder/chosen" in r]
    assert 1 < len(swept) <= 12
    best = max(raced, key=lambda r: (r["lr_finder/race_reached"], -r["lr_finder/race_loss"]))
    assert answer == best["lr_finder/race_lr"]
    final = json.loads((searched / "summary.json").read_text())["final"]
    assert final["balanced_accuracy"] == best["lr_finder/race_reached"], "a stage raced whole: the winner is the run"
    assert {(r["step"], r["stage"]) for r in found(searched)} == {(4, 1)}, "at the start of the second stage"
    assert [r["lr_finder/number"] for r in found(searched)] == list(range(1, len(found(searched)) + 1))
    of_stage = [r for r in trained(searched) if r["stage"] == 1 and "train/loss" in r]
    heads = [max(value for key, value in r.items() if key.startswith("lr/")) for r in of_stage]
    assert max(heads) == pytest.approx(answer, rel=1e-6)
    said = " ".join((searched.parent / "stdout.txt").read_text().split())
    assert f"--lr auto: {answer:.2e}; it won a race of {len(raced)} over 20 steps, the whole stage" in said
    assert "of the run's steps." in said
    assert (searched / "plots/lr_finder.png").stat().st_size > 5_000


def test_wandb_holds_it_over_the_learning_rate(searched: Path) -> None:
    entries = offline_wandb.entries(searched / "wandb" / "latest-run")
    history = [json.dumps(entry) for entry in entries if entry["type"] == "history"]
    for name in ("lr_finder/loss", "lr_finder/race_loss", "lr_finder/log10_lr", "lr_finder/chosen", "plots/lr_finder"):
        assert any(f'"{name}' in entry for entry in history), name
    metrics = [json.dumps(entry) for entry in entries if "metric" in entry["type"]]
    assert any("lr_finder/loss" in entry and "lr_finder/log10_lr" in entry for entry in metrics), metrics[:3]


def test_a_run_with_that_learning_rate_typed_is_the_same_run(
    searched: Path, coloured: Path, finetune: Run, tmp_path: Path
) -> None:
    (answer,) = [r["lr_finder/chosen"] for r in found(searched) if "lr_finder/chosen" in r]
    typed = ("--lr", repr(answer), "--tracker", "none", "--output", "typed")
    done = finetune("--data", str(coloured), *SMALL, *HOW, *typed)
    assert done.returncode == 0, done.stderr
    assert trained(tmp_path / "typed") == trained(searched)
    last = "checkpoints/step-00000024/model.safetensors"
    ours, theirs = load_file(tmp_path / "typed" / last), load_file(searched / last)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_that_stopped_before_or_after_the_search_goes_on_as_it_was(
    searched: Path, coloured: Path, finetune: Run, tmp_path: Path
) -> None:
    flags = ("--data", str(coloured), *SMALL, *HOW, *SEARCH, "--tracker", "none", "--output", "run")
    for stop in (("--max-steps", "4"), ("--max-steps", "6"), ()):
        done = finetune(*flags, *stop, "--resume", "auto")
        assert done.returncode == 0, done.stderr
    assert trained(tmp_path / "run") == trained(searched)
    assert found(tmp_path / "run") == found(searched)


def here(folder: str, *flags: str) -> int:
    import os

    os.chdir(folder)
    return finetune_here(*flags)


@pytest.mark.slow
def test_two_processes_find_and_train_the_same(coloured: Path, tmp_path: Path) -> None:
    """Both ranks take the same answer, or their gradients would drift apart and the run be refused."""
    flags = ("--data", str(coloured), *SMALL, *HOW, "--tracker", "none")
    assert run_ranks(2, here, str(tmp_path), *flags, *SEARCH, "--output", "auto") == [0, 0]
    (answer,) = [r["lr_finder/chosen"] for r in found(tmp_path / "auto") if "lr_finder/chosen" in r]
    assert run_ranks(2, here, str(tmp_path), *flags, "--lr", repr(answer), "--output", "typed") == [0, 0]
    assert trained(tmp_path / "typed") == trained(tmp_path / "auto")


def test_without_an_answer_the_default_is_kept_and_said(coloured: Path, finetune: Run, tmp_path: Path) -> None:
    nowhere = ("--finder-start", "1e-9", "--finder-end", "1e-8", "--finder-race", "0", "--tracker", "none")
    done = finetune("--data", str(coloured), *SMALL, *HOW, *SEARCH[:-2], *nowhere, "--output", "run")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "--lr auto: no confident answer (" in said
    assert "The learning rate stays 0.0003." in said
    assert not any("lr_finder/chosen" in r for r in found(tmp_path / "run"))


@pytest.mark.slow
def test_each_stage_may_search(coloured: Path, finetune: Run, tmp_path: Path) -> None:
    twice = ("--finder-at", "stages", "--unfreeze", "gradual", "--tracker", "none", "--output", "run")
    done = finetune("--data", str(coloured), *SMALL, *HOW, *SEARCH, *twice)
    assert done.returncode == 0, done.stderr
    assert {r["stage"] for r in found(tmp_path / "run")} == {1, 2}
