"""The overfit check through its command line: healthy models pass, and every planted fault fails and is named."""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import noise, write_classes
from ranks import run_ranks
from recipe_runs import Run
from torch import nn

ROOT = Path(__file__).parents[2]
BASE = ("--weights", "none", "--image-size", "32", "--workers", "0", "--threads", "1", "--tracker", "none")
VIT = ("--model", "test_vit", *BASE)
SHORT = ("--overfit-steps", "24")
HARD = ("--augment", "medium", "--flip", "both", "--label-smoothing", "0.3", "--drop-rate", "0.5")
HARD += ("--mixup", "1", "--cutmix", "1", "--loss", "bce")
HARD += ("--weight-decay", "0.5", "--warmup-epochs", "2", "--class-weights", "balanced")

Plant = Callable[[], None]


@dataclass
class Checked:
    """How a check ended: exit status, its output, its ``summary.json`` and its curve of losses."""

    status: int
    said: str
    summary: dict[str, Any]
    losses: list[float]

    @property
    def kinds(self) -> set[str]:
        return {suspect["kind"] for suspect in self.summary["suspects"]}

    def text(self, kind: str) -> str:
        return next(suspect["text"] for suspect in self.summary["suspects"] if suspect["kind"] == kind)


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """What the recipe imports, once, so that forked processes have it."""
    for module in (
        "tracking.console",
        "data.sources",
        "feeds",
        "models.head_fit",
        "overfit.overfitting",
        "preparing",
        "safety.stopping",
        "tracking.track",
    ):
        import_module(f"tuning.{module}")


def check(folder: Path, *flags: str, plant: Plant | None = None, processes: int = 1) -> Checked:
    """The recipe with *flags* on forked processes, each after *plant* has put a fault into the code."""
    output = folder / "run"
    answers = run_ranks(processes, _recipe, ("--output", str(output), *flags), plant)
    assert {status for status, _ in answers} == {answers[0][0]}, answers
    status, said = answers[0]
    summary, metrics = output / "summary.json", output / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    return Checked(status, said, json.loads(summary.read_text()) if summary.exists() else {}, losses)


def _recipe(flags: tuple[str, ...], plant: Plant | None) -> tuple[int, str]:
    import overfit as recipe

    from tuning.cli.command_line import run_recipe

    if plant:
        plant()
    sys.argv = ["overfit.py", *flags]
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said), pytest.raises(SystemExit) as ended:
        run_recipe(recipe.overfit, "recipes/overfit.py", presets=ROOT / "recipes" / "presets")
    return int(ended.value.code or 0), said.getvalue()


# Healthy models


@pytest.mark.parametrize("model", ["test_vit", "test_efficientnet", "test_convnext", "test_resnet"])
def test_a_healthy_model_passes(photos: Path, tmp_path: Path, model: str) -> None:
    """However the flags stand that make a batch harder to learn."""
    done = check(tmp_path, "--data", str(photos), "--model", model, *BASE, *HARD, "--lr", "1e-3")
    assert (done.status, done.summary["verdict"]) == (0, "PASS"), done.said
    assert done.summary["status"] == "done"
    assert done.summary["train_images"] == 16
    assert 0 < done.summary["steps"] == len(done.losses) < 200
    assert done.losses[-1] < 0.1 <= min(done.losses[:-1])
    assert done.summary["last_loss"] == pytest.approx(done.losses[-1])
    assert "PASS: 16 pictures" in done.said
    assert "Off: augmentation, flips, mixup, cutmix, dropout" in done.said


def test_every_step_sees_the_same(photos: Path, tmp_path: Path) -> None:
    """At a learning rate of nothing the loss stays what it is, so nothing in a step is random."""
    flags = ("--drop-path-rate", "0.5", "--lr", "1e-12", "--overfit-steps", "8")
    done = check(tmp_path, "--data", str(photos), *VIT, *HARD, *flags)
    assert done.kinds == {"lr-too-small"}, done.said
    assert max(done.losses) - min(done.losses) < 1e-5


def test_processes_and_accumulation_give_the_same_curve(photos: Path, tmp_path: Path) -> None:
    curves = []
    for number, (processes, micro) in enumerate([(1, "16"), (1, "4"), (2, "4")]):
        folder = tmp_path / str(number)
        flags = ("--data", str(photos), *VIT, *SHORT, "--micro-batch", micro, "--overfit-target", "0.9")
        done = check(folder, *flags, processes=processes)
        assert done.summary["verdict"] == "PASS", done.said
        assert done.summary["world_size"] == processes
        curves.append(done.losses)
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], abs=1e-5)


