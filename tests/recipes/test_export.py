"""`recipes/export.py`: bundles that work without this project, checked against it; refusals that leave nothing."""

from __future__ import annotations

import csv
import io
import json
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from pictures import encode, noise
from PIL import Image
from ranks import run_ranks
from recipe_runs import run_forked

from tuning.data.images import decode
from tuning.data.transforms import Crop, Normalise
from tuning.exporting import formats
from tuning.judging.finished import Finished, open_finished

ROOT = Path(__file__).parents[2]
KINDS = ("onnx", "exported-program", "timm")
FILES = {"README.md", "comparison.json", "curves.png", "example.py", "latency.json", "preprocessing.json"}
FILES |= {"preprocessing.py"}
# The example reads pictures with Pillow, whose resize rounds differently: measured up to 2e-4 on this model.
PROBABILITY_TOLERANCE = 2e-3
QUICK = ("--threads", "1", "--latency-repeats", "0")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, coloured: Path) -> Path:
    """A finished run of three colours, with a stored temperature."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ("--data", str(coloured), "--model", "test_vit", "--weights", "none", "--image-size", "32")
    flags += ("--batch-size", "12", "--freeze-epochs", "0", "--epochs", "3", "--lr", "1e-3", "--workers", "0")
    done = run_forked(folder, *flags, "--tracker", "wandb", "--output", "run")
    assert done.returncode == 0, done.stderr
    config = folder / "run" / "model" / "config.json"
    content = json.loads(config.read_text())
    content["calibration"] = {"temperature": 0.5, "fitted_on": "12 evaluation images of coloured"}
    config.write_text(json.dumps(content))
    for module in (
        "judging.judged_data",
        "exporting.publishing",
        "exporting.comparison",
        "exporting.report",
        "tracking.weights_and_biases",
    ):
        import_module(f"tuning.{module}")
    for module in ("torch.onnx", "onnxscript", "tuning.judging.prediction_files", "tuning.judging.top_classes"):
        import_module(module)
    return folder / "run"


def run_main(argv: tuple[str, ...], folder: str, recipe: str = "export.py") -> tuple[int, str, str]:
    """The recipe as ``__main__`` in *folder*: (exit status, stdout, stderr)."""
    os.chdir(folder)
    sys.argv = [str(ROOT / "recipes" / recipe), *argv]
    said, complained = io.StringIO(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(complained), pytest.raises(SystemExit) as ended:
        runpy.run_path(sys.argv[0], run_name="__main__")
    code = ended.value.code
    return code if isinstance(code, int) else int(code is not None), said.getvalue(), complained.getvalue()


def export(folder: Path, *flags: str) -> tuple[int, str, str]:
    """The answer of the recipe in a forked process."""
    answer: tuple[int, str, str] = run_ranks(1, run_main, flags, str(folder))[0]
    return answer


@pytest.fixture(scope="module")
def bundles(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An export in every format."""
    found = {}
    for kind in KINDS:
        flags = ("--format", kind, "--threads", "1", "--latency-repeats", "3")
        status, said, complained = export(run.parent, "--run", "run", *flags)
        assert (status, complained) == (0, ""), said
        assert "largest logit difference" in said
        assert f"torch / {kind}" in said
        found[kind] = run / "export" / kind
    return found


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Real files of several sizes and modes, all colours among them."""
    folder = tmp_path_factory.mktemp("pictures")
    generator, found = np.random.default_rng(5), []
    for number, colour in enumerate([(60, 60, 200), (60, 200, 60), (200, 60, 60)] * 3):
        height, width = (int(side) for side in generator.integers(34, 300, 2))
        pixels = np.clip(generator.normal(colour, 40, (height // 4 + 1, width // 4 + 1, 3)), 0, 255).astype(np.uint8)
        picture = Image.fromarray(pixels).resize((width, height))
        kind = ("JPEG", "PNG", "RGBA", "P", "turned")[number % 5]
        path = folder / f"{number} {kind}.{'jpg' if kind in ('JPEG', 'turned') else 'png'}"
        if kind == "turned":
            exif = Image.Exif()
            exif[0x112] = 8
            picture.save(path, exif=exif)
        else:
            (picture if kind in ("JPEG", "PNG") else picture.convert(kind)).save(path)
        found.append(path)
    grey = folder / "grey16.png"
    grey.write_bytes(encode(Image.fromarray(np.asarray(noise(90, 60).convert("L")).astype(np.uint16) * 257)))
    return [*found, grey]


def own_answers(found: Finished, pictures: list[Path]) -> list[tuple[str, float]]:
    """Class and calibrated probability by the project's own path."""
    crop, normalise = Crop(found.info.input_size, found.info.interpolation, found.info.crop_pct), Normalise
    images = torch.stack([crop.center(decode(str(path), min_side=found.info.input_size)) for path in pictures])
    with torch.no_grad():
        logits = found.model(normalise(found.info.mean, found.info.std)(images)).double() / found.temperature
    best = logits.softmax(1).max(1)
    return [(found.classes[k], p) for k, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


WITHOUT = {
    "onnx": ("torch", "timm", "torchvision", "tuning", "onnx", "simplejpeg"),
    "exported-program": ("timm", "torchvision", "tuning", "simplejpeg"),
    "timm": ("tuning", "simplejpeg", "accelerate", "datasets"),
}


@pytest.mark.parametrize("kind", ["onnx", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != "onnx")])
def test_the_example_answers_like_the_project_and_without_it(
    kind: str, bundles: dict[str, Path], run: Path, pictures: list[Path], tmp_path: Path
) -> None:
    found = open_finished(str(run))
    assert found.temperature == 0.5
    example = bundles[kind] / "example.py"
    lines = [
        f"import runpy, sys; sys.modules.update(dict.fromkeys({WITHOUT[kind]!r}))",  # importing these fails
        f"sys.path.insert(0, {str(example.parent)!r}); sys.argv[0] = {str(example)!r}",
        "runpy.run_path(sys.argv[0], run_name='__main__')",
    ]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", "\n".join(lines), *map(str, pictures)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    said = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[0] for line in said] == [str(path) for path in pictures]
    wanted = own_answers(found, pictures)
    assert {name for name, _ in wanted} == {"blue", "green", "red"}
    assert [line[1] for line in said] == [name for name, _ in wanted]
    assert [float(line[2]) for line in said] == pytest.approx([p for _, p in wanted], abs=PROBABILITY_TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_in_a_bundle(kind: str, bundles: dict[str, Path], run: Path) -> None:
    folder = bundles[kind]
    assert {path.name for path in folder.iterdir()} == FILES | {formats.FILES[kind]} | (
        {"config.json"} if kind == "timm" else set()
    )
    assert [path.name for path in sorted(folder.parent.iterdir())] == sorted(KINDS)
    compared = json.loads((folder / "comparison.json").read_text())
    assert (compared["format"], compared["accepted"], compared["images"]) == (kind, True, 12)
    assert 0 <= compared["largest_logit_difference"] < 1e-4
    assert compared["original_top1"] == compared["export_top1"] == compared["pillow_top1"]
    latency = json.loads((folder / "latency.json").read_text())
    assert [row["batch"] for row in latency["rows"]] == [1, 8, 32]
    assert latency["threads"] == 1
    assert all(row["torch"] > 0 and row[kind] > 0 for row in latency["rows"])
    settings = json.loads((folder / "preprocessing.json").read_text())
    assert (settings["temperature"], settings["classes"]) == (0.5, ["blue", "green", "red"])
    assert settings["input"]["dtype"] == ("float32" if kind == "timm" else "uint8")
    found = ModelCard.load(folder / "README.md")
    assert found.data.license == "unknown"
    summary = json.loads((run / "summary.json").read_text())
    assert {r.metric_type: r.metric_value for r in found.data.eval_results}["accuracy"] == pytest.approx(
        summary["best"]["top1"], abs=1e-6
    )
    assert f"Format `{kind}`" in found.text


@pytest.mark.parametrize("where", ["run", "export"])
def test_timm_loads_the_folder_anywhere(where: str, bundles: dict[str, Path], run: Path, pictures: list[Path]) -> None:
    """timm's own transform and model, as somebody without this project would use them."""
    folder = run / "model" if where == "run" else bundles["timm"]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    names = json.loads((folder / "config.json").read_text())["label_names"]
    found = open_finished(str(run))
    plain = [path for path in pictures if "turned" not in path.name and "grey16" not in path.name]
    with torch.no_grad():
        logits = model(torch.stack([transform(Image.open(path).convert("RGB")) for path in plain]))
    best = (logits / found.temperature).softmax(1).max(1)
    wanted = own_answers(found, plain)
    assert [names[k] for k in best.indices.tolist()] == [name for name, _ in wanted]
    assert best.values.tolist() == pytest.approx([p for _, p in wanted], abs=PROBABILITY_TOLERANCE)


def test_the_run_s_own_model_has_a_card(run: Path) -> None:
    found = ModelCard.load(run / "model" / "README.md")
    assert "test\\_vit, weights: none" in found.text
    assert "hardware: CPU" in found.text
    assert (run / "model" / "curves.png").is_file()


def test_predict_says_the_same(run: Path, bundles: dict[str, Path], pictures: list[Path], tmp_path: Path) -> None:
    paths = [str(path) for path in pictures]
    flags = ("--run", str(run), "--threads", "1", "--workers", "0", "--output", "p.csv", "--images", *paths)
    status, said, complained = run_ranks(1, run_main, flags, str(tmp_path), "predict.py")[0]
    assert status == 0, said + complained
    with (tmp_path / "p.csv").open(encoding="utf-8", newline="") as file:
        predicted = {row["id"]: (row["predicted"], float(row["probability"])) for row in csv.DictReader(file)}
    example = [sys.executable, str(bundles["onnx"] / "example.py"), *paths]
    answered = subprocess.run(example, capture_output=True, text=True, timeout=240, check=True).stdout.splitlines()
    assert len(answered) == len(paths)
    for line in answered:
        path, name, probability = line.split("\t")
        assert predicted[path] == (name, pytest.approx(float(probability), abs=PROBABILITY_TOLERANCE))


def test_a_dry_run_lists_and_leaves_nothing(run: Path, bundles: dict[str, Path]) -> None:
    before = sorted(run.rglob("*"))
    flags = ("--run", "run", "--output", "dry", "--push", "me/cells", "--push-wandb", "--dry-run", *QUICK)
    status, said, complained = export(run.parent, *flags, "--format", "timm", "--license", "mit")
    assert (status, complained) == (0, "")
    assert "Dry run: nothing was kept or uploaded" in said
    lists = said.partition("It would be:")[2]
    own = next(path.name for path in (run / "wandb").glob("offline-run-*")).rpartition("-")[2]
    assert "Hugging Face hub, me/cells (private if new): 8 files" in lists
    assert f"W&B artifact run-timm of run {own}, project fine-tuning: 8 files" in lists
    names = {path.name for path in bundles["timm"].iterdir()} - {"latency.json"}
    assert all(lists.count(f"  {name} ") == 3 for name in names), lists
    assert not (run.parent / "dry").exists()
    assert sorted(run.rglob("*")) == before


def test_an_export_beyond_the_tolerance_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = formats.load

    def spoiled(*arguments: Any) -> Any:
        network = load(*arguments)
        return lambda inputs: network(inputs) + torch.tensor([0.0, 0.0, 0.25])

    monkeypatch.setattr(formats, "load", spoiled)
    flags = ("--run", "run", "--output", "out/of/tolerance", "--format", "timm", *QUICK)
    status, _, complained = export(run.parent, *flags)
    assert status == 1
    assert complained.startswith("refused: the export differs from the original by 0.25 in a logit, --tolerance is")
    assert len(complained.splitlines()) == 1
    assert not list(run.parent.glob("*out*"))
    assert export(run.parent, *flags, "--tolerance", "0.3", "--dry-run")[0] == 0


def test_the_metrics_of_evaluate_come_onto_the_card(run: Path, tmp_path: Path) -> None:
    judged = {"top1": 0.875, "images": 12, "classes": ["blue", "green", "red"], "intervals": {"top1": [0.8, 0.9]}}
    (tmp_path / "metrics.json").write_text(json.dumps(judged))
    flags = ("--run", str(run), "--output", "out", "--format", "timm", "--metrics", str(tmp_path), *QUICK)
    assert export(tmp_path, *flags)[0] == 0
    assert "| 0.8750 | 0.8000 to 0.9000 |" in (tmp_path / "out" / "README.md").read_text()


def test_a_checkpoint_has_no_metrics_of_the_best(run: Path) -> None:
    checkpoint = sorted((run / "checkpoints").iterdir())[0]
    status, said, complained = export(run.parent, "--run", str(checkpoint), "--format", "timm", *QUICK)
    assert (status, complained) == (0, ""), said
    folder = run / "export" / f"{checkpoint.name}-timm"
    assert "No evaluation is known" in (folder / "README.md").read_text()
    assert json.loads((folder / "preprocessing.json").read_text())["temperature"] == 1.0
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def test_two_processes_make_one_export(run: Path, tmp_path: Path) -> None:
    flags = ("--run", str(run), "--output", "out", "--format", "timm", *QUICK)
    answers = run_ranks(2, run_main, flags, str(tmp_path))
    assert [(status, complained) for status, _, complained in answers] == [(0, "")] * 2
    assert (answers[0][1] == "", answers[1][1]) == (False, "")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


BAD: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
    ("no run", (), ("--run is missing",)),
    ("no such run", ("--run", "nowhere"), ("nowhere", "no such folder")),
    ("empty folder", ("--run", "empty"), ("empty is neither a run",)),
    ("run without a model", ("--run", "bare"), ("bare holds no model",)),
    ("unknown format", ("--run", "run", "--format", "tflite"), ("--format", "tflite")),
    ("output exists", ("--run", "run", "--output", "full"), ("full exists and is not empty",)),
    ("output is a file", ("--run", "run", "--output", "full/kept"), ("full/kept is a file",)),
    ("other classes", ("--run", "run", "--data", "other", "--output", "out"), ("doesn't know: 'cat'",)),
    ("no data", ("--run", "run", "--data", "gone", "--output", "out"), ("gone",)),
    ("uint8 timm", ("--run", "run", "--format", "timm", "--export-input", "uint8"), ("--export-input uint8",)),
    ("no repository", ("--run", "run", "--output", "out", "--push", "cells"), ("'cells'", "OWNER/NAME")),
    ("no network", ("--run", "run", "--output", "out", "--push", "me/cells"), ("--push", "hub")),
    ("W&B offline", ("--run", "run", "--output", "out", "--push-wandb"), ("--push-wandb", "wandb login")),
    ("no W&B run", ("--run", "untracked", "--output", "out", "--push-wandb"), ("has no W&B run",)),
    ("foreign metrics", ("--run", "run", "--output", "out", "--metrics", "full"), ("--metrics full", "no metrics")),
    ("tolerance 0", ("--run", "run", "--tolerance", "0"), ("--tolerance is 0.0", "above 0")),
    ("training flag", ("--run", "run", "--lr", "0.1"), ("--lr 0.1 has no effect",)),
]


