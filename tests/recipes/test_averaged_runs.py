"""SWA, EMA and snapshots through the real command line: what is left behind, resumed in the middle, judged again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from ranks import run_ranks
from recipe_runs import Run, import_after, recipe_here, run_forked
from safetensors.torch import load_file

# Everything at once: cycles of one epoch (five steps), statistics that move and are taken anew.
FLAGS = ("--model", "test_efficientnet", "--weights", "none", "--image-size", "32", "--batch-size", "8")
FLAGS += ("--freeze-epochs", "0", "--epochs", "4", "--schedule", "sgdr", "--cycle-epochs", "1", "--cycle-mult", "1")
FLAGS += ("--snapshots", "--swa-epochs", "3", "--ema-decay", "0.9", "--batch-norm-images", "20")
FLAGS += ("--workers", "0", "--tracker", "none", "--keep", "9", "--lr", "3e-3", "--best-of", "any")
NUMBERS = ["01", "02", "03", "04"]


def records(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, its closing words beside it."""
    home = tmp_path_factory.mktemp("home")
    done = run_forked(home, "--data", str(photos), *FLAGS, "--output", "run")
    assert done.returncode == 0, done.stderr
    (home / "stdout.txt").write_text(done.stdout)
    return home / "run"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_every_cycle_leaves_a_model_and_all_are_judged(finished: Path) -> None:
    folders = sorted(path.name for path in (finished / "snapshots").iterdir())
    assert folders == [*NUMBERS, "averaged"]
    told = summary(finished)["snapshots"]
    assert list(told) == [*NUMBERS, "ensemble", "averaged"]
    (logged,) = [record for record in records(finished) if "eval_ensemble/top1" in record]
    assert logged["step"] == 20
    assert logged["eval_snapshot01/balanced_accuracy"] == told["01"]["balanced_accuracy"]
    assert logged["eval_averaged/loss"] == told["averaged"]["loss"]
    last = [record for record in records(finished) if "eval/loss" in record][-1]
    assert told["04"]["loss"] == pytest.approx(last["eval/loss"], abs=1e-6), "the last snapshot is the last evaluation"
    said = (finished.parent / "stdout.txt").read_text()
    assert "Snapshots, balanced_accuracy: 01 0." in said
    assert "adamw, sgdr, BatchNorm train, SWA of 3" in said
    assert (finished / "plots/snapshots.png").exists()
    model = timm.create_model(f"local-dir:{finished / 'snapshots/02'}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == ["cat", "dog", "emu"]


def test_averaged_snapshots_are_the_mean_and_so_is_swa(finished: Path) -> None:
    members = [weights(finished / "snapshots" / number) for number in NUMBERS]
    averaged, moved = weights(finished / "snapshots/averaged"), 0
    for name, value in averaged.items():
        mean = torch.stack([member[name].double() for member in members]).mean(0)
        if "running_" in name:
            moved += not torch.allclose(value.double(), mean, rtol=1e-3)
        elif value.is_floating_point():
            assert torch.allclose(value.double(), mean, atol=1e-6), name
    assert moved > 5, "running statistics are no means, but taken anew"
    swa = load_file(finished / "checkpoints/step-00000020/swa.safetensors")
    for name, value in swa.items():
        if value.is_floating_point() and "running_" not in name:
            mean = torch.stack([member[name].double() for member in members[1:]]).mean(0)
            assert torch.allclose(value.double(), mean, atol=1e-6), name


def test_the_best_of_all_is_kept(finished: Path) -> None:
    told, found = summary(finished), []
    for record in records(finished):
        for whose in ("eval", "eval_ema", "eval_swa"):
            if f"{whose}/loss" in record:
                found.append((record[f"{whose}/balanced_accuracy"], whose, record["step"]))
    assert {whose for _, whose, _ in found} == {"eval", "eval_ema", "eval_swa"}
    value, whose, step = max(found, key=lambda one: one[0])  # the first of equals
    assert (told["best_of"], told["best"]["step"]) == (whose, step)
    assert told["best"]["balanced_accuracy"] == value
    assert told["judged"]["balanced_accuracy"] == pytest.approx(value, abs=1e-6), "model/ is what was judged best"


def test_a_run_that_goes_on_in_the_middle_is_the_same(
    finished: Path, photos: Path, finetune: Run, tmp_path: Path
) -> None:
    """Stopped after 12 of 20 steps: two snapshots taken, one of three weights averaged."""
    flags = ("--data", str(photos), *FLAGS, "--output", "run", "--save-every", "3")
    assert finetune(*flags, "--max-steps", "12").returncode == 0
    half = tmp_path / "run"
    assert sorted(path.name for path in (half / "snapshots").iterdir()) == ["01", "02", "averaged"]
    assert (half / "checkpoints/step-00000012/swa.safetensors").exists()
    assert not (half / "checkpoints/step-00000009/swa.safetensors").exists()
    (half / "snapshots/02/model.safetensors").write_bytes(b"")  # of a step that is made again
    done = finetune(*flags[:-2], "--save-every", "3", "--resume", str(half / "checkpoints/step-00000009"))
    assert done.returncode == 0, done.stderr
    for file in ("model", "ema", "swa"):
        one, two = (load_file(run / f"checkpoints/step-00000020/{file}.safetensors") for run in (finished, half))
        assert all(torch.equal(one[name], two[name]) for name in one), file
    for number in (*NUMBERS, "averaged"):
        one, two = (weights(run / "snapshots" / number) for run in (finished, half))
        assert all(torch.equal(one[name], two[name]) for name in one), number
    assert summary(half)["snapshots"] == summary(finished)["snapshots"]
    assert records(half) == records(finished)


def evaluated(folder: Path, run: Path) -> dict[str, Any]:
    import_after()
    members = [str(run / "snapshots" / number) for number in NUMBERS]
    done = recipe_here(folder, "evaluate", "--run", members[0], "--ensemble", *members[1:], "--output", "judged")
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "judged/metrics.json").read_text())


def test_evaluate_takes_snapshots_as_an_ensemble(finished: Path, tmp_path: Path) -> None:
    """On the run's own evaluation images, without being told where they are."""
    (found,) = run_ranks(1, evaluated, tmp_path, finished)
    told = summary(finished)["snapshots"]["ensemble"]
    assert found["images"] == told["images"] == 11
    for name in ("top1", "balanced_accuracy", "loss"):
        assert found[name] == pytest.approx(told[name], abs=1e-6)


def test_one_cycle_is_no_ensemble(photos: Path, finetune: Run, tmp_path: Path) -> None:
    flags = ("--data", str(photos), *FLAGS[:8], "--freeze-epochs", "0", "--epochs", "2", "--schedule", "sgdr")
    done = finetune(*flags, "--snapshots", "--output", "run")
    assert done.returncode == 2
    assert "--snapshots: the run completes 1 sgdr cycles, an ensemble needs 2" in done.stderr
    assert not (tmp_path / "run").exists()
    done = finetune(*flags, "--swa-epochs", "2", "--output", "run")
    assert done.returncode == 2
    assert "--swa-epochs 2 averages at 1 ends of sgdr cycles; an average needs 2" in done.stderr