def test_every_picture_of_a_limit_and_several_batches_a_pass(photos: Path, tmp_path: Path) -> None:
    flags = ("--data", str(photos), *VIT, "--limit-train", "9", "--batch-size", "4", "--max-steps", "7")
    done = check(tmp_path, *flags)
    assert (done.status, done.summary["train_images"], done.summary["steps"]) == (1, 9, 7)
    assert done.summary["last_loss"] == pytest.approx((4 * done.losses[3] + 4 * done.losses[4] + done.losses[5]) / 9)


def test_a_stage_of_choice(photos: Path, tmp_path: Path) -> None:
    done = check(tmp_path, "--data", str(photos), *VIT, *SHORT, "--overfit-stage", "head", "--freeze-lr", "0.5")
    assert done.summary["stage"] == "head"
    (record, *_) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()][1:]
    assert [key for key in record if key.startswith("lr/")] == ["lr/layer7"]


# Planted faults: in the model


def in_model(change: Callable[[nn.Module], None]) -> Plant:
    """Let *change* spoil every model that is built."""

    def plant() -> None:
        from tuning import preparing

        build = preparing.build

        @functools.wraps(build)
        def spoilt(*args: Any, **options: Any) -> Any:
            model, info = build(*args, **options)
            change(model)
            return model, info

        preparing.build = spoilt  # type: ignore[assignment]

    return plant


def detach_blocks(model: nn.Module) -> None:
    model.blocks[0].register_forward_hook(lambda module, inputs, output: output.detach())


def multiply_by_zero(model: nn.Module) -> None:
    model.blocks[0].register_forward_hook(lambda module, inputs, output: output * 0 + torch.arange(64) / 64)


def detach_outputs(model: nn.Module) -> None:
    model.register_forward_hook(lambda module, inputs, output: output.detach())


def huge_head(model: nn.Module) -> None:
    model.head.weight.data.normal_(std=100.0)


def poison(model: nn.Module) -> None:
    model.head.weight.data[0, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (detach_blocks, "no-gradient", ("layer0 (cls_token)", "layer1 (blocks.0.")),
        (multiply_by_zero, "zero-gradient", ("layer0 (cls_token)", "layer1 (blocks.0.")),
        (detach_outputs, "no-gradient", ("no open parameter",)),
        (poison, "not-finite", ("of 16 pictures before any training",)),
    ],
)
def test_faults_in_the_model(
    photos: Path, tmp_path: Path, change: Callable[[nn.Module], None], kind: str, words: tuple[str, ...]
) -> None:
    done = check(tmp_path, "--data", str(photos), *VIT, "--overfit-steps", "6", plant=in_model(change))
    assert (done.status, done.summary["verdict"]) == (1, "FAIL"), done.said
    assert all(word in done.text(kind) for word in words), done.said
    assert f"{kind}: " in done.said


def test_a_loss_that_starts_far_off_is_named_even_if_it_is_learned(photos: Path, tmp_path: Path) -> None:
    done = check(tmp_path, "--data", str(photos), *VIT, "--overfit-steps", "60", plant=in_model(huge_head))
    assert done.summary["verdict"] == "PASS", done.said
    assert "ln(3) = 1.1" in done.text("initial-loss")
    assert "too large" in done.text("initial-loss")


def test_layers_without_a_gradient_on_two_processes(photos: Path, tmp_path: Path) -> None:
    """Where DDP itself would end the run in its next forward pass."""
    done = check(tmp_path, "--data", str(photos), *VIT, *SHORT, plant=in_model(detach_blocks), processes=2)
    assert (done.status, done.summary["steps"]) == (1, 1), done.said
    assert "layer0 (cls_token)" in done.text("no-gradient")


def close_head() -> None:
    from tuning import entering
    from tuning.depth import head_names

    everything = entering.open_names
    entering.open_names = lambda model, depth: everything(model, depth) - head_names(model)


def test_a_closed_head(photos: Path, tmp_path: Path) -> None:
    done = check(tmp_path, "--data", str(photos), *VIT, plant=close_head)
    assert (done.status, done.kinds, done.summary["steps"]) == (1, {"closed-head"}, 0), done.said
    assert "head.weight" in done.text("closed-head")


# Planted faults: in the learning rate


def test_a_learning_rate_that_is_too_small(photos: Path, tmp_path: Path) -> None:
    done = check(tmp_path, "--data", str(photos), *VIT, *SHORT, "--lr", "1e-6")
    assert (done.status, done.kinds) == (1, {"lr-too-small"}), done.said
    assert "(the head's is 1e-06)" in done.text("lr-too-small")


