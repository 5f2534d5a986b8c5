"""`recipes/evaluate.py` through its command line, on one and two processes, against scikit-learn and a plain loop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import sklearn.metrics as oracle
import timm
import torch
from PIL import Image
from ranks import run_ranks
from recipe_runs import Finished, import_after, recipe_here, run_forked
from timm.data import create_transform, resolve_data_config

CLASSES = ("blue", "green", "red")
PLOTS = {"confusion.png", "mistakes.png", "precision_recall.png"}
COLOURS = {"blue": (90, 90, 150), "green": (90, 150, 90), "red": (150, 90, 90)}
SMALL = ("--model", "test_efficientnet", "--weights", "none", "--image-size", "32", "--batch-size", "8")
QUICK = ("--freeze-epochs", "0", "--epochs", "2", "--lr", "3e-3", "--workers", "0", "--tracker", "none")


def write_colours(root: Path, counts: dict[str, int], seed: int) -> None:
    """Noisy pictures whose class is their tint: easy, but not without mistakes."""
    generator = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.clip(generator.normal(COLOURS[name], 60, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST).save(root / name / f"{number:02d}.png")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data with 23 evaluation pictures, and two finished runs on it: ``one`` with averaged weights, and ``two``."""
    import_after()
    home = tmp_path_factory.mktemp("home")
    write_colours(home / "photos/train", {"blue": 16, "green": 16, "red": 16}, 0)
    write_colours(home / "photos/val", {"blue": 9, "green": 8, "red": 6}, 1)
    for name, extra in (("one", ("--ema-decay", "0.9")), ("two", ("--seed", "1"))):
        done = run_forked(home, "--data", "photos", *SMALL, *QUICK, *extra, "--output", name)
        assert done.returncode == 0, done.stderr
    return home


def evaluate(home: Path, *flags: str, world_size: int = 1) -> Finished:
    """The answer of rank 0; all processes end alike."""
    answers = run_ranks(world_size, recipe_here, home, "evaluate", *flags)
    assert {answer.returncode for answer in answers} == {answers[0].returncode}
    return answers[0]


def judged(home: Path, output: Path, *flags: str, world_size: int = 1) -> dict[str, Any]:
    done = evaluate(home, *flags, "--output", str(output), world_size=world_size)
    assert done.returncode == 0, done.stderr
    return json.loads((output / "metrics.json").read_text())  # type: ignore[no-any-return]


