"""``--help``, ``--print-config`` and misspelt flags answer at once, without torch."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tuning.cli.command_line import NOT_IN_CONFIG, flat
from tuning.cli.optimizer_defaults import resolved
from tuning.flags import Flags

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").glob("*.py"))
OF_A_RUN = [recipe for recipe in RECIPES if recipe != "recipes/compare.py"]  # which trains nothing
CPU_SECONDS, OF_PARSER, TRIES = 0.3, 2.5, 6
HEAVY = ("torch", "timm", "datasets", "accelerate", "wandb", "matplotlib", "numpy")
SLOW = ("typeguard", "psutil", "subprocess", "ctypes", "hashlib")  # what the parser of many flags does without


def run(*argv: str, recipe: str = "recipes/finetune.py") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, recipe, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60)


def imports(*argv: str, recipe: str = "recipes/finetune.py") -> set[str]:
    """Packages that the command imports."""
    command = [sys.executable, "-X", "importtime", recipe, *argv]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stderr.splitlines()
    names = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines if line.startswith("import time:")}
    assert "tyro" in names, "the list of imports is empty"
    return names


@pytest.mark.parametrize("recipe", OF_A_RUN)
def test_help_names_every_flag(recipe: str) -> None:
    done = run("--help", recipe=recipe)
    assert (done.returncode, done.stderr) == (0, "")
    words = set(done.stdout.replace(",", " ").split())
    missing = [key for key in flat(Flags()) if f"--{key.replace('_', '-')}" not in words]
    assert missing == []


def test_help_has_the_defaults_of_ones_own_data() -> None:
    """Not those that the demo brings, which run where --data is left out."""
    assert run("--help").stdout == run("--data", "photos", "--help").stdout
    assert run("--data", "demo", "--help").stdout != run("--help").stdout


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("argv", [("--help",), ("--modle", "x"), ("--lr", "-1"), ("--print-config",)])
def test_answers_before_anything_heavy_is_imported(recipe: str, argv: tuple[str, ...]) -> None:
    assert imports(*argv, recipe=recipe).isdisjoint((*HEAVY, *(SLOW if recipe in OF_A_RUN else ())))


def cpu_seconds(*argv: str) -> float:
    """User and system time of a Python process, which may keep what it compiles as it does for a user."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("argv", [("--help",), ("--modle", "x"), ("--print-config",)])
def test_answers_at_once(argv: tuple[str, ...]) -> None:
    """A busy machine stretches CPU time too: 2.5 times what the parsers' own imports take is also good enough."""
    spent = []
    for _ in range(TRIES):
        spent.append(cpu_seconds("recipes/finetune.py", *argv))
        if spent[-1] < max(CPU_SECONDS, OF_PARSER * cpu_seconds("-c", "import tyro, yaml")):
            return
    pytest.fail(f"{argv[0]} took {min(spent):.2f} s of CPU at best")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        *(("--modle", "--model"), ("--batchsize", "--batch-size"), ("--layer-decai", "--layer-decay")),
        *(("--learning-rate", "--lr"), ("--num_train_epochs", "--epochs")),
    ],
)
def test_an_unknown_flag_names_the_nearest(typed: str, meant: str) -> None:
    done = run(typed, "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert typed in done.stderr
    assert meant in done.stderr.partition("Perhaps you meant")[2]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("argv", [("--lr",), ("--lr", "fast"), ("--schedule", "cosin"), ("stray",)])
def test_malformed_flags_end_with_2(argv: tuple[str, ...]) -> None:
    done = run(*argv)
    assert (done.returncode, done.stdout) == (2, "")
    assert argv[-1] in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("argv", [(), ("--data", "photos", "--lr", "0.01", "--unfreeze", "gradual")])
def test_the_printed_config_repeats_itself(argv: tuple[str, ...], tmp_path: Path) -> None:
    first = run("--print-config", *argv)
    assert (first.returncode, first.stderr) == (0, "")
    content = yaml.safe_load(first.stdout)
    assert set(content) - {"stages"} == set(flat(Flags())) - set(NOT_IN_CONFIG)
    assert ("stages" in content) == (argv == ())
    config = tmp_path / "config.yaml"
    config.write_text(first.stdout, encoding="utf-8")
    assert run("--print-config", "--config", str(config)).stdout == first.stdout


def test_precedence_and_spellings(tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("data: photos\nbatch-size: 24\nweight_decay: 1e-2\nepochs: 4\n")
    argv = ("--preset", str(preset), "--epochs", "6", "--label_smoothing", "0.1", "--clip-norm=2")
    content = yaml.safe_load(run("--print-config", *argv).stdout)
    assert (content["data"], content["batch_size"], content["weight_decay"]) == ("photos", 24, 0.01)
    assert (content["epochs"], content["label_smoothing"], content["clip_norm"]) == (6, 0.1, 2.0)
    assert content["lr"] == flat(resolved(Flags()))["lr"]