@pytest.mark.parametrize("optimizer", [("adamw", "3"), ("sgd", "1e30")])
def test_a_learning_rate_that_is_too_large(photos: Path, tmp_path: Path, optimizer: tuple[str, str]) -> None:
    flags = ("--optimizer", optimizer[0], "--lr", optimizer[1], "--clip-norm", "0")
    done = check(tmp_path, "--data", str(photos), *VIT, *SHORT, *flags)
    assert done.status == 1, done.said
    assert "exploding" in done.kinds, done.said


# Planted faults: in labels and pixels


def in_labels(change: Callable[[int], int]) -> Plant:
    def plant() -> None:
        from tuning.data.pictures import Pictures

        read = Pictures._read

        def spoilt(self: Pictures, *args: Any) -> Any:
            picture, label = read(self, *args)
            return picture, change(label)

        Pictures._read = spoilt  # type: ignore[method-assign]

    return plant


@pytest.mark.parametrize(
    ("change", "kind", "words", "processes"),
    [
        (lambda label: label + 1, "labels-out-of-range", "3 of ", 2),
        (lambda label: -100, "labels-out-of-range", "16 of 16 labels are outside 0 ... 2", 1),
        (lambda label: 1, "labels-equal", "all 16 labels are 1", 2),
    ],
)
def test_faults_in_the_labels(
    photos: Path, tmp_path: Path, change: Callable[[int], int], kind: str, words: str, processes: int
) -> None:
    done = check(tmp_path, "--data", str(photos), *VIT, plant=in_labels(change), processes=processes)
    assert (done.status, done.kinds, done.summary["steps"]) == (1, {kind}, 0), done.said
    assert words in done.text(kind)


