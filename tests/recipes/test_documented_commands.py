"""Every command of every document is run, by the real launchers, as it stands but for what makes it short.

What isn't run here is in `ELSEWHERE`, with the test that does. Two processes share the commands with ``--dist load``.
"""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path

import pytest
from documented import LAUNCH, MODULE, PYTEST, RECIPE, ROOT, commands, name_of
from parquet_files import write_shards
from pictures import noise, write_classes, write_colours

pytestmark = pytest.mark.slow

LIMIT = 900  # seconds
ELSEWHERE = {
    "--main-address": "tests/launch/test_two_hosts_launch.py",  # two hosts
    "--replay": "tests/recipes/test_overfit.py",  # of a step that failed
}
# What a command is given instead of what it names, and why.
FAMILIES = {"convnext": "test_convnext", "resnet": "test_resnet", "vit": "test_vit", "M": "test_convnext"}  # seconds
WITH_WEIGHTS = "tf_efficientnet_lite0"  # for what needs a pretrained model; these weights come with pip
PLACES = {"s3://bucket/photos": "shards", "/mnt/photos": "shards"}  # no store, no such disk
VALUES = {"--max-minutes": "2", "--trials": "2"}
SHORTER = {
    "recipes/finetune.py": ("--max-steps", "3"),
    "recipes/sweep.py": ("--max-steps", "3"),
    "recipes/find_lr.py": ("--finder-steps", "10", "--finder-sweeps", "1", "--finder-race", "10"),
}
DEMO = ("--limit-train", "128", "--limit-eval", "32")  # of its 2,624 photos
RUNS = "first second photos a b c a0 a1 a2 b0 b1 b2 plain-1 plain-2 best-1 best-2"
STUDIES = {  # module -> flags beside or instead of those shown, which take minutes to hours
    "tests.benchmarks": ("--quick",),
    "tests.benchmarks.frozen": ("--quick",),
    "tests.benchmarks.loader": ("--quick",),
    "tests.benchmarks.startup": ("--quick",),
    "tests.benchmarks.two_processes": ("--quick",),
    "tests.benchmarks.recomputing": ("--models", "test_vit", "--images", "2"),
    "tests.benchmarks.saving": ("--window", "2", "--pairs", "1"),
    "tests.benchmarks.linear_probe": ("--seeds", "0", "--image-size", "32"),
    "tests.benchmarks.precision_levels": ("--seeds", "0", "--epochs", "1"),
    "tests.benchmarks.lr_study": (
        *("--out", "study", "--data", "elpv", "--models", "convnext_atto"),
        *("--optimizers", "adamw", "--only", "auto"),
    ),
    "tests.benchmarks.short_budget": (
        *("--out", "study", "--data", "patterns", "--minutes", "1.5"),
        *("--seeds", "0", "--tools", "ours", "probe"),
    ),
    "tests.benchmarks.default_study": (
        "--out",
        "study",
        "--data",
        "patterns",
        "--images",
        "48",
        "--ways",
        "head first, 16",
    ),
    "tests.faults.campaign": ("--runs", "1", "--seed", "1"),
}
ALL_BENCHMARKS = "tests.benchmarks"  # one after the other; one is run


def here(words: Sequence[str]) -> tuple[str, ...]:
    """The command, with the models, places and number of steps of this test."""
    recipe = next((word for word in words if word.startswith("recipes/")), "")
    given = []
    for before, word in zip(("", *words), words, strict=False):
        if before == "--model":
            given += (WITH_WEIGHTS,) if "quick" in words else small(word, recipe)
        else:
            place = next((place for place in PLACES if word.startswith(place)), "")
            given.append(VALUES.get(before, PLACES.get(place, "") + word.removeprefix(place)))
    return (*given, *added(recipe, given))


def small(model: str, recipe: str) -> tuple[str, ...]:
    """The model instead, with its ``--weights``."""
    if recipe in ("recipes/evaluate.py", "recipes/predict.py"):
        return (WITH_WEIGHTS,)
    return (next(tiny for name, tiny in FAMILIES.items() if model.startswith(name)), "--weights", "none")


def added(recipe: str, given: Sequence[str]) -> Iterator[str]:
    """Flags that make it short, and a model instead of that of a preset or a search space."""
    if recipe == "recipes/finetune.py" and "--data" not in given:
        yield from DEMO
    if "--max-minutes" not in given:
        yield from SHORTER.get(recipe, ())
    if recipe == "recipes/sweep.py" and "--trials" not in given:
        yield from ("--trials", "1")
    if "vit" in given and "--model" not in given:
        yield from ("--model", *small("vit", recipe))


