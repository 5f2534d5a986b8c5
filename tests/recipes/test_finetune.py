"""The main job through its real command line: what a run leaves behind, how it repeats, resumes and spreads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import offline_wandb
import pytest
import timm
import torch
import yaml
from recipe_runs import ROOT, Run, run_forked
from safetensors.torch import load_file

SMALL = ("--model", "test_vit", "--weights", "none", "--image-size", "32", "--batch-size", "8", "--workers", "1")
STAGES = ("--freeze-epochs", "1", "--epochs", "2", "--log-every", "3", "--lr-ratio", "0.5")


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps(run: Path) -> list[dict[str, Any]]:
    """The per-step records without what depends on the clock."""
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in records(run) if "train/loss" in r]


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, its W&B without a login and without WANDB_MODE."""
    home = tmp_path_factory.mktemp("home")
    environment = {"WANDB_MODE": None, "WANDB_SILENT": None, "HOME": str(home), "NETRC": str(home / "none")}
    flags = ("--data", str(photos), *SMALL, *STAGES, "--drop-rate", "0.1", "--output", "run")
    done = run_forked(home, *flags, environment=environment)
    assert done.returncode == 0, done.stderr
    (home / "stdout.txt").write_text(done.stdout)
    return home / "run"


def test_run_folder_holds_what_the_contract_names(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["status"] == "done"
    assert (summary["world_size"], summary["train_images"], summary["eval_images"]) == (1, 37, 11)
    assert summary["seconds"] > 0
    assert summary["images_per_second"] > 0
    assert summary["versions"]["timm"] == timm.__version__
    assert {"top1", "balanced_accuracy", "loss"} <= summary["best"].keys() & summary["final"].keys()
    evaluations = [r for r in records(finished) if "eval/top1" in r]
    assert len(evaluations) == 3
    assert summary["best"]["balanced_accuracy"] == max(r["eval/balanced_accuracy"] for r in evaluations)
    assert all(r["eval/images"] == 11 for r in evaluations)
    for path in ("config.yaml", "plots/schedule.png", "plots/curves.png", "model/config.json", "wandb"):
        assert (finished / path).exists(), path
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["step-00000010", "step-00000015"]


def test_every_step_is_logged_once_under_the_names_of_the_contract(finished: Path) -> None:
    trained = steps(finished)
    assert [r["step"] for r in trained] == list(range(1, 16))
    assert [r["stage"] for r in trained] == [0] * 5 + [1] * 10
    head = max(k for k in trained[0] if k.startswith("lr/"))
    assert {k for k in trained[0] if k.startswith("lr/")} == {head}
    assert len({k for k in trained[-1] if k.startswith("lr/")}) > 1
    assert all(r["train/grad_norm"] > 0 for r in trained)
    assert trained[4]["epoch"] == 1
    assert any("perf/images_per_second" in r and "perf/memory_gb" in r for r in records(finished))


def test_model_loads_in_timm_and_predicts_the_same(finished: Path, photos: Path) -> None:
    model = timm.create_model(f"local-dir:{finished / 'model'}", pretrained=True).eval()
    assert model.pretrained_cfg["label_names"] == ["cat", "dog", "emu"]
    assert tuple(model.pretrained_cfg["input_size"]) == (3, 32, 32)
    best = json.loads((finished / "summary.json").read_text())["best"]
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    transform = create_transform(**resolve_data_config({}, model=model), is_training=False)
    files = sorted((photos / "val").glob("*/*"))
    batch = torch.stack([transform(Image.open(f).convert("RGB")) for f in files])
    with torch.inference_mode():
        hits = [["cat", "dog", "emu"][i] == f.parent.name for i, f in zip(model(batch).argmax(1), files, strict=True)]
    assert sum(hits) / len(hits) == pytest.approx(best["top1"], abs=1 / 11 + 1e-6)


def test_wandb_holds_the_curves(finished: Path) -> None:
    entries = offline_wandb.entries(finished / "wandb" / "latest-run")
    text = [json.dumps(e) for e in entries if e["type"] == "history"]
    for name in ("train/loss", "train/grad_norm", "lr/layer", "eval/top1", "eval/balanced_accuracy", "eval/loss"):
        assert any(name in entry for entry in text), name
    for name in ("perf/images_per_second", "perf/memory_gb", "stage/name", "plots/curves", "plots/schedule"):
        assert any(name in entry for entry in text), name
    assert sum("train/loss" in entry for entry in text) == 15
    config = next(json.dumps(e) for e in entries if e["type"] == "config" and "batch_size" in json.dumps(e))
    assert '"drop_rate": 0.1' in config


def test_plan_and_closing_lines(finished: Path) -> None:
    shown = (finished.parent / "stdout.txt").read_text()
    for part in ("37 training and 11 evaluation images", "cat 15, dog 12, emu 10", "8 = 1 x 1 x 8", "closed", "fp32"):
        assert part in shown, part
    assert "wandb leet run/wandb/latest-run" in shown
    assert "local-dir:run/model" in shown


def test_config_repeats_the_run(finished: Path, finetune: Run, tmp_path: Path) -> None:
    config = str(finished / "config.yaml")
    done = finetune("--config", config, "--output", "again", "--tracker", "none")
    assert done.returncode == 0, done.stderr
    assert steps(tmp_path / "again") == steps(finished)
    assert yaml.safe_load((tmp_path / "again/config.yaml").read_text())["tracker"] == "none"


@pytest.mark.parametrize("stop", ["5", *(pytest.param(stop, marks=pytest.mark.slow) for stop in ("3", "8"))])
def test_resumed_run_is_the_same_run(finished: Path, photos: Path, finetune: Run, tmp_path: Path, stop: str) -> None:
    """Stopped inside the first stage, at the boundary, and inside the second; W&B beside it or not."""
    flags = ("--data", str(photos), *SMALL, *STAGES, "--drop-rate", "0.1", "--output", "run", "--tracker", "none")
    first = finetune(*flags, "--max-steps", stop)
    assert first.returncode == 0, first.stderr
    second = finetune(*flags, "--resume", "auto")
    assert second.returncode == 0, second.stderr
    assert f"step {stop}," in second.stdout
    assert steps(tmp_path / "run") == steps(finished)
    last = "checkpoints/step-00000015/model.safetensors"
    resumed, uninterrupted = load_file(tmp_path / "run" / last), load_file(finished / last)
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)
    changed = finetune(*flags, "--resume", "auto", "--lr", "0.1")
    assert changed.returncode == 2
    assert "--lr was 0.0003, now 0.1" in changed.stderr


