"""`recipes/check.py`: planted faults are found and end it with 1, clean data passes, nothing else is written."""

from __future__ import annotations

import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Image
from pictures import encode, noise
from ranks import run_ranks

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "check.py"
TINY = ("--model", "test_vit", "--weights", "none", "--image-size", "32", "--batch-size", "8", "--threads", "1")


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """What the recipe imports, once, so that forked processes have it."""
    modules = ("tracking.console", "feeds", "preparing", "preflight.reading", "preflight.report", "preflight.timing")
    for module in (*modules, "preflight.memory", "preflight.verdict"):
        import_module(f"tuning.{module}")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Train and val with 12 and 4 different pictures of two classes."""
    root, seed = tmp_path / "photos", 0
    for split, count in (("train", 12), ("val", 4)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                noise(40, 40, seed).save(root / split / name / f"{number}.jpg")
                seed += 1
    return root


def run_main(argv: tuple[str, ...], folder: str) -> tuple[int, str]:
    """The recipe as ``__main__`` in *folder*: (exit status, what it said)."""
    os.chdir(folder)
    sys.argv = [str(RECIPE), *argv]
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said), pytest.raises(SystemExit) as ended:
        runpy.run_path(str(RECIPE), run_name="__main__")
    code = ended.value.code
    return code if isinstance(code, int) else int(code is not None), said.getvalue()


def check(folder: Path, *flags: str, processes: int = 1) -> tuple[int, str]:
    """The answer of rank 0; all ranks end alike."""
    workplace = folder / "workplace"
    workplace.mkdir(exist_ok=True)
    answers: list[tuple[int, str]] = run_ranks(processes, run_main, flags, str(workplace))
    assert {status for status, _ in answers} == {answers[0][0]}
    return answers[0]


def found(output: Path) -> list[tuple[str, str, str]]:
    """(severity, kind, name of the file) of the errors and warnings."""
    listed: list[dict[str, Any]] = json.loads((output / "findings.json").read_text())
    return [(f["severity"], f["kind"], Path(f["path"]).name) for f in listed if f["severity"] != "note"]


def everything(root: Path) -> dict[str, tuple[int, int]]:
    """All files and folders below *root*, with size and time of the last change."""
    return {str(p.relative_to(root)): (p.stat().st_size, p.stat().st_mtime_ns) for p in root.rglob("*")}


@pytest.mark.parametrize("flags", [(), ("--decode", "--workers", "2")])
def test_clean_data_passes_and_only_output_is_written(photos: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    before = everything(photos)
    status, said = check(tmp_path, "--data", str(photos), *TINY, *flags, "--output", "../out")
    assert status == 0, said
    assert found(tmp_path / "out") == []
    assert "PASS: 0 errors, 0 warnings" in said
    assert everything(photos) == before
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"findings.json", "check.json", "check.html"}
    assert list((tmp_path / "workplace").iterdir()) == []
    facts = json.loads((tmp_path / "out" / "check.json").read_text())
    assert facts["pictures"] == {"train": 24, "eval": 8}
    assert facts["classes"]["cat"] == {"train": 12, "eval": 4}
    assert facts["first_loss"]["equal_probabilities"] == pytest.approx(0.6931, abs=1e-4)
    assert facts["first_loss"]["seen"] == pytest.approx(0.69, abs=0.3)
    assert [stage["stage"] for stage in facts["stages"]] == ["head", "all"]
    assert facts["steps"] == 13 * 3
    assert facts["hours"] > 0
    assert facts["memory"]["largest"] == 1024


def test_the_first_loss_is_judged_by_the_loss_of_the_run(photos: Path, tmp_path: Path) -> None:
    flags = ("--loss", "focal", "--mixup", "0.4", "--cutmix", "1", "--cache-features")
    status, said = check(tmp_path, "--data", str(photos), *TINY, *flags, "--output", "../out")
    assert status == 0, said
    facts = json.loads((tmp_path / "out" / "check.json").read_text())
    assert facts["first_loss"]["equal_probabilities"] == pytest.approx(0.6931 / 4, abs=1e-4)
    assert facts["first_loss"]["seen"] == pytest.approx(0.6931 / 4, abs=0.1)


def plant(photos: Path) -> None:
    """One fault of each kind, each in a picture of its own."""
    train, val = photos / "train", photos / "val"
    (train / "cat" / "text.jpg").write_bytes(b"not a picture")
    (val / "cat" / "cut.jpg").write_bytes(encode(noise(64, 64, 100), "JPEG")[:-300])
    shutil.copy(train / "cat" / "0.jpg", val / "cat" / "leak.jpg")
    shutil.copy(train / "cat" / "1.jpg", train / "dog" / "conflict.jpg")
    noise(8, 8, 101).save(train / "dog" / "tiny.png")
    noise(200, 20, 102).save(train / "dog" / "long.png")


PLANTED = [
    ("error", "unreadable", "text.jpg"),
    ("error", "truncated", "cut.jpg"),
    ("error", "leak", "0.jpg"),
    ("error", "leak", "leak.jpg"),
    ("error", "label_conflict", "1.jpg"),
    ("error", "label_conflict", "conflict.jpg"),
    ("warning", "duplicate", "1.jpg"),
    ("warning", "duplicate", "conflict.jpg"),
    ("warning", "tiny", "tiny.png"),
    ("warning", "aspect", "long.png"),
]


@pytest.mark.parametrize("processes", [1, 2])
def test_planted_faults_are_found(photos: Path, tmp_path: Path, processes: int) -> None:
    plant(photos)
    output = tmp_path / "out"
    flags = ("--data", str(photos), *TINY, "--workers", "0", "--output", str(output))
    status, said = check(tmp_path, *flags, processes=processes)
    assert status == 1, said
    assert found(output) == PLANTED
    assert "FAIL: 6 errors, 4 warnings" in said
    assert f"error: leak: eval: {photos}/val/cat/leak.jpg" in said
    assert (output / "check.html").read_text().count("data:image/jpeg;base64") >= 8


@pytest.mark.slow
def test_the_exit_status_of_a_real_process(photos: Path, tmp_path: Path) -> None:
    plant(photos)
    flags = ("--data", str(photos), *TINY, "--check-steps", "0", "--output", str(tmp_path / "out"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(RECIPE), *flags]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (1, "")
    assert found(tmp_path / "out") == PLANTED


def test_pictures_in_parquet_shards(tmp_path: Path) -> None:
    def shard(name: str, pictures: list[bytes]) -> None:
        features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
        table = {
            "image": [{"bytes": p, "path": None} for p in pictures],
            "label": [n % 2 for n in range(len(pictures))],
        }
        Dataset.from_dict(table, features=features).to_parquet(str(tmp_path / "shards" / f"{name}.parquet"))

    (tmp_path / "shards").mkdir()
    whole = [encode(noise(40, 40, seed)) for seed in range(24)]
    shard("train-0", whole[:16])
    shard("validation-0", [*whole[16:], whole[3], whole[5][:-50]])
    status, said = check(tmp_path, "--data", str(tmp_path / "shards"), *TINY, "--output", str(tmp_path / "out"))
    assert status == 1, said
    listed = json.loads((tmp_path / "out" / "findings.json").read_text())
    errors = [(f["kind"], f["split"], f["row"]) for f in listed if f["severity"] == "error"]
    # Row 3 is a dog; the copy in row 8 is labelled as a cat.
    both = [("train", 3), ("eval", 8)]
    assert errors == [
        ("truncated", "eval", 9),
        *(("leak", *where) for where in both),
        *(("label_conflict", *where) for where in both),
    ]


def test_class_folders_without_a_split(photos: Path, tmp_path: Path) -> None:
    status, said = check(tmp_path, "--data", str(photos / "train"), *TINY, "--output", str(tmp_path / "out"))
    assert status == 0, said
    assert found(tmp_path / "out") == []


def test_data_that_can_not_be_trained_on_at_all(photos: Path, tmp_path: Path) -> None:
    for path in (photos / "train").rglob("*.jpg"):
        path.write_bytes(b"broken: " + path.name.encode() + path.parent.name.encode())
    status, said = check(tmp_path, "--data", str(photos), *TINY, "--output", str(tmp_path / "out"))
    assert status == 1, said
    kinds = [kind for _, kind, _ in found(tmp_path / "out")]
    assert kinds == ["unreadable"] * 24 + ["trial_failed"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--near-bits", "17"), ("--near-bits is 17", "at most 16")),
        (("--max-aspect", "0.5"), ("--max-aspect is 0.5", "from 1")),
        (("--batch-size", "25"), ("--batch-size 25", "24 images")),
    ],
)
def test_what_the_run_would_refuse(
    photos: Path, tmp_path: Path, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    status, said = check(tmp_path, "--data", str(photos), *TINY, "--output", str(tmp_path / "out"), *flags)
    assert status == 2
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()
