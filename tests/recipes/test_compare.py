"""`recipes/compare.py`: groups by flags, mean and spread by hand, and what can't be compared is refused."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import compare as recipe
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from recipe_runs import Finished, Run

from tuning.cli.plain_command import run_plain
from tuning.comparison.runs import groups, matches, read_runs
from tuning.errors import UserError
from tuning.judging import kept_predictions
from tuning.safety import interrupts

ROOT = Path(__file__).parents[2]
LABELS = np.array([0] * 30 + [1] * 20 + [2] * 10)
CLASSES = ("ant", "bee", "[red]cat")


def make_run(
    folder: Path,
    seed: int = 0,
    right: float = 0.8,
    labels: np.ndarray = LABELS,
    ids: Sequence[str] | None = None,
    classes: tuple[str, ...] = CLASSES,
    sizes: Sequence[int] | None = None,
    **flags: Any,
) -> str:
    """What a finished run leaves of itself for a comparison."""
    folder.mkdir(parents=True)
    config = {"data": "photos", "lr": 0.001, "model": "test_vit", "tracker": "none", "max_steps": None, **flags}
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "seed": seed}))
    (folder / "summary.json").write_text(json.dumps({"status": "done"}))
    generator = np.random.default_rng([seed, int(1000 * right)])
    taken = np.where(generator.random(len(labels)) < right, labels, (labels + 1) % len(classes))
    probabilities = np.full((len(labels), len(classes)), 0.1, np.float32)
    probabilities[np.arange(len(labels)), taken] = 1 - 0.1 * (len(classes) - 1)
    names = pa.array(ids if ids is not None else [f"val/{n}.jpg" for n in range(len(labels))])
    rows = np.arange(len(labels))
    kept_predictions.write(folder / "predictions.parquet", names, rows, labels, probabilities, classes)
    if sizes is not None:
        table = {"split": ["eval"] * len(labels), "name": names, "bytes": pa.array(sizes, pa.int64())}
        pq.write_table(pa.table(table), folder / "data.parquet")
    return str(folder)


@pytest.fixture
def compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """``compare(*argv)`` runs the recipe in an empty folder, in this process."""
    numbers = [getattr(signal, name) for name in interrupts.NAMES if hasattr(signal, name)]
    handlers = [signal.getsignal(number) for number in numbers]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*argv: str) -> Finished:
        monkeypatch.setattr(sys, "argv", ["compare.py", *argv])
        with pytest.raises(SystemExit) as end:
            run_plain(recipe.compare, recipe.Asked, "recipes/compare.py")
        return Finished(end.value.code, *capsys.readouterr())

    yield run
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_stopped_it_ends_as_the_other_recipes_do(compare: Run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def stopped(_: Sequence[str]) -> None:
        signal.raise_signal(getattr(signal, name))

    monkeypatch.setattr("tuning.comparison.runs.read_runs", stopped)
    done = compare("a", "b")
    assert (done.returncode, done.stderr) == (75, f"stopped on {name}; Start it again.\n")


def test_as_a_command_it_needs_no_torch(tmp_path: Path) -> None:
    names = [make_run(tmp_path / "a"), make_run(tmp_path / "b", lr=1.0)]
    command = [sys.executable, "-X", "importtime", str(ROOT / "recipes/compare.py"), *names, "--output", "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "McNemar p" in done.stdout
    assert (tmp_path / "out/comparison.png").exists()
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "matplotlib" in imported
    assert imported.isdisjoint({"torch", "timm", "accelerate", "datasets", "wandb"})


def test_groups_spread_and_tests_of_the_same_seeds(tmp_path: Path, compare: Run) -> None:
    first = [make_run(tmp_path / f"a{seed}", seed, 0.6, tracker="wandb" if seed else "none") for seed in range(3)]
    second = [make_run(tmp_path / f"b{seed}", seed, 0.9, lr=0.1, drop_rate="[b]") for seed in (2, 0)]
    done = compare(first[0], second[0], *first[1:], second[1], "--output", "out")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    told = json.loads((tmp_path / "out/comparison.json").read_text())
    one, other = told["groups"]
    assert [run["seed"] for run in one["runs"]] == [0, 1, 2], "the tracker makes no other group"
    assert [run["seed"] for run in other["runs"]] == [2, 0]
    assert one["flags"] == "drop-rate None, lr 0.001"
    for group, names in ((one, first), (other, second)):
        top1 = []
        for name in names:
            kept = kept_predictions.read(Path(name) / "predictions.parquet")
            top1.append(float((kept.predicted == kept.labels).mean()))
        assert group["mean"]["top1"] == pytest.approx(statistics.fmean(top1), abs=1e-6)
        assert group["std"]["top1"] == pytest.approx(statistics.stdev(top1), abs=1e-6)
    assert [(Path(t["first"]).name, Path(t["second"]).name) for t in told["paired"]] == [("a0", "b0"), ("a2", "b2")]
    assert all(t["top1"] > 0 and t["p"] < 0.05 for t in told["paired"])
    with Image.open(tmp_path / "out/comparison.png") as picture:
        assert min(picture.size) > 200
    for part in (
        f"{one['mean']['top1']:.4f} ± {one['std']['top1']:.4f}",
        "drop-rate '[b]', lr 0.1",
        "B - A over 2 seeds",
    ):
        assert part in done.stdout, part
    again = compare(*first, "--output", "out")
    assert again.returncode == 2
    assert "out exists and is not empty" in again.stderr


def test_metrics_are_those_of_the_predictions(tmp_path: Path) -> None:
    runs = read_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", right=1.0)])
    assert runs[1].metrics == pytest.approx({"balanced_accuracy": 1, "top1": 1, "loss": -np.log(0.8)})
    wrong = 1 - runs[0].metrics["top1"]
    assert runs[0].metrics["loss"] == pytest.approx(-(1 - wrong) * np.log(0.8) - wrong * np.log(0.1), abs=1e-6)


def test_repetitions_alone_have_nothing_to_test(tmp_path: Path, compare: Run) -> None:
    """Their evaluation images may differ: the seed draws the split."""
    other = [f"val/{n}.jpg" for n in range(5, 65)]
    names = [make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1, ids=other)]
    done = compare(*names)
    assert done.returncode == 0, done.stderr
    assert "nothing to test" in done.stdout
    assert "judged on different images" in done.stdout
    (made,) = (tmp_path / "runs").glob("*-comparison/comparison.json")
    assert json.loads(made.read_text())["paired"] == []


def test_without_a_common_seed_the_first_of_each_are_paired(tmp_path: Path) -> None:
    names = [make_run(tmp_path / "a", 3), make_run(tmp_path / "a4", 4), make_run(tmp_path / "b", 7, lr=1.0)]
    (match,) = matches(groups(read_runs(names)))
    assert (match.first.seed, match.second.seed) == (3, 7)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"ids": [f"val/{n}.jpg" for n in range(2, 62)]}, "2 of the 60 images"),
        ({"ids": [f"val/{n}.jpg" for n in reversed(range(60))]}, "another order"),
        ({"labels": np.roll(LABELS, 1)}, "3 images have another label"),
        ({"classes": ("ant", "bee", "cow")}, "other classes (["),
        ({"classes": ("bee", "ant", "[red]cat")}, "another order"),
        ({"sizes": [100] * 59 + [7]}, "1 images have another size in bytes (val/59.jpg)"),
    ],
    ids=["ids", "order", "labels", "classes", "map", "bytes"],
)
def test_different_images_are_refused_with_the_reason(tmp_path: Path, other: dict[str, Any], reason: str) -> None:
    names = [make_run(tmp_path / "a", sizes=[100] * 60), make_run(tmp_path / "b", lr=1.0, **other)]
    with pytest.raises(UserError, match="can't be compared image by image") as refused:
        matches(groups(read_runs(names)))
    assert reason in str(refused.value)


def spoil(folder: Path, what: str) -> None:
    match what:
        case "config":
            (folder / "config.yaml").unlink()
        case "running":
            (folder / "summary.json").unlink()
        case "failed":
            (folder / "summary.json").write_text('{"status": "failed"}')
        case "odd summary":
            (folder / "summary.json").write_text("[1]")
        case "predictions":
            (folder / "predictions.parquet").unlink()
        case "torn":
            (folder / "predictions.parquet").write_bytes(b"PAR1 nothing")


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("config", "is no run: it has no config.yaml"),
        ("running", "is not finished"),
        ("failed", "status in summary.json: failed"),
        ("odd summary", "is not finished"),
        ("predictions", "--resume auto makes it"),
        ("torn", "can't be read as predictions"),
    ],
)
def test_what_is_no_finished_run_is_refused(tmp_path: Path, what: str, reason: str) -> None:
    names = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    spoil(tmp_path / "b", what)
    with pytest.raises(UserError, match="b") as refused:
        read_runs(names)
    assert reason in str(refused.value)


def test_the_command_line(tmp_path: Path, compare: Run) -> None:
    name = make_run(tmp_path / "a")
    for argv, reason in (
        ((name,), "two or more runs, got 1"),
        ((name, name + "/../a"), "named twice"),
        ((name, str(tmp_path / "none")), "is no run"),
        ((name, name, "--lr", "1"), "--lr"),
    ):
        done = compare(*argv)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
        assert reason in done.stderr
    assert not (tmp_path / "runs").exists()