MIXING = ("--mixup", "0.4", "--cutmix", "1", "--loss", "bce", "--label-smoothing", "0.1", "--micro-batch", "4")


@pytest.mark.slow
def test_a_mixing_run_resumed_inside_an_epoch_is_the_same_run(photos: Path, finetune: Run, tmp_path: Path) -> None:
    """Two micro-batches a step; stopped after step 7, which is the second of the second epoch."""
    flags = ("--data", str(photos), *SMALL, *STAGES, *MIXING, "--tracker", "none")
    for argv in (("whole",), ("run", "--max-steps", "7"), ("run", "--resume", "auto")):
        done = finetune(*flags, "--output", *argv)
        assert done.returncode == 0, done.stderr
    assert "step 7," in done.stdout
    assert steps(tmp_path / "run") == steps(tmp_path / "whole")
    last = "checkpoints/step-00000015/model.safetensors"
    resumed, whole = load_file(tmp_path / "run" / last), load_file(tmp_path / "whole" / last)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    plain = finetune(*flags, "--output", "plain", "--mixup", "0", "--cutmix", "0")
    assert plain.returncode == 0, plain.stderr
    assert steps(tmp_path / "plain") != steps(tmp_path / "whole")
    changed = finetune(*flags, "--output", "run", "--resume", "auto", "--mixup", "0.2")
    assert changed.returncode == 2
    assert "--mixup was 0.4, now 0.2" in changed.stderr


DRAWN = ("--sampling", "balanced", "--augment", "strong", "--random-erasing", "0.5", "--mixup", "0.4", "--workers", "2")


def test_sampled_and_augmented_pictures_are_the_same_after_a_resume(
    photos: Path, finetune: Run, tmp_path: Path
) -> None:
    """Two micro-batches a step; stopped after step 7, which is the second of the second epoch."""
    flags = ("--data", str(photos), *SMALL, *STAGES, *DRAWN, "--micro-batch", "4", "--best-by", "macro_f1")
    for argv in (("whole",), ("run", "--max-steps", "7"), ("run", "--resume", "auto")):
        done = finetune(*flags, "--tracker", "none", "--output", *argv)
        assert done.returncode == 0, done.stderr
    assert "step 7," in done.stdout
    assert steps(tmp_path / "run") == steps(tmp_path / "whole")
    last = "checkpoints/step-00000015/model.safetensors"
    resumed, whole = load_file(tmp_path / "run" / last), load_file(tmp_path / "whole" / last)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert "balanced in head, all: an epoch takes each image of emu 1.23 times, of cat 0.822 times" in done.stdout
    assert "TrivialAugment, mixup 0.4, random erasing 0.5 (head, all)" in done.stdout
    assert (tmp_path / "run/plots/augmented_batch.png").exists()
    assert "training pictures as the model sees them" in (tmp_path / "run/report.html").read_text()
    best = json.loads((tmp_path / "run/summary.json").read_text())["best"]
    assert best["macro_f1"] == max(r["eval/macro_f1"] for r in records(tmp_path / "run") if "eval/macro_f1" in r)