def plain(home: Path, folder: str = "photos/val", model: str = "one/model") -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, labels and probabilities of a plain loop over timm's own model and transform."""
    net = timm.create_model(f"local-dir:{home / model}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config({}, model=net), is_training=False)
    files = sorted((home / folder).glob("*/*.png"))
    with torch.inference_mode():
        logits = torch.stack([net(transform(Image.open(f).convert("RGB"))[None])[0] for f in files])
    labels = np.array([CLASSES.index(f.parent.name) for f in files])
    return [f"{folder}/{f.parent.name}/{f.name}" for f in files], labels, logits.softmax(1).numpy()


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_run_on_its_own_data_equals_a_plain_loop(home: Path, tmp_path: Path, world_size: int) -> None:
    found = judged(home, tmp_path / "out", "--run", "one", "--micro-batch", "5", world_size=world_size)
    names, labels, p = plain(home)
    assert (found["world_size"], found["images"], found["unreadable"], found["own_data"]) == (world_size, 23, [], True)
    predicted = p.argmax(1)
    assert found["top1"] == pytest.approx(oracle.accuracy_score(labels, predicted))
    matrix = oracle.confusion_matrix(labels, predicted)
    pairs = found["confused_pairs"]
    told = {(CLASSES.index(pair["label"]), CLASSES.index(pair["predicted"])): pair["images"] for pair in pairs}
    assert told == {(a, b): matrix[a, b] for a in range(3) for b in range(3) if a != b and matrix[a, b]}
    assert told, "a model without mistakes proves nothing"
    assert {path.name for path in (tmp_path / "out/plots").iterdir()} == PLOTS
    assert found["balanced_accuracy"] == pytest.approx(oracle.balanced_accuracy_score(labels, predicted))
    assert found["macro_f1"] == pytest.approx(oracle.f1_score(labels, predicted, average="macro"))
    assert found["loss"] == pytest.approx(oracle.log_loss(labels, p), abs=1e-2)
    report = oracle.classification_report(labels, predicted, target_names=CLASSES, output_dict=True, zero_division=0)
    for name in CLASSES:
        for key, theirs in (("precision",) * 2, ("recall",) * 2, ("f1", "f1-score"), ("support",) * 2):
            assert found["per_class"][name][key] == pytest.approx(report[name][theirs]), (name, key)
    assert found["classes"] == list(CLASSES)
    assert 0 < found["top1"] < 1, "a test of metrics needs right and wrong answers"
    assert "top5" not in found
    for name, (low, high) in found["intervals"].items():
        assert low <= found[name] <= high or name == "ece", name
    assert found["bootstrap"] == {"level": 0.95, "resamples": 1000, "seed": 0, "method": "percentile"}
    assert found["images_per_second"] > 0

    table = pq.read_table(tmp_path / "out/predictions.parquet")
    rows = table.to_pylist()
    assert [row["id"] for row in rows] == names
    assert [row["label"] for row in rows] == [CLASSES[n] for n in labels]
    assert [row["predicted"] for row in rows] == [CLASSES[n] for n in predicted]
    np.testing.assert_allclose([row["probabilities"] for row in rows], p, atol=5e-3)
    assert json.loads(table.schema.metadata[b"classes"]) == list(CLASSES)
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["metrics.json", "plots", "predictions.parquet"]


def test_the_metrics_are_those_that_the_run_reported(home: Path, tmp_path: Path) -> None:
    best = json.loads((home / "one/summary.json").read_text())["best"]
    found = judged(home, tmp_path / "out", "--run", "one", "--bootstrap", "0")
    for name in ("top1", "balanced_accuracy", "loss", "images"):
        assert found[name] == pytest.approx(best[name], abs=1e-6), name
    assert "intervals" not in found


def test_a_checkpoint_says_which_weights_it_gave(home: Path, tmp_path: Path) -> None:
    last = sorted((home / "one/checkpoints").iterdir())[-1].relative_to(home)
    done = evaluate(home, "--run", str(last), "--output", str(tmp_path / "out"))
    assert f"the averaged weights (EMA) of {last}" in done.stdout
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    record = [json.loads(line) for line in (home / "one/metrics.jsonl").read_text().splitlines()]
    final = [one for one in record if "eval_ema/loss" in one][-1]
    assert found["loss"] == pytest.approx(final["eval_ema/loss"], abs=1e-6)


def test_other_data_in_another_order_and_with_fewer_classes(home: Path, tmp_path: Path) -> None:
    """All of its pictures, with the labels meant by their names, and the model's own three outputs."""
    write_colours(tmp_path / "few", {"red": 5, "green": 6}, 2)
    shutil.copytree(tmp_path / "few", home / "few")
    found = judged(home, tmp_path / "out", "--run", "one", "--data", "few", world_size=2)
    _, labels, p = plain(home, "few")
    assert (found["images"], found["own_data"], found["classes"]) == (11, False, list(CLASSES))
    assert found["top1"] == pytest.approx(oracle.accuracy_score(labels, p.argmax(1)))
    assert found["per_class"]["blue"]["support"] == 0
    assert found["loss"] == pytest.approx(oracle.log_loss(labels, p, labels=range(3)), abs=1e-2)


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_ensemble_beside_its_members_and_their_averaged_weights(home: Path, tmp_path: Path, world_size: int) -> None:
    flags = ("--run", "one", "--ensemble", "two", "--tta", "flip")
    found = judged(home, tmp_path / "out", *flags, world_size=world_size)
    assert list(found["members"]) == ["one", "two", "averaged weights"]
    labels, members = plain(home)[1], []
    for name in ("one", "two"):
        alone = judged(home, tmp_path / name, "--run", name, "--tta", "flip")
        assert found["members"][name]["loss"] == pytest.approx(alone["loss"], abs=1e-6)
        rows = pq.read_table(tmp_path / name / "predictions.parquet").column("probabilities").to_pylist()
        members.append(np.array(rows))
    mean = sum(members) / 2
    assert found["loss"] == pytest.approx(oracle.log_loss(labels, mean / mean.sum(1, keepdims=True)), abs=1e-5)
    rows = pq.read_table(tmp_path / "out/predictions.parquet").column("probabilities").to_pylist()
    np.testing.assert_allclose(rows, mean, atol=1e-5)


def test_averaged_weights_are_a_model_of_their_own(home: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    found = judged(home, tmp_path / "out", "--run", "one", "--ensemble", "two")
    shutil.copytree(home / "one/model", tmp_path / "mixed")
    states = [load_file(home / name / "model/model.safetensors") for name in ("one", "two")]
    mixed = {n: (v + states[1][n]) / 2 if v.is_floating_point() else v for n, v in states[0].items()}
    save_file(mixed, tmp_path / "mixed/model.safetensors")
    alone = judged(home, tmp_path / "alone", "--run", str(tmp_path / "mixed"), "--data", "photos")
    assert found["members"]["averaged weights"]["loss"] == pytest.approx(alone["loss"], abs=1e-6)


def test_calibration_is_stored_with_the_model_and_used_from_then_on(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "one", home / "cal")
    first = judged(home, tmp_path / "first", "--run", "cal", "--calibrate", world_size=2)
    stored = json.loads((home / "cal/model/config.json").read_text())["calibration"]
    assert stored["temperature"] == first["temperature"] != 1
    assert stored["fitted_on"] == first["temperature_fitted_on"] == "23 evaluation images of photos"
    assert first["loss_after_temperature"] < first["loss"]
    again = judged(home, tmp_path / "again", "--run", "cal")
    for key in ("temperature", "loss", "loss_after_temperature", "ece_after_temperature", "temperature_fitted_on"):
        assert again[key] == pytest.approx(first[key]), key
    _, labels, p = plain(home)
    warm = torch.from_numpy(p).log().div(first["temperature"]).softmax(1).numpy()
    rows = pq.read_table(tmp_path / "again/predictions.parquet").column("probabilities").to_pylist()
    np.testing.assert_allclose(rows, warm, atol=1e-2)
    assert again["loss_after_temperature"] == pytest.approx(oracle.log_loss(labels, warm), abs=2e-2)


def test_unreadable_pictures_are_left_out_and_named(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "photos/val", home / "damaged")
    (home / "damaged/blue/00.png").write_bytes(b"no picture")
    done = evaluate(home, "--run", "one", "--data", "damaged", "--output", str(tmp_path / "out"), world_size=2)
    assert (done.returncode, "damaged/blue/00.png" in done.stdout) == (0, True)
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    assert (found["images"], [one["id"] for one in found["unreadable"]]) == (22, ["damaged/blue/00.png"])
    assert len(pq.read_table(tmp_path / "out/predictions.parquet")) == 22


def test_a_weight_file_and_two_classes(home: Path, tmp_path: Path) -> None:
    write_colours(tmp_path / "pair", {"green": 7, "red": 6}, 3)
    model = timm.create_model("test_vit", num_classes=2, img_size=32)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    flags = ("--model", "test_vit", "--weights", str(tmp_path / "w.pth"), "--image-size", "32")
    found = judged(home, tmp_path / "out", *flags, "--data", str(tmp_path / "pair"))
    rows = pq.read_table(tmp_path / "out/predictions.parquet").to_pylist()
    labels, scores = [row["label"] == "red" for row in rows], [row["probabilities"][1] for row in rows]
    assert found["positive_class"] == "red"
    assert found["roc_auc"] == pytest.approx(oracle.roc_auc_score(labels, scores), abs=1e-6)
    assert found["average_precision"] == pytest.approx(oracle.average_precision_score(labels, scores), abs=1e-6)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--run", "nothing"), "--run nothing: there is no such folder"),
        (("--run", "photos"), "neither a run"),
        (("--run", "unfinished"), "is not finished"),
        (("--run", "empty-run"), "holds no model"),
        (("--run", "one", "--data", "zoo"), "classes that the model doesn't know: 'yak'"),
        (("--run", "one", "--output", "photos"), "--output photos exists and is not empty"),
        (("--run", "one", "--output", "photos/val/red/00.png"), "is a file"),
        (("--run", "one", "--data", "hollow"), "hollow"),
        (("--run", "one", "--data", "zoo", "--calibrate"), "leave --data out"),
        (("--run", "one", "--ensemble", "pair"), "only one of the two has 'azure', 'blue'"),
        (("--model", "test_vit", "--weights", "none", "--data", "photos"), "nothing to judge in random weights"),
        (("--model", "test_vit", "--weights", "one/model/model.safetensors", "--data", "photos"), "do not fit"),
    ],
)
def test_one_message_for_what_cannot_be_judged(home: Path, flags: tuple[str, ...], words: str) -> None:
    bad = home / "unfinished"
    if not bad.exists():
        shutil.copytree(home / "one", bad)
        (bad / "summary.json").write_text('{"status": "failed"}')
        shutil.copytree(home / "one", home / "empty-run", ignore=shutil.ignore_patterns("model"))
        shutil.copytree(home / "photos/val/red", home / "zoo/yak")
        shutil.copytree(home / "photos/val/red", home / "zoo/red")
        (home / "hollow").mkdir()
        shutil.copytree(home / "one/model", home / "pair")
        content = json.loads((home / "pair/config.json").read_text())
        (home / "pair/config.json").write_text(json.dumps(content | {"label_names": ["azure", "green", "red"]}))
    before = sorted(path.name for path in home.iterdir())
    done = evaluate(home, *flags)
    assert done.returncode == 2, done.stdout + done.stderr
    assert words in done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in home.iterdir()) == before
