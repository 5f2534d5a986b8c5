"""`recipes/sweep.py` on real trials: what it finds, what it refuses, and that no interruption costs a trial."""

from __future__ import annotations

import csv
import importlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import sweep as recipe
import yaml
from PIL import Image
from recipe_runs import ROOT, run_forked

from tuning.cli.command_line import parse_command
from tuning.errors import UserError
from tuning.searching import launching, pictures

SMALL = ("--model", "test_vit", "--weights", "none", "--image-size", "32", "--batch-size", "8", "--workers", "0")
SHORT = ("--freeze-epochs", "0", "--tracker", "none", "--threads", "1", "--output", "study")
LIMIT = 900  # seconds


def write_space(folder: Path, **changes: Any) -> str:
    """A space over the learning rate, with epochs and a model of its own."""
    content = {
        "program": "recipes/finetune.py",
        "method": "random",
        "metric": {"name": "eval/balanced_accuracy", "goal": "maximize"},
        "parameters": {
            "lr": {"distribution": "log_uniform_values", "min": 0.0005, "max": 0.005},
            "model": {"value": "resnet18"},
            "epochs": {"value": 1},
        },
        **changes,
    }
    (folder / "space.yaml").write_text(yaml.safe_dump(content))
    return "space.yaml"


def start(folder: Path, *flags: str) -> subprocess.Popen[str]:
    """``recipes/sweep.py`` as a command."""
    command = [sys.executable, str(ROOT / "recipes/sweep.py"), *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, stdout=pipe, stderr=pipe)


