"""`--head-init fitted` in the recipe: a good head before the first step, kept when nothing is better, fitted once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pictures import write_colours
from PIL import Image
from recipe_runs import Run, run_forked
from safetensors.torch import load_file

SMALL = ("--model", "test_vit", "--weights", "none", "--image-size", "32", "--batch-size", "8", "--workers", "0")
FITTED = (*SMALL, "--head-init", "fitted", "--tracker", "none", "--output", "run", "--log-every", "3")
STAGES = ("--freeze-epochs", "1", "--epochs", "1", "--drop-rate", "0.1")


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classes that are harder to tell apart than elsewhere."""
    return write_colours(tmp_path_factory.mktemp("coloured"), train=12, val=6, strength=160)


def records(run: Path) -> list[dict[str, Any]]:
    """Without what depends on the clock."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in lines if "stage/name" not in r]


@pytest.fixture(scope="module")
def finished(coloured: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    done = run_forked(home, "--data", str(coloured), *FITTED, *STAGES)
    assert done.returncode == 0, done.stderr
    (home / "stdout.txt").write_text(done.stdout)
    return home / "run"


def test_it_is_judged_before_the_first_step(finished: Path) -> None:
    first, second, *_ = records(finished)
    assert (first["step"], first["epoch"], first["stage"]) == (0, 0, 0)
    assert first["eval/images"] == 18
    assert first["eval/balanced_accuracy"] > 0.8
    assert second["step"] == 1
    assert "train/loss" in second
    assert [r["step"] for r in records(finished) if "eval/loss" in r] == [0, 5, 10]
    (line,) = [line for line in (finished.parent / "stdout.txt").read_text().splitlines() if "fitted head" in line]
    assert f"balanced_accuracy {first['eval/balanced_accuracy']:.4f}" in line


def test_training_goes_on_from_it(finished: Path, coloured: Path, finetune: Run, tmp_path: Path) -> None:
    """The first loss is that of the fitted head, not of a fresh one."""
    fresh = [flag for flag in FITTED if flag not in ("--head-init", "fitted")]
    done = finetune("--data", str(coloured), *fresh, *STAGES)
    assert done.returncode == 0, done.stderr
    assert records(finished)[1]["train/loss"] < 0.7 * records(tmp_path / "run")[0]["train/loss"]


@pytest.mark.parametrize("cached", [pytest.param((), marks=pytest.mark.slow), ("--cache-features",)])
def test_it_is_kept_when_training_makes_it_worse(
    coloured: Path, finetune: Run, tmp_path: Path, cached: tuple[str, ...]
) -> None:
    ruinous = ("--freeze-epochs", "1", "--freeze-lr", "1", "--epochs", "0", "--label-smoothing", "0.9")
    done = finetune("--data", str(coloured), *FITTED, *ruinous, *cached, "--best-by", "loss")
    assert done.returncode == 0, done.stderr
    first, *_, last = [r for r in records(tmp_path / "run") if "eval/loss" in r]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["best"]["loss"] == first["eval/loss"] < last["eval/loss"]
    model = timm.create_model(f"local-dir:{tmp_path / 'run/model'}", pretrained=True).eval()
    assert accuracy(model, coloured / "val") == pytest.approx(first["eval/top1"], abs=1 / 18 + 1e-6)
    trained = load_file(tmp_path / "run/checkpoints/step-00000005/model.safetensors")
    assert not torch.equal(trained["head.weight"], model.state_dict()["head.weight"])


def accuracy(model: torch.nn.Module, folder: Path) -> float:
    from timm.data import create_transform, resolve_data_config

    transform = create_transform(**resolve_data_config({}, model=model), is_training=False)
    files = sorted(folder.glob("*/*"))
    with torch.inference_mode():
        found = model(torch.stack([transform(Image.open(file)) for file in files])).argmax(1)
    hits = [("blue", "green", "red")[n] == file.parent.name for n, file in zip(found, files, strict=True)]
    return sum(hits) / len(hits)


def test_a_pretrained_model_begins_with_it_where_no_flag_says_how(
    coloured: Path, finished: Path, finetune: Run, tmp_path: Path
) -> None:
    flags = ("--data", str(coloured), "--image-size", "32", "--workers", "0", "--tracker", "none", "--epochs", "1")
    done = finetune(*flags, "--model", "tf_efficientnet_lite0", "--output", "run")
    assert done.returncode == 0, done.stderr
    assert "note: --head-init fitted --freeze-epochs 0: the head begins as" in " ".join(done.stdout.split())
    assert [r["step"] for r in records(tmp_path / "run") if "eval/loss" in r] == [0, 5]  # 36 images, 8 a step
    own = ("--model", f"local-dir:{finished / 'model'}", "--output", "own", "--dry-run")
    done = finetune(*flags, *own)  # has a head for these classes already
    assert done.returncode == 0, done.stderr
    assert "--head-init fitted" not in done.stdout


@pytest.mark.parametrize(
    "stop", [pytest.param("2", marks=pytest.mark.slow), "5", pytest.param("7", marks=pytest.mark.slow)]
)
def test_a_resumed_run_does_not_fit_again(
    finished: Path, coloured: Path, finetune: Run, tmp_path: Path, stop: str
) -> None:
    flags = ("--data", str(coloured), *FITTED, *STAGES)
    assert finetune(*flags, "--max-steps", stop).returncode == 0
    second = finetune(*flags, "--resume", "auto")
    assert second.returncode == 0, second.stderr
    assert "fitted head" not in second.stdout
    run = tmp_path / "run"
    # The stopped run was judged once more, where it stopped.
    expected = records(finished)
    assert [r for r in records(run) if r in expected] == expected
    assert {r["step"] for r in records(run) if r not in expected} <= {int(stop)}
    last = "checkpoints/step-00000010/model.safetensors"
    resumed, uninterrupted = load_file(run / last), load_file(finished / last)
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)
    best, its_best = (json.loads((folder / "summary.json").read_text())["best"] for folder in (run, finished))
    assert best["balanced_accuracy"] >= its_best["balanced_accuracy"]