def test_a_damaged_checkpoint_is_passed_over(photos: Path, finetune: Run, tmp_path: Path) -> None:
    flags = ("--data", str(photos), *SMALL, *STAGES, "--output", "run", "--tracker", "none", "--save-every", "4")
    assert finetune(*flags, "--max-steps", "8", "--keep", "5").returncode == 0
    weights = tmp_path / "run/checkpoints/step-00000008/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    named = finetune(*flags, "--resume", "run/checkpoints/step-00000008")
    assert named.returncode == 2
    assert "model.safetensors is missing or damaged" in named.stderr
    done = finetune(*flags, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert "step 5," in done.stdout
    assert [r["step"] for r in steps(tmp_path / "run")] == list(range(1, 16))


def test_another_run_in_output_is_refused(finished: Path, photos: Path, finetune: Run) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    done = finetune("--data", str(photos), *SMALL, *STAGES, "--output", str(finished))
    assert done.returncode == 2
    assert "holds another run" in done.stderr
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_dry_run_draws_the_schedule_and_stops(photos: Path, finetune: Run, tmp_path: Path) -> None:
    done = finetune("--data", str(photos), *SMALL, *STAGES, "--output", "run", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*")) if p.is_file()] == [
        "run/plots/schedule.png"
    ]
    again = finetune("--data", str(photos), *SMALL, "--output", "run", "--epochs", "1", "--freeze-epochs", "0")
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
def test_a_wandb_key_that_does_not_work_leaves_the_run_offline(photos: Path, tmp_path: Path) -> None:
    """No network, or a key that is refused: the run goes on, says so, and can be uploaded later."""
    flags = ("--data", str(photos), *SMALL, "--freeze-epochs", "0", "--epochs", "1", "--output", "run")
    done = run_forked(tmp_path, *flags, environment={"WANDB_MODE": None, "WANDB_API_KEY": "0" * 40})
    assert done.returncode == 0, done.stderr
    assert "W&B runs offline" in done.stderr
    assert list((tmp_path / "run/wandb").glob("offline-run-*"))


def test_a_run_is_named_and_filed_in_wandb_as_asked(photos: Path, finetune: Run, tmp_path: Path) -> None:
    named = ("--project", "ripe-fruit", "--run-name", "first try")
    done = finetune(
        *("--data", str(photos), *SMALL, *named, "--freeze-epochs", "0", "--epochs", "1", "--output", "run")
    )
    assert done.returncode == 0, done.stderr
    (record,) = (e["run"] for e in offline_wandb.entries(tmp_path / "run/wandb/latest-run") if e["type"] == "run")
    assert (record["project"], record["display_name"]) == ("ripe-fruit", "first try")


def test_tensorboard(photos: Path, finetune: Run, tmp_path: Path) -> None:
    done = finetune("--data", str(photos), *SMALL, *STAGES, "--output", "run", "--tracker", "tensorboard")
    assert done.returncode == 0, done.stderr
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {p.parent for p in (tmp_path / "run").rglob("events.out.tfevents.*") if "fine-tuning" in p.parent.name}
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 16))
    assert len(events.Scalars("eval/balanced_accuracy")) == 3


def test_stages_from_a_preset(photos: Path, finetune: Run, tmp_path: Path) -> None:
    """AdamW first, SGD last, at another image size, batch and schedule."""
    preset = tmp_path / "two.yaml"
    preset.write_text(
        "model: test_efficientnet\nweights: none\nimage_size: 32\nworkers: 0\n"
        "stages:\n- {open: 50%, epochs: 1, batch_size: 8, cache_features: false}\n"
        "- {name: last, open: all, epochs: 1, optimizer: sgd, lr: 1e-2, schedule: one-cycle, image_size: 48, "
        "batch_size: 6}\n"
    )
    done = finetune("--data", str(photos), "--preset", str(preset), "--output", "run", "--tracker", "none")
    assert done.returncode == 0, done.stderr
    trained = steps(tmp_path / "run")
    assert [r["stage"] for r in trained] == [0] * 5 + [1] * 7
    assert "top-50%" in done.stdout
    assert "sgd, one-cycle" in done.stdout