@pytest.mark.parametrize(
    ("mean", "std"), [((123.7, 116.3, 103.5), (58.4, 57.1, 57.4)), ((0.0,) * 3, (1 / 255,) * 3)], ids=["255", "raw"]
)
def test_wrong_normalisation(photos: Path, tmp_path: Path, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    def plant() -> None:
        from tuning import preparing

        build = preparing.build

        def spoilt(*args: Any, **options: Any) -> Any:
            model, info = build(*args, **options)
            return model, replace(info, mean=mean, std=std)

        preparing.build = spoilt  # type: ignore[assignment]

    done = check(tmp_path, "--data", str(photos), *VIT, "--overfit-steps", "2", plant=plant)
    assert (done.status, "normalisation" in done.kinds) == (1, True), done.said


def test_pictures_that_are_all_the_same(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(12):
            noise(16, 16).save(tmp_path / "photos" / name / f"{number}.png")
    done = check(tmp_path, "--data", str(tmp_path / "photos"), *VIT)
    assert (done.status, done.kinds) == (1, {"inputs-equal", "contradictory-labels"}), done.said
    assert "below 0.693" in done.text("contradictory-labels")


@pytest.fixture
def own_photos(tmp_path: Path) -> Path:
    """16 training pictures, all of which make the batch, and 4 others."""
    write_classes(tmp_path / "photos" / "train", {"cat": 8, "dog": 8})
    write_classes(tmp_path / "photos" / "val", {"cat": 2, "dog": 2})
    return tmp_path / "photos"


def test_the_same_picture_under_two_labels(own_photos: Path, tmp_path: Path) -> None:
    for number in range(3):
        shutil.copy(own_photos / f"train/cat/00{number}.jpg", own_photos / f"train/dog/00{number}.jpg")
    done = check(tmp_path, "--data", str(own_photos), *VIT)
    assert (done.status, done.kinds) == (1, {"contradictory-labels"}), done.said
    text = done.text("contradictory-labels")
    assert "6 pictures have a twin" in text
    assert "cat/000.jpg (0) and" in text
    assert "dog/000.jpg (1)" in text


@pytest.mark.parametrize("processes", [1, 2])
def test_unreadable_pictures_are_named(own_photos: Path, tmp_path: Path, processes: int) -> None:
    broken = sorted((own_photos / "train").rglob("*.jpg"))[::4]
    for path in broken:
        path.write_bytes(b"no picture")
    done = check(tmp_path, "--data", str(own_photos), *VIT, "--overfit-steps", "2", processes=processes)
    assert (done.status, done.kinds) == (1, {"unreadable"}), done.said
    assert "4 of the 16 pictures can't be read" in done.text("unreadable")
    assert str(broken[0]) in done.text("unreadable")
    assert done.summary["unreadable"]["train"] == 4


def test_a_batch_of_unreadable_pictures_alone(own_photos: Path, tmp_path: Path) -> None:
    for path in (own_photos / "train").rglob("*.jpg"):
        path.write_bytes(b"")
    done = check(tmp_path, "--data", str(own_photos), *VIT)
    assert (done.status, done.kinds, done.summary["steps"]) == (1, {"unreadable"}, 0), done.said


# Replay, and what is refused


def test_a_replayed_step_takes_exactly_its_images(photos: Path, tmp_path: Path) -> None:
    """The file that the engine's own fault counter writes, not one made for this test."""
    from tuning.data.sources import open_data
    from tuning.safety.numerical_faults import NumericalFaults

    options = dict.fromkeys(("image_column", "label_column", "train_split", "eval_split", "limit_train", "limit_eval"))
    train = open_data(str(photos), val_fraction=0.25, seed=0, **options).train  # type: ignore[arg-type]
    faults = NumericalFaults(1, tmp_path / "faults", train, writes=True)
    rows = [30, 2, 17, 20, 5]
    step: Any = type("Step", (), {"step": 9, "rows": rows, "place": (1, 2), "lrs": {"layer7": 0.1}})()
    content = faults._described(step, 0) | {"loss": "nan", "grad_norm": "nan"}
    (tmp_path / "step.json").write_text(json.dumps(content))
    flags = ("--data", str(photos), *VIT, "--replay", str(tmp_path / "step.json"), "--lr", "1e-3")
    done = check(tmp_path, *flags, "--overfit-stage", "all", plant=spy_on_rows(tmp_path / "seen"))
    assert (done.status, done.summary["train_images"], done.summary["stage"]) == (0, 5, "all"), done.said
    names = set((tmp_path / "seen").read_text().splitlines())
    assert names == {train[row]["image"]["path"] for row in rows}
    content["images"][3] = "other.jpg"
    (tmp_path / "step.json").write_text(json.dumps(content))
    refused = check(tmp_path / "2", *flags)
    assert (refused.status, refused.summary) == (2, {})
    assert "names 'other.jpg' as row 20 of the training data" in refused.said


def test_the_step_that_ended_a_run_is_replayed(photos: Path, tmp_path: Path, finetune: Run) -> None:
    """As documented: with the run's config, its file and the weights of its last checkpoint."""
    flags = ("--batch-size", "8", "--freeze-epochs", "0", "--lr", "1e30", "--max-skipped", "1", "--save-every", "1")
    assert finetune("--data", str(photos), *VIT, *flags, "--output", "ended").returncode == 2
    ended = tmp_path / "ended"
    (step,) = (ended / "faults").iterdir()
    weights = max(ended.glob("checkpoints/step-*/model.safetensors"))
    asked = ("--config", str(ended / "config.yaml"), "--replay", str(step), "--weights", str(weights))
    done = check(tmp_path, *asked)
    assert (done.status, done.summary["verdict"], done.summary["train_images"]) == (1, "FAIL", 8), done.said
    assert done.kinds == {"not-finite"}


def spy_on_rows(log: Path) -> Plant:
    def plant() -> None:
        from tuning.data import pictures

        source = pictures._source

        def spied(row: dict[str, Any]) -> Any:
            with log.open("a") as file:
                file.write(f"{row['image']['path']}\n")
            return source(row)

        pictures._source = spied

    return plant


def test_what_is_refused(photos: Path, tmp_path: Path) -> None:
    for flags, words in (
        (("--resume", "auto"), "--resume auto: an overfit check has nothing to go on with"),
        (("--overfit-stage", "hed"), "'hed' is not a stage: 1 = head, 2 = all. Perhaps you meant 'head'"),
        (("--overfit-target", "0"), "--overfit-target is 0.0; give a loss above 0"),
        (("--overfit-steps", "0"), "--overfit-steps is 0; give a whole number from 1"),
        (("--replay", "nowhere.json"), "--replay nowhere.json can't be read: No such file"),
    ):
        done = check(tmp_path, "--data", str(photos), *VIT, *flags)
        assert (done.status, words in done.said) == (2, True), done.said
        assert not (tmp_path / "run").exists()


def test_a_dry_run_leaves_nothing(photos: Path, tmp_path: Path) -> None:
    done = check(tmp_path, "--data", str(photos), *VIT, "--dry-run")
    assert (done.status, (tmp_path / "run").exists()) == (0, False)
    assert "16 = 1 x 1 x 16" in done.said


@pytest.mark.slow
def test_a_real_process_ends_with_1_on_fail(photos: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "recipes" / "overfit.py"), "--data", str(photos), *VIT, "--lr", "1e-9"]
    command += ["--overfit-steps", "8", "--output", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "FAIL: 16 pictures, 8 steps" in done.stdout
    assert "lr-too-small: " in done.stdout
