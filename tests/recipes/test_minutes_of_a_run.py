"""`--max-minutes` in the real recipe: timing leaves no trace, the schedule ends, and a run goes on as it began."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml
from ranks import run_ranks
from recipe_runs import Run, finetune_here, run_forked
from safetensors.torch import save_file

from tuning import budget
from tuning.minutes import MOST_EPOCHS, Costs

HOW = (
    *("--model", "test_efficientnet", "--weights", "none", "--image-size", "32", "--batch-size", "12"),
    *("--workers", "0", "--drop-rate", "0.2", "--freeze-epochs", "1", "--epochs", "3"),
    *("--tracker", "none", "--log-every", "1"),
)
MINUTES = ("--max-minutes", "10")  # more than the most epochs take, on any machine


def records(run: Path) -> list[dict[str, Any]]:
    """Training and evaluation without what a clock says."""
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if not k.startswith("perf/")} for record in read]


def config(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    return found


@pytest.fixture(scope="module")
def timed(coloured: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("timed")
    done = run_forked(folder, "--data", str(coloured), *HOW, *MINUTES, "--output", "run")
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder / "run"


def test_the_run_ends_in_time_with_a_finished_schedule(timed: Path) -> None:
    summary = json.loads((timed / "summary.json").read_text())
    assert (summary["status"], summary["ended_early_at"]) == ("done", None)
    assert summary["seconds"] <= 600
    chosen = config(timed)
    assert (chosen["freeze_epochs"], chosen["epochs"]) == (MOST_EPOCHS // 4, MOST_EPOCHS * 3 // 4), (
        "1 : 3, as the flags"
    )
    assert "max_minutes" not in chosen
    steps = [record for record in records(timed) if "train/loss" in record]
    head = [max(v for k, v in record.items() if k.startswith("lr/")) for record in steps if record["stage"] == 1]
    assert head[-1] < 0.02 * head[0], "cosine has come down"
    said = " ".join((timed.parent / "stdout.txt").read_text().split())
    assert f"--max-minutes 10: epochs {chosen['freeze_epochs']} of head + {chosen['epochs']} of all over all" in said


def test_its_config_repeats_it_bit_for_bit_without_timing(
    timed: Path, finetune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "run_costs", None)  # not to be called
    done = finetune("--config", str(timed / "config.yaml"), "--output", "again")
    assert done.returncode == 0, done.stderr
    assert records(tmp_path / "again") == records(timed)


def test_a_run_that_goes_on_keeps_its_lengths(
    coloured: Path, finetune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--data", str(coloured), *HOW, *MINUTES, "--output", "run", "--resume", "auto")
    stopped = finetune(*flags, "--stop-after", "0.001")
    assert stopped.returncode == 75, stopped.stderr
    began = config(tmp_path / "run")
    monkeypatch.setattr(budget, "run_costs", None)  # not to be called
    done = finetune(*flags)
    assert done.returncode == 0, done.stderr
    assert "keeps the epochs it began with" in done.stdout
    assert config(tmp_path / "run") == began
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "done"


def costing(seconds_per_image: float) -> Any:
    def costs(*_: Any) -> Costs:
        return Costs((seconds_per_image,) * 2, (0, 0), 0.0, 0.0, 12, before=1.0, after=1.0)

    return costs


def test_less_than_an_epoch_trains_on_fewer_images(
    coloured: Path, finetune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "run_costs", costing(10.5))
    done = finetune("--data", str(coloured), *HOW, *MINUTES, "--output", "run")
    assert done.returncode == 0, done.stderr
    chosen = config(tmp_path / "run")
    assert (chosen["freeze_epochs"], chosen["epochs"], chosen["limit_train"]) == (1, 1, 27)
    assert json.loads((tmp_path / "run/summary.json").read_text())["train_images"] == 27
    assert "over 27 of the" in done.stdout


def test_minutes_that_are_too_few_are_refused(coloured: Path, finetune: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "run_costs", costing(60.0))
    done = finetune("--data", str(coloured), *HOW, *MINUTES)
    assert done.returncode == 2
    assert "--max-minutes 10 is too short: one epoch a stage over 12 images" in done.stderr
    assert "about 25.3 minutes here" in done.stderr


SHORT = ("--model", "test_efficientnet", "--weights", "{weights}", "--batch-size", "12", "--workers", "0")
HALF = {"open": 0.5, "cache_features": True, "lr": 8e-4, "epochs": 3}
FEW = {  # seconds of an image in a step, at the smallest size: what is chosen
    "all, larger": (0.01, {"image_size": None, "stages": None, "epochs": MOST_EPOCHS, "augment": "light"}),
    "all, small": (1.3, {"image_size": 96, "stages": None, "epochs": 9, "augment": "light"}),
    "half, larger": (2.0, {"image_size": 128, "stages": [HALF | {"epochs": 6}], "epochs": 6, "augment": "none"}),
    "half": (6.0, {"image_size": 96, "stages": [HALF], "epochs": 3, "augment": "none"}),
}


@pytest.mark.parametrize("name", FEW)
def test_the_time_decides_how_large_and_how_deep(
    name: str, coloured: Path, finetune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each, expected = FEW[name]
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_efficientnet", num_classes=7).state_dict(), weights)

    def costs(_: Any, setup: budget.Setup) -> Costs:
        times = (setup.info.input_size / 96) ** 2 * (0.5 if setup.stages[0].stage.cache_features else 1)
        return Costs((each * times,), (0,), 0.0, 0.0, 12, before=1.0, after=1.0)

    monkeypatch.setattr(budget, "run_costs", costs)
    half = {"trained": (each / 2,), "judging": (0.0,), "passes": (1,)}
    monkeypatch.setattr(budget, "with_stages", lambda *given: dataclasses.replace(given[-1], **half))
    flags = [word.format(weights=weights) for word in SHORT]
    flags += ["--output", "run", "--tracker", "none", "--stop-after", "0.001"]
    done = finetune("--data", str(coloured), *flags, *MINUTES)
    assert done.returncode == 75, done.stderr
    chosen = config(tmp_path / "run")
    assert {key: chosen.get(key) for key in expected} == expected
    said = " ".join(done.stdout.split())
    assert ("Only the upper 50%" in said) == name.startswith("half")
    assert (f"{expected['image_size']} pixels instead of 160" in said) == (name != "all, larger")
    assert ("--augment light" in said) == name.startswith("all")


def _train(data: str) -> tuple[int, int, int]:
    code = finetune_here("--data", data, *HOW, *MINUTES, "--output", "run")
    chosen = config(Path("run"))
    return code, chosen["freeze_epochs"], chosen["epochs"]


def test_two_processes_take_the_time_of_the_first(
    coloured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = run_ranks(2, _train, str(coloured))
    assert one == two
    assert one[0] == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["world_size"] == 2


def _choose(*flags: str) -> tuple[int, dict[str, Any]]:
    code = finetune_here(*flags, *MINUTES, "--output", "run", "--tracker", "none", "--stop-after", "0.001")
    chosen = config(Path("run"))
    return code, {key: chosen.get(key) for key in ("image_size", "epochs", "augment", "stages")}


def test_two_processes_choose_one_shape(coloured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(timm.create_model("test_efficientnet", num_classes=7).state_dict(), tmp_path / "w.safetensors")
    flags = [word.format(weights=tmp_path / "w.safetensors") for word in SHORT]
    one, two = run_ranks(2, _choose, "--data", str(coloured), *flags)
    assert one == two
    assert one == (75, {"image_size": None, "epochs": MOST_EPOCHS, "augment": "light", "stages": None})