def run(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    with start(folder, *flags) as process:
        try:
            out, err = process.communicate(timeout=LIMIT)
        finally:
            process.kill()
    return subprocess.CompletedProcess(flags, process.returncode, out, err)


def rows(study: Path) -> list[dict[str, str]]:
    with (study / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def summary(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text()))


def evaluations(trial: Path) -> list[dict[str, Any]]:
    lines = (trial / "metrics.jsonl").read_text().splitlines() if (trial / "metrics.jsonl").exists() else []
    return [record for record in map(json.loads, lines) if "eval/loss" in record]


Ask = Callable[..., None]


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """``ask(*flags)`` calls the recipe in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*flags: str) -> None:
        monkeypatch.setattr(sys, "argv", ["sweep.py", *flags])
        recipe.sweep(parse_command(flags, "recipes/sweep.py", "", ROOT / "recipes" / "presets"))

    return call


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--data", "photos"), "--space is missing"),
        (("--space", "vit"), "--data is missing"),
        (("--space", "vut", "--data", "p"), "Perhaps you meant 'vit'"),
        (("--space", "vit", "--data", "p", "--resume", "runs/x/checkpoints/y"), "a search takes never, or auto"),
        (("--space", "vit", "--data", "p", "--resume", "auto"), "--resume auto needs --output"),
        (("--space", "vit", "--data", "p", "--best-by", "loss"), "Give --best-by balanced_accuracy, or a copy"),
        (("--space", "vit", "--data", "p", "--launcher", "'"), "No closing quotation"),
        (("--space", "vit", "--data", "p", "--trials", "0"), "--trials is 0"),
        (("--space", "vit", "--data", "p", "--warmup-epochs", "1"), "--warmup-epochs is 1.0"),
        (("--space", "vit", "--data", "p", "--run", "r"), "has no effect in recipes/sweep.py"),
    ],
)
def test_what_can_not_work_is_refused_at_once(ask: Ask, tmp_path: Path, flags: tuple[str, ...], reason: str) -> None:
    with pytest.raises(UserError) as refused:
        ask(*flags)
    assert reason in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_without_optuna_the_remedy_is_named(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install optuna, or pip install -e '\.\[sweep\]'"):
        ask("--space", "vit", "--data", "photos")


def test_under_a_launcher_it_is_refused(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="run it by python"):
        ask("--space", "vit", "--data", "photos")


def test_sweep_flags_are_refused_elsewhere() -> None:
    with pytest.raises(
        UserError, match=r"--trials 3 is for recipes/sweep\.py and has no effect in recipes/finetune\.py"
    ):
        parse_command(["--data", "p", "--trials", "3"], "recipes/finetune.py", "", ROOT / "recipes/presets")


def test_a_dry_run_prints_the_space_and_the_first_trial(
    ask: Ask, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(
        "--space", "vit", "--data", "photos", "--lr", "auto", "--mixup", "0", "--dry-run", "--launcher", "--cpu --debug"
    )
    told = capsys.readouterr().out
    assert "0.6 to 0.95" in told
    (words,) = [line for line in told.splitlines() if "accelerate.commands.launch --cpu --debug" in line]
    assert " --model=vit_small_patch16_224.augreg_in21k " in words
    assert "--lr" not in words, "what is typed is not searched"
    assert "--mixup" not in words
    assert list(tmp_path.iterdir()) == []


# Trials that are none: a few lines write what a run writes, so that the search around them can be tried in seconds.

FAKE = """
import json, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from tuning.cli.command_line import parse_command
command = parse_command(sys.argv[1:], "recipes/finetune.py", "", Path({root!r}) / "recipes/presets")
lr, epochs, folder = command.flags.optimisation.lr, command.flags.staging.epochs, Path(command.flags.run.output)
if lr == 0.5:
    sys.exit("error: it can't be 0.5")
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.yaml").write_text(command.config)
(folder / "checkpoints").mkdir(exist_ok=True)
metrics = folder / "metrics.jsonl"
for epoch in range(len(metrics.read_text().splitlines()) if metrics.exists() else 0, epochs):
    with metrics.open("a") as file:
        file.write(json.dumps({{"step": epoch, "eval/loss": lr, "eval/balanced_accuracy": 1 - lr}}) + "\\n")
    time.sleep(0.1)
best = {{"loss": lr, "balanced_accuracy": 1 - lr}}
(folder / "summary.json").write_text(json.dumps({{"status": "done", "best": best}}))
"""
PLAIN = ["${interpreter}", "${program}", "${args}"]


@pytest.fixture
def fake(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """`ask` with such trials."""
    program = tmp_path / "fake" / "finetune.py"
    program.parent.mkdir()
    program.write_text(FAKE.format(root=str(ROOT)))
    monkeypatch.setattr(recipe, "RECIPES", program.parent)
    monkeypatch.setattr(launching, "LOOK_SECONDS", 0.05)

    def call(*flags: str) -> None:
        ask("--space", "space.yaml", "--data", "photos", "--output", "study", *flags)

    return call


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures, which take longer than such trials."""
    monkeypatch.setattr(pictures, "draw", lambda *_: [])


def test_a_search_of_three_trials(fake: Ask, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_space(tmp_path, command=PLAIN)
    fake("--trials", "3", "--model", "test_vit", "--seed", "2")
    study = tmp_path / "study"
    found = rows(study)
    assert sorted(row["trial"] for row in found) == ["0", "1", "2"]
    assert len({row["lr"] for row in found}) == 3
    values = [float(row["balanced_accuracy"]) for row in found]
    assert values == sorted(values, reverse=True)
    for row in found:
        trial = study / "trials" / f"{int(row['trial']):04d}"
        config = yaml.safe_load((trial / "config.yaml").read_text())
        assert (config["lr"], config["model"], config["epochs"], config["seed"]) == (float(row["lr"]), "test_vit", 1, 2)
        assert 0.0005 <= config["lr"] <= 0.005
        assert float(row["balanced_accuracy"]) == 1 - config["lr"]
        assert not (trial / "checkpoints").exists()
    told = summary(study)
    assert (told["status"], told["best_by"], told["seed"]) == ("done", "balanced_accuracy", 2)
    assert (told["trials"], told["best"]["trial"]) == ({"done": 3}, int(found[0]["trial"]))
    assert (told["best"]["value"], told["best"]["flags"]["lr"]) == (values[0], float(found[0]["lr"]))
    for name in ("history", "slices"):
        with Image.open(study / "plots" / f"{name}.png") as picture:
            assert min(picture.size) > 200
    best = parse_command(["--preset", str(study / "best.yaml")], "recipes/finetune.py", "", ROOT / "recipes/presets")
    assert best.config == (tmp_path / told["best"]["run"] / "config.yaml").read_text()
    assert "--preset study/best.yaml --seed 1" in capsys.readouterr().out

    with pytest.raises(UserError, match=r"--output study holds another run\. Go on with it by --resume auto"):
        fake("--trials", "3", "--model", "test_vit", "--seed", "2")
    with pytest.raises(UserError, match="epochs was 3, now 4"):
        fake("--trials", "3", "--model", "test_vit", "--seed", "2", "--resume", "auto", "--freeze-epochs", "4")
    write_space(tmp_path, command=PLAIN, parameters={"lr": {"min": 0.1, "max": 0.2}, "epochs": {"value": 1}})
    with pytest.raises(UserError, match=r"the search was started in another space: lr was 0\.0005 to 0\.005, log, now"):
        fake("--trials", "3", "--model", "test_vit", "--seed", "2", "--resume", "auto")


@pytest.mark.usefixtures("undrawn")
def test_a_search_that_is_stopped_goes_on(fake: Ask, tmp_path: Path) -> None:
    """By the clock, in its second trial; a trial that goes on keeps its number and its folder."""
    write_space(tmp_path, method="grid", command=PLAIN, parameters={"lr": {"values": [0.1, 0.2, 0.3]}})
    with pytest.raises(KeyboardInterrupt, match="--stop-after"):
        fake("--epochs", "30", "--stop-after", "0.08")
    study = tmp_path / "study"
    assert (summary(study)["status"], summary(study)["reason"]) == ("preempted", "--stop-after")
    before = {path.name for path in (study / "trials").iterdir()}
    fake("--epochs", "30", "--resume", "auto", "--trials", "2")
    assert [(row["trial"], row["lr"]) for row in rows(study)] == [("0", "0.1"), ("1", "0.2")]
    assert before <= {path.name for path in (study / "trials").iterdir()} == {"0000", "0001"}
    assert [len(evaluations(study / "trials" / name)) for name in ("0000", "0001")] == [30, 30]
    fake("--epochs", "30", "--resume", "auto")
    assert summary(study)["trials"] == {"done": 3}


@pytest.mark.usefixtures("undrawn")
def test_a_trial_that_is_behind_is_cut_short(fake: Ask, tmp_path: Path) -> None:
    write_space(
        tmp_path,
        method="grid",
        command=PLAIN,
        early_terminate={"type": "hyperband", "min_iter": 2, "eta": 2},
        metric={"name": "eval/loss", "goal": "minimize"},
        parameters={"lr": {"values": [0.1, 0.9]}, "epochs": {"value": 40}},
    )
    fake("--best-by", "loss")
    study = tmp_path / "study"
    found = [(row["lr"], row["loss"], row["status"]) for row in rows(study)]
    assert found == [("0.1", "0.1", "done"), ("0.9", "0.9", "pruned")]
    assert 2 <= len(evaluations(study / "trials" / "0001")) < 40


@pytest.mark.usefixtures("undrawn")
def test_failures_are_told_and_end_a_search_only_if_nothing_else_comes(fake: Ask, tmp_path: Path) -> None:
    parameters = {"lr": {"values": [0.1, 0.5]}, "warmup_epochs": {"values": [0.0, 5.0]}}
    write_space(tmp_path, method="grid", command=PLAIN, parameters={"lr": {"values": [0.1, 0.5]}})
    fake()
    good, bad = rows(tmp_path / "study")
    assert (good["status"], bad["status"], bad["reason"]) == ("done", "failed", "it can't be 0.5")
    assert (tmp_path / "study" / "trials" / "0001" / "output.log").exists()
    write_space(tmp_path, method="grid", command=PLAIN, parameters={**parameters, "lr": {"values": [0.5, 0.1]}})
    with pytest.raises(UserError, match=r"--warmup-epochs is 5\.0"):
        fake("--output", "other")
    assert not (tmp_path / "other").exists(), "that is known before anything starts"
    write_space(tmp_path, method="grid", command=PLAIN, parameters={"lr": {"values": [0.5, 0.1]}})
    with pytest.raises(UserError, match=r"the trial failed, and so would all: it can't be 0\.5"):
        fake("--output", "other")
    assert [row["status"] for row in rows(tmp_path / "other")] == ["failed"]
    assert summary(tmp_path / "other")["status"] == "failed"


# Real trials. Slow are those that are many, killed, stopped or spread over processes.


@pytest.mark.slow
def test_a_real_trial(coloured: Path, tmp_path: Path) -> None:
    """One launch: through the launcher, the run and its metrics to the result."""
    parameters = {"lr": {"values": [0.003, 0.03]}, "epochs": {"value": 1}}
    space = write_space(tmp_path, method="grid", parameters=parameters)
    done = run(tmp_path, "--space", space, "--data", str(coloured), *SMALL, *SHORT, "--trials", "1")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr + done.stdout
    (row,) = rows(tmp_path / "study")
    trial = tmp_path / "study" / "trials" / "0000"
    ended = summary(trial)
    assert (ended["status"], ended["world_size"]) == ("done", 1)
    assert float(row["balanced_accuracy"]) == ended["best"]["balanced_accuracy"]
    assert (row["lr"], row["status"]) == ("0.003", "done")
    assert not (trial / "checkpoints").exists()
    assert (trial / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_random_search_of_three_real_trials(coloured: Path, tmp_path: Path) -> None:
    flags = ("--space", write_space(tmp_path), "--data", str(coloured), *SMALL, *SHORT)
    done = run(tmp_path, *flags, "--trials", "3")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr + done.stdout
    study = tmp_path / "study"
    found = rows(study)
    assert sorted(row["trial"] for row in found) == ["0", "1", "2"]
    for row in found:
        trial = study / "trials" / f"{int(row['trial']):04d}"
        config, ended = yaml.safe_load((trial / "config.yaml").read_text()), summary(trial)
        assert (config["lr"], config["model"], config["epochs"]) == (float(row["lr"]), "test_vit", 1)
        assert (ended["status"], ended["best"]["balanced_accuracy"]) == ("done", float(row["balanced_accuracy"]))
        assert 0.0005 <= config["lr"] <= 0.005
        assert not (trial / "checkpoints").exists()
        assert (trial / "model" / "model.safetensors").exists()
    assert len({row["lr"] for row in found}) == 3
    values = [float(row["balanced_accuracy"]) for row in found]
    assert values == sorted(values, reverse=True)

    told = summary(study)
    assert (told["status"], told["best_by"], told["seed"]) == ("done", "balanced_accuracy", 0)
    assert (told["trials"], told["best"]["trial"]) == ({"done": 3}, int(found[0]["trial"]))
    assert (told["best"]["value"], told["best"]["flags"]["lr"]) == (values[0], float(found[0]["lr"]))
    for name in ("history", "slices"):
        with Image.open(study / "plots" / f"{name}.png") as picture:
            assert min(picture.size) > 200
    assert "--preset study/best.yaml --seed 1" in done.stdout
    best = parse_command(["--preset", str(study / "best.yaml")], "recipes/finetune.py", "", ROOT / "recipes/presets")
    assert yaml.safe_load(best.config) == yaml.safe_load((tmp_path / told["best"]["run"] / "config.yaml").read_text())

    more = run(tmp_path, *flags, "--trials", "3", "--resume", "auto")
    assert more.returncode == 0, more.stderr
    assert rows(study) == found
    connection = sqlite3.connect(study / "study.db")
    assert connection.execute("select count(*) from trials").fetchone() == (3,)
    connection.close()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.slow
def test_a_killed_search_loses_and_repeats_nothing(coloured: Path, tmp_path: Path) -> None:
    """Killed within the second trial, it ends as the search that wasn't; that trial goes on where it was."""
    parameters = {"lr": {"min": 0.0005, "max": 0.005}, "epochs": {"value": 30}}
    space = write_space(tmp_path, parameters=parameters)
    flags = ("--space", space, "--data", str(coloured), *SMALL, *SHORT, "--trials", "2")
    study, second = tmp_path / "study", tmp_path / "study" / "trials" / "0001"
    process = start(tmp_path, *flags)
    wait_for(lambda: len(evaluations(second)) >= 3, process)
    process.kill()
    process.communicate()
    assert len(rows(study)) == 1, "what was interrupted is no result"
    done = run(tmp_path, *flags, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    found = [[row[key] for key in ("trial", "lr", "balanced_accuracy", "status")] for row in rows(study)]
    assert {(trial, status) for trial, *_, status in found} == {("0", "done"), ("1", "done")}
    assert len(evaluations(second)) == 30
    (tmp_path / "whole").mkdir()
    write_space(tmp_path / "whole", parameters=parameters)
    assert run(tmp_path / "whole", *flags).returncode == 0
    others = rows(tmp_path / "whole" / "study")
    assert found == [[row[key] for key in ("trial", "lr", "balanced_accuracy", "status")] for row in others]
    steps = [
        [(r["step"], r["eval/loss"]) for r in evaluations(t)]
        for t in (second, tmp_path / "whole" / second.relative_to(tmp_path))
    ]
    assert steps[0] == steps[1], "evaluation by evaluation"
    resumed = (second / "output.log").read_text()
    assert resumed.count("epoch 1 ") == 1, "it went on where it was"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT"])
def test_a_search_that_is_asked_to_stop_goes_on(how: str, coloured: Path, tmp_path: Path) -> None:
    space = write_space(tmp_path, parameters={"lr": {"min": 0.0005, "max": 0.005}, "epochs": {"value": 40}})
    flags = ("--space", space, "--data", str(coloured), *SMALL, *SHORT, "--trials", "1")
    study, trial = tmp_path / "study", tmp_path / "study" / "trials" / "0000"
    process = start(tmp_path, *flags)
    wait_for(lambda: len(evaluations(trial)) >= 2, process)
    process.send_signal(getattr(signal, how))
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 75
    assert f"stopped on {how}; --resume auto" in err
    assert [summary(folder)["status"] for folder in (study, trial)] == ["preempted", "preempted"]
    assert left_of(tmp_path) == []
    done = run(tmp_path, *flags, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert [row["status"] for row in rows(study)] == ["done"]
    assert len(evaluations(trial)) == 40


def left_of(folder: Path) -> list[psutil.Process]:
    """Processes that name *folder*."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(folder) in str(p.info["cmdline"])]


@pytest.mark.slow
def test_pruning_really_stops_a_trial(coloured: Path, tmp_path: Path) -> None:
    space = write_space(
        tmp_path,
        method="grid",
        metric={"name": "eval/loss", "goal": "minimize"},
        early_terminate={"type": "hyperband", "min_iter": 2, "eta": 2},
        parameters={"lr": {"values": [0.003, 1e-9]}, "epochs": {"value": 60}},
    )
    flags = ("--space", space, "--data", str(coloured), *SMALL, *SHORT, "--best-by", "loss", "--seed", "3")
    done = run(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    assert [(row["lr"], row["status"]) for row in rows(tmp_path / "study")] == [("0.003", "done"), ("1e-09", "pruned")]
    good, bad = (tmp_path / "study" / "trials" / name for name in ("0000", "0001"))
    assert len(evaluations(good)) == 60
    assert 2 <= len(evaluations(bad)) < 60
    assert (summary(bad)["status"], summary(bad)["reason"].partition(",")[0]) == ("preempted", "SIGTERM")
    assert summary(tmp_path / "study")["trials"] == {"done": 1, "pruned": 1}
    assert yaml.safe_load((good / "config.yaml").read_text())["seed"] == 3


@pytest.mark.slow
def test_a_trial_of_two_processes_and_its_config_as_a_preset(coloured: Path, tmp_path: Path) -> None:
    """Pruned and done with two processes; then best.yaml on one."""
    space = write_space(
        tmp_path,
        method="grid",
        early_terminate={"type": "median", "min_iter": 1},
        parameters={"lr": {"values": [0.003, 0.001]}, "epochs": {"value": 2}},
    )
    two = "--multi_gpu --num_machines 1 --num_processes 2 --main_process_port 0"
    flags = ("--space", space, "--data", str(coloured), *SMALL, *SHORT, "--launcher", two)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        done = run(tmp_path, *flags)
    finally:
        del os.environ["ACCELERATE_USE_CPU"]
    assert done.returncode == 0, done.stderr
    assert [row["status"] for row in rows(tmp_path / "study")] == ["done", "done"]
    for name in ("0000", "0001"):
        assert summary(tmp_path / "study" / "trials" / name)["world_size"] == 2
    repeat = run_forked(tmp_path, "--preset", "study/best.yaml", "--seed", "1", "--output", "again")
    assert repeat.returncode == 0, repeat.stderr
    best = summary(tmp_path / "study")["best"]
    config = yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())
    assert (config["lr"], config["seed"], config["model"]) == (best["flags"]["lr"], 1, "test_vit")


@pytest.mark.slow
def test_a_search_of_two_processes_is_stopped_whole(coloured: Path, tmp_path: Path) -> None:
    space = write_space(tmp_path, parameters={"lr": {"min": 0.001, "max": 0.002}, "epochs": {"value": 500}})
    two = "--multi_gpu --num_machines 1 --num_processes 2 --main_process_port 0"
    trial = tmp_path / "study" / "trials" / "0000"
    os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        process = start(tmp_path, "--space", space, "--data", str(coloured), *SMALL, *SHORT, "--launcher", two)
    finally:
        del os.environ["ACCELERATE_USE_CPU"]
    wait_for(lambda: len(evaluations(trial)) >= 1, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=LIMIT)
    assert process.returncode == 75
    assert summary(trial)["status"] == "preempted"
    assert left_of(tmp_path) == []


@pytest.mark.slow
def test_a_mistake_that_all_trials_share_ends_the_search(tmp_path: Path) -> None:
    flags = ("--space", write_space(tmp_path), "--data", "nowhere", *SMALL, *SHORT)
    done = run(tmp_path, *flags)
    assert done.returncode == 2
    assert "error: the trial failed, and so would all: --data" in done.stderr
    assert "nowhere" in done.stderr
    assert [row["status"] for row in rows(tmp_path / "study")] == ["failed"]
    assert summary(tmp_path / "study")["status"] == "failed"


@pytest.mark.slow
def test_a_trial_that_fails_alone_is_told(coloured: Path, tmp_path: Path) -> None:
    """The second model doesn't exist; and a second search is refused while the first one runs."""
    parameters = {"model": {"values": ["test_vit", "test_vot"]}, "epochs": {"value": 1}, "lr": {"value": 0.001}}
    space = write_space(tmp_path, method="grid", parameters=parameters)
    flags = ("--space", space, "--data", str(coloured), *SMALL[2:], *SHORT)
    process = start(tmp_path, *flags)
    wait_for((tmp_path / "study" / "config.yaml").exists, process)
    other = run(tmp_path, *flags, "--resume", "auto")
    assert (other.returncode, "another run is training in it now" in other.stderr) == (2, True), other.stderr
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    assert [row["status"] for row in rows(tmp_path / "study")] == ["done", "failed"]
    assert "'test_vot'" in rows(tmp_path / "study")[1]["reason"]
    assert "failed: --model 'test_vot'" in out


@pytest.mark.slow
def test_wandbs_agent_runs_a_trial(coloured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent's own code starts the real recipe; only the server, which would say what to try, is missing."""
    agents = importlib.import_module("wandb.wandb_agent")
    monkeypatch.chdir(tmp_path)
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {"WANDB_DIR": str(tmp_path), "WANDB_SWEEP_ID": "abc", "DATA": str(coloured), "PATH": binaries}
    blank = {"WANDB_RUN_ID": "", "WANDB_SWEEP_PARAM_PATH": ""}
    for variable, value in {**variables, **blank, "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(variable, value)
    content = yaml.safe_load((ROOT / "recipes/sweeps/vit.yaml").read_text())
    agent = agents.Agent(api=None, queue=None, sweep_id="abc")
    agent._sweep_command = content["command"]
    tiny = {"model": "test_vit", "weights": "none", "image_size": 32, "epochs": 1, "freeze_epochs": 0, "batch_size": 8}
    tried = {"lr": 0.001, "layer_decay": 0.8, "workers": 0, "output": "run"}
    args = {key: {"value": value} for key, value in {**tiny, **tried}.items()}
    agent._command_run({"run_id": "r1", "program": str(ROOT / content["program"]), "args": args})
    assert agent._run_processes["r1"].wait() == 0
    assert summary(tmp_path / "run")["status"] == "done"
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["lr"], config["layer_decay"], config["data"]) == (0.001, 0.8, str(coloured))
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*-r1")), "the run has the agent's id"
