"""`recipes/predict.py` through its command line: every picture a row, whatever it is, on one and two processes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from pictures import noise
from PIL import Image
from ranks import run_ranks
from recipe_runs import Finished, import_after, recipe_here
from timm.data import create_transform, resolve_data_config

from tuning.judging.calibration import store
from tuning.models import packaged_weights
from tuning.models.build import build, save_timm_folder

CLASSES = ("cat", "dog", "emu")
COUNT, BROKEN = 35, ("in/00.png", "in/17.png", "in/34.png")  # with two processes the filler is broken, too
TEMPERATURE = 0.1  # far from 1: the probabilities of random weights lie near one another


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a stored temperature, and 35 pictures, three of them damaged."""
    import_after()
    home = tmp_path_factory.mktemp("home")
    model, info = build("test_efficientnet", classes=CLASSES, weights="none", image_size=32, crop_pct=0.9)
    torch.nn.init.normal_(model.classifier.weight, generator=torch.Generator().manual_seed(0))
    save_timm_folder(model, info, CLASSES, home / "run/model")
    store(home / "run/model", {"temperature": TEMPERATURE})
    (home / "run/config.yaml").write_text("data: photos\n")
    (home / "run/summary.json").write_text('{"status": "done"}')
    for folder in ("in", "empty", "unfinished/model"):
        (home / folder).mkdir(parents=True)
    for number in range(COUNT):
        noise(48, 40, number).save(home / f"in/{number:02d}.png")
    for name in BROKEN:
        (home / name).write_bytes(b"" if name == BROKEN[0] else b"no picture")
    (home / "in/notes.txt").touch()
    (home / "unfinished/config.yaml").write_text("data: photos\n")
    (home / "unfinished/model/config.json").write_text("{}")
    return home


def predict(home: Path, *flags: str, world_size: int = 1) -> Finished:
    """The answer of rank 0; all processes end alike."""
    answers = run_ranks(world_size, recipe_here, home, "predict", *flags)
    assert {answer.returncode for answer in answers} == {answers[0].returncode}
    return answers[0]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of any kind of file, numbers as numbers."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()  # type: ignore[no-any-return]
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with path.open(encoding="utf-8", newline="") as file:
        rows = [{key: value or None for key, value in row.items()} for row in csv.DictReader(file)]
    return [{k: float(v) if v and k.startswith("probability") else v for k, v in row.items()} for row in rows]


def by_timm(home: Path, files: list[str]) -> np.ndarray:
    """Probabilities of a plain loop over timm's own model and transform."""
    model = timm.create_model(f"local-dir:{home / 'run/model'}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config({}, model=model), is_training=False)
    with torch.inference_mode():
        logits = torch.stack([model(transform(Image.open(home / f).convert("RGB"))[None])[0] for f in files])
    return (logits / TEMPERATURE).softmax(1).numpy()


@pytest.mark.parametrize(("kind", "world_size"), [("csv", 1), ("csv", 2), ("jsonl", 2), ("parquet", 1), ("parquet", 2)])
def test_the_same_as_timm_in_the_order_of_the_inputs(home: Path, tmp_path: Path, kind: str, world_size: int) -> None:
    path = tmp_path / f"out.{kind}"
    flags = ("--images", "in", "--top-k", "2", "--micro-batch", "1", "--output", str(path))
    done = predict(home, "--run", "run", *flags, world_size=world_size)
    assert done.returncode == 0, done.stderr
    rows, files = rows_of(path), [f"in/{number:02d}.png" for number in range(COUNT)]
    assert [row["id"] for row in rows] == files
    sound = [name for name in files if name not in BROKEN]
    p = by_timm(home, sound)
    assert len({*p.argmax(1)}) > 1, "a test of predictions needs different ones"
    for name, expected in zip(sound, p, strict=True):
        row, order = rows[files.index(name)], np.argsort(-expected)
        assert [row["predicted"], row["predicted_2"]] == [CLASSES[number] for number in order[:2]]
        assert [row["probability"], row["probability_2"]] == pytest.approx(expected[order[:2]], abs=0.02)
        assert row["error"] is None
    for name in BROKEN:
        row = rows[files.index(name)]
        assert (row["predicted"], row["probability"], row["probability_2"]) == (None, None, None)
        assert row["error"] == ("it is empty" if name == BROKEN[0] else row["error"])
        assert done.stdout.count(f"{name}: {row['error']}") == 1
    assert "could not be read: 3" in done.stdout
    assert "after the stored temperature 0.100" in done.stdout
    assert "notes.txt" in done.stdout
    if kind == "parquet":
        groups = pq.ParquetFile(path).metadata
        sizes = [groups.row_group(number).num_rows for number in range(groups.num_row_groups)]
        assert sizes == ([32, 3] if world_size == 1 else [35])
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_one_and_two_processes_write_the_same(home: Path, tmp_path: Path) -> None:
    for world_size in (1, 2):
        output = ("--output", str(tmp_path / f"{world_size}.csv"))
        images = ("--images", "in/**/*.png", "in/03.png")
        assert predict(home, "--run", "run", *images, *output, world_size=world_size).returncode == 0
    one, two = (rows_of(tmp_path / f"{world_size}.csv") for world_size in (1, 2))
    assert len(one) == COUNT + 1
    assert one[-1] == one[3]
    for mine, other in zip(one, two, strict=True):
        assert (mine["id"], mine["predicted"], mine["error"]) == (other["id"], other["predicted"], other["error"])
        assert mine["probability"] == pytest.approx(other["probability"], abs=1e-5)


def test_pictures_of_every_mode_are_seen_as_in_training(home: Path, tmp_path: Path) -> None:
    """Each beside what it means, converted by hand to RGB."""
    colour, grey = noise(40, 40, 1), noise(40, 40, 2).convert("L")
    veil = Image.fromarray(np.tile(np.linspace(0, 255, 40).astype(np.uint8), (40, 1)))
    white = Image.new("RGB", (40, 40), "white")
    palette = colour.convert("P")
    deep = Image.fromarray((np.asarray(grey).astype(np.uint16)) * 257)
    cmyk = tmp_path / "cmyk.jpg"
    colour.convert("CMYK").save(cmyk, quality=100)
    pairs = {
        "L": (grey, grey.convert("RGB")),
        "LA": (Image.merge("LA", (grey, veil)), Image.composite(grey.convert("RGB"), white, veil)),
        "P": (palette, palette.convert("RGB")),
        "RGBA": (Image.merge("RGBA", (*colour.split(), veil)), Image.composite(colour, white, veil)),
        "I16": (deep, grey.convert("RGB")),
        "CMYK": (None, Image.open(cmyk).convert("RGB")),
    }
    for name, (picture, meant) in pairs.items():
        if picture is None:
            cmyk.rename(tmp_path / f"{name}-is.jpg")
        else:
            picture.save(tmp_path / f"{name}-is.png")
        meant.save(tmp_path / f"{name}-means.png")
    done = predict(home, "--run", "run", "--images", str(tmp_path), "--top-k", "3", "--output", str(tmp_path / "o.csv"))
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "o.csv")
    assert len(rows) == 2 * len(pairs)
    for one, meant in zip(rows[::2], rows[1::2], strict=True):
        assert one["error"] is None
        probabilities = [{r[f"predicted{n}"]: r[f"probability{n}"] for n in ("", "_2", "_3")} for r in (one, meant)]
        assert probabilities[0] == pytest.approx(probabilities[1], abs=0.02), one["id"]