@pytest.mark.parametrize(("flags", "words"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input_is_one_message(run: Path, flags: tuple[str, ...], words: tuple[str, ...]) -> None:
    folder = run.parent
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "bare").mkdir(exist_ok=True)
    (folder / "bare" / "config.yaml").write_text("data: photos\n")
    (folder / "full").mkdir(exist_ok=True)
    (folder / "full" / "kept").touch()
    if not (folder / "untracked").exists():
        (folder / "untracked").mkdir()
        for name in ("config.yaml", "summary.json", "model"):
            (folder / "untracked" / name).symlink_to(run / name)
        for name in ("cat", "dog"):
            (folder / "other" / name).mkdir(parents=True)
            for number in range(4):
                noise(40, 40, number).save(folder / "other" / name / f"{number}.png")
    before = sorted(folder.rglob("*"))
    status, said, complained = export(folder, *flags, *QUICK)
    assert status == 2, said
    assert "Traceback" not in complained
    assert all(word in complained for word in words), complained
    assert sorted(folder.rglob("*")) == before


def test_a_missing_package_names_the_extra(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    status, _, complained = export(run.parent, "--run", "run", "--output", "out", *QUICK)
    assert status == 2
    assert "pip install 'fine-tuning[onnx]'" in complained
    assert not (run.parent / "out").exists()