def test_model_keeps_the_size_of_the_stage_that_made_it(photos: Path, finetune: Run, tmp_path: Path) -> None:
    preset = tmp_path / "large.yaml"
    preset.write_text("image_size: 32\nstages:\n- {open: all, epochs: 1, image_size: 64, batch_size: 8}\n")
    flags = ("--data", str(photos), "--model", "test_efficientnet", "--weights", "none")
    done = finetune(*flags, "--preset", str(preset), "--output", "run", "--tracker", "none")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/model/config.json").read_text())["pretrained_cfg"]["input_size"] == [3, 64, 64]


def test_broken_pictures_are_replaced_left_out_and_named(photos: Path, finetune: Run, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(photos, broken)
    for path in ("train/cat/000.jpg", "val/dog/000.jpg"):
        (broken / path).write_bytes((broken / path).read_bytes()[:100])
    done = finetune("--data", str(broken), *SMALL, *STAGES, "--output", "run", "--tracker", "none")
    assert done.returncode == 0, done.stderr
    for path in ("train/cat/000.jpg", "val/dog/000.jpg"):
        (line,) = {line for line in done.stdout.splitlines() if path in line}
        assert line.count(path) == 1
    assert [r["eval/images"] for r in records(tmp_path / "run") if "eval/images" in r] == [10, 10, 10]


def test_resume_that_has_nothing_to_go_on_with(finished: Path, photos: Path, finetune: Run, tmp_path: Path) -> None:
    flags = ("--data", str(photos), *SMALL, *STAGES)
    nowhere = finetune(*flags, "--resume", "auto")
    assert nowhere.returncode == 2
    assert "--resume auto needs --output" in nowhere.stderr
    before = (finished / "summary.json").read_bytes()
    over = finetune(*flags, "--drop-rate", "0.1", "--resume", "auto", "--output", str(finished))
    assert over.returncode == 0, over.stderr
    assert "Nothing left to do" in over.stdout
    assert (finished / "summary.json").read_bytes() == before
    foreign = finetune(*flags, "--resume", str(finished / "checkpoints/step-00000010"), "--output", "other")
    assert foreign.returncode == 2
    assert "belongs to the run in" in foreign.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("launcher", ["accelerate", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_two_processes_from_a_real_launcher(finished: Path, photos: Path, tmp_path: Path, launcher: str) -> None:
    recipe = str(ROOT / "recipes" / "finetune.py")
    start = {
        "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"],
        "torchrun": ["torch.distributed.run", "--nproc_per_node", "2"],
    }[launcher]
    flags = ["--data", str(photos), *SMALL, *STAGES, "--output", "run", "--tracker", "none"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "MASTER_PORT": "0"}
    if launcher == "accelerate":
        start += ["--main_process_port", "0"]
    command = [sys.executable, "-m", *start, recipe, *flags]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["world_size"] == 2
    assert "8 = 2 x 1 x 4" in done.stdout
    assert done.stdout.count("Done in") == 1
    two, one = steps(tmp_path / "run"), steps(finished)
    assert [{k: v for k, v in r.items() if k.startswith("lr/")} for r in two] == [
        {k: v for k, v in r.items() if k.startswith("lr/")} for r in one
    ]


def test_demo_on_few_pictures(finetune: Run, tmp_path: Path) -> None:
    """The demo's own parts: packaged weights, solar cells, cached features; no network, no W&B login."""
    done = finetune("--limit-train", "256", "--limit-eval", "64", "--output", "run")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["train_images"] == 256
    assert summary["best"]["balanced_accuracy"] > 0.55
    assert "fitted head" in done.stdout


@pytest.mark.slow
def test_demo_beats_a_linear_probe_in_two_minutes(tmp_path: Path) -> None:
    """The bar of the README, for one seed: under 120 s, and better than the linear probe of its split."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "recipes" / "finetune.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    linear_probe = 0.7796  # python -m tests.benchmarks.linear_probe --seeds 0 --image-size 128
    assert summary["final"]["balanced_accuracy"] >= linear_probe + 0.015
    assert summary["seconds"] < 120