def asked(found: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """One of those that become the same here."""
    return sorted({here(words): words for words in found if {*ELSEWHERE}.isdisjoint(words)}.values())


def ends_well(words: Sequence[str], folder: Path) -> str:
    """Run it in *folder*; what it says."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path}
    ran = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert ran.returncode == 0, f"{words}\n{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}"
    return ran.stdout


def test_where_the_others_are_run_exists() -> None:
    assert [path for path in ELSEWHERE.values() if not (ROOT / path).exists()] == []


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader of the documents has: the project, pictures under the names that they use, and runs."""
    home = tmp_path_factory.mktemp("home")
    for name in ("recipes", "launch", "accelerate_configs"):
        (home / name).symlink_to(ROOT / name)
    write_colours(home / "photos", train=24, val=4, strength=200)  # 72, more than a batch
    for name in ("test_photos", "other_photos", "c", "new", "new_photos", "holiday"):
        write_classes(home / name, dict.fromkeys(("blue", "green", "red"), 4))
    write_classes(home / "imagenet_val", {"n01440764": 2, "n01443537": 2})
    noise().save(home / "a.jpg")
    (home / "b" / "deep").mkdir(parents=True)
    noise().save(home / "b" / "deep" / "1.png")
    write_shards(home / "shards", {"train": (48, 48), "val": (8,)})
    train = "accelerate launch recipes/finetune.py --data photos --model convnext_tiny --output runs/made"
    ends_well(here(train.split()), home)
    for name in RUNS.split():
        shutil.copytree(home / "runs" / "made", home / "runs" / name, symlinks=True)
    (home / "runs" / "S").mkdir()
    shutil.copy(home / "runs" / "made" / "config.yaml", home / "runs" / "S" / "best.yaml")  # as a search leaves it
    return home


@pytest.fixture
def reader(home: Path, tmp_path: Path) -> Iterator[Path]:
    yield shutil.copytree(home, tmp_path / "home", symlinks=True)
    shutil.rmtree(tmp_path / "home")


def typed(words: Sequence[str], folder: Path) -> None:
    """Run it in *folder* as a shell would; a run that it makes is not there yet."""
    if "--output" in words:
        shutil.rmtree(folder / words[words.index("--output") + 1], ignore_errors=True)
    found = {word: sorted(glob(word, root_dir=folder)) for word in words if word.startswith("runs/")}
    ends_well([path for word in words for path in found.get(word) or [word]], folder)


@pytest.mark.parametrize("words", asked(commands(RECIPE)), ids=name_of)
def test_recipes(words: tuple[str, ...], reader: Path) -> None:
    typed(here(words), reader)


@pytest.mark.parametrize("words", asked(commands(LAUNCH)), ids=name_of)
def test_launch(words: tuple[str, ...], reader: Path) -> None:
    """Here it runs; elsewhere it is rendered: `tests/launch/test_real_slurm.py` submits."""
    if "local" in words:
        typed(here(words), reader)
    else:
        assert ends_well([word for word in words if word != "--submit"], reader)


def shorter(words: Sequence[str]) -> tuple[str, ...]:
    """The study with few pictures, steps and seeds."""
    at = words.index("-m") + 2
    instead, kept, keeps = STUDIES.get(words[at - 1], ()), [], True
    for word in words[at:]:
        keeps = word not in instead if word.startswith("--") else keeps
        kept += [word] * keeps
    if words[at - 1] == ALL_BENCHMARKS and not kept:
        kept = ["loader"]
    return (*words[:at], *kept, *instead)


@pytest.mark.parametrize("words", sorted({shorter(words) for words in commands(MODULE)}), ids=name_of)
def test_studies(words: tuple[str, ...], tmp_path: Path) -> None:
    assert ends_well(words, tmp_path)


@pytest.mark.parametrize("words", commands(PYTEST), ids=name_of)
def test_tests_are_found(words: tuple[str, ...]) -> None:
    assert "tests collected" in ends_well([*words, "--collect-only", "-n", "0"], ROOT)


def test_leet_shows_the_curves(home: Path) -> None:
    """``wandb leet`` is for a terminal: it gets one, shows the name of a curve and ends when asked."""
    mine, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (60, 200))
    command = [Path(sys.executable).parent / "wandb", "leet", "runs/first/wandb/latest-run"]
    with subprocess.Popen(command, cwd=home, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        shown, end = "", time.monotonic() + 60
        os.set_blocking(mine, False)
        while "eval/" not in shown and time.monotonic() < end:
            time.sleep(0.2)
            try:
                shown += os.read(mine, 65536).decode(errors="replace")
            except BlockingIOError:
                continue
        os.write(mine, b"q")
        process.wait(20)
    assert "eval/" in shown