def test_pictures_that_can_all_not_be_read_are_no_failure(home: Path, tmp_path: Path) -> None:
    done = predict(home, "--run", "run", "--images", *BROKEN, "--output", str(tmp_path / "o.jsonl"), world_size=2)
    assert done.returncode == 0, done.stderr
    assert all(row["error"] and row["predicted"] is None for row in rows_of(tmp_path / "o.jsonl"))


def test_fewer_pictures_than_processes(home: Path, tmp_path: Path) -> None:
    done = predict(
        home, "--run", "run/model", "--images", "in/05.png", "--output", str(tmp_path / "o.csv"), world_size=2
    )
    assert done.returncode == 0, done.stderr
    assert [row["id"] for row in rows_of(tmp_path / "o.csv")] == ["in/05.png"]


@pytest.mark.skipif(packaged_weights.find("tf_efficientnet_lite0") is None, reason="needs the extra demo")
def test_a_pretrained_model_names_imagenet_classes(home: Path, tmp_path: Path) -> None:
    flags = ("--model", "tf_efficientnet_lite0", "--image-size", "64", "--images", "in/05.png")
    done = predict(home, *flags, "--output", str(tmp_path / "o.csv"))
    assert done.returncode == 0, done.stderr
    assert rows_of(tmp_path / "o.csv")[0]["predicted"].startswith("n0")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "Give the pictures: --images"),
        (("--images", "empty"), "--images empty: the folder holds no pictures"),
        (("--images", "in/*.gif"), "no file matches this glob"),
        (("--images", "inn"), "no such file or folder. Perhaps you meant 'in'"),
        (("--images", "in", "--output", "in/01.png"), "must end in .csv, .jsonl, .parquet"),
        (("--images", "in", "--output", "there.csv"), "--output there.csv exists"),
        (("--images", "in", "--output", "gone/out.csv"), "does not exist. Make it"),
        (("--images", "in", "--top-k", "4"), "--top-k 4: the model has 3 classes"),
        (("--images", "in", "--run", "unfinished"), "is not finished"),
        (("--images", "in", "--run", "empty"), "neither a run"),
        (("--images", "in", "--lr", "1"), "--lr 1.0 has no effect in recipes/predict.py"),
    ],
)
def test_one_message_for_what_cannot_be_done(home: Path, flags: tuple[str, ...], words: str) -> None:
    (home / "there.csv").touch()
    before = sorted(home.rglob("*"))
    done = predict(home, *(() if "--run" in flags else ("--run", "run")), *flags)
    assert done.returncode == 2, done.stdout + done.stderr
    assert words in done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert sorted(home.rglob("*")) == before


def test_a_model_without_names_of_its_classes_is_refused(home: Path) -> None:
    torch.save(build("test_vit", classes=3, weights="none")[0].state_dict(), home / "w.pth")
    done = predict(home, "--model", "test_vit", "--weights", "w.pth", "--images", "in")
    assert done.returncode == 2
    assert "the names of its classes are not known" in done.stderr
