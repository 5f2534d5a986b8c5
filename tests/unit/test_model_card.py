"""The model card: a header that the hub's own parser reads, and nothing in it that isn't known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from plain_stages import plain_stage

from tuning.errors import UserError
from tuning.models import licences, model_card
from tuning.models.build import ModelInfo
from tuning.models.card_metrics import judged_metrics
from tuning.models.model_card import Described, card, card_of_run, timm_usage
from tuning.tracking.run_folder import RunFolder

CLASSES = ("cat", "dog|wolf", "<b>emu</b>")
INFO = ModelInfo("resnet18", "resnet18", "", 64, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), "bicubic", 0.9)
CONFIG = "data: /home/somebody/secret/photos\nmodel: resnet18\nweights: pretrained\nseed: 3\nepochs: 2\nlr: auto\n"
SUMMARY: dict[str, Any] = {
    "status": "done",
    "best": {"top1": 0.75, "balanced_accuracy": 0.7, "loss": 0.6, "images": 40},
    "best_by": "balanced_accuracy",
    "train_images": 120,
    "eval_images": 40,
    "hardware": "NVIDIA H200",
    "world_size": 8,
    "seconds": 61.5,
    "precision": "bf16",
    "versions": {"torch": "2.15.0"},
    "git_commit": "abc123",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    for folder in ("model", "plots"):
        (run / folder).mkdir(parents=True)
    (run / "config.yaml").write_text(CONFIG)
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    (run / "plots" / "curves.png").write_bytes(b"PNG")
    (run / "metrics.jsonl").write_text('{"step": 5, "stage": 1, "lr_finder/chosen": 0.00321}\n')
    (run / "model" / "config.json").write_text('{"pretrained_cfg": {"input_size": [3, 96, 96]}}')
    return run


def read(run: Path) -> ModelCard:
    return ModelCard.load(run / "model" / "README.md")


def test_the_card_of_a_run_says_what_the_run_knows(run: Path) -> None:
    card_of_run(INFO, CLASSES, RunFolder(run))
    found = read(run)
    header = found.data.to_dict()
    assert header["library_name"] == "timm"
    assert header["pipeline_tag"] == "image-classification"
    assert header["license"] == "unknown"
    assert header["base_model"] == "timm/resnet18.a1_in1k"
    results = {result.metric_type: result.metric_value for result in found.data.eval_results}
    assert results == {"accuracy": 0.75, "balanced_accuracy": 0.7, "loss": 0.6}
    text = found.text
    for words in ("NVIDIA H200", "processes: 8", "bf16", "120", "61.5", "torch 2.15.0", "abc123", "96 x 96"):
        assert words in text
    assert "| head | head | 3 | adamw | 0.001 | cosine |" in text
    assert "| all | all | 2 | adamw | 0.00321 (found) | cosine |" in text
    assert "| top-1 accuracy | 0.7500 | unknown |" in text
    assert "On 40 images of the evaluation part of the data" in text
    assert "weights it started from: apache-2.0 (as timm" in text
    assert "data: unknown" in text
    assert "![curves](curves.png)" in text
    assert (run / "model" / "curves.png").read_bytes() == b"PNG"


def test_a_rate_that_was_found_holds_until_the_next_is(tmp_path: Path) -> None:
    lines = [{"stage": 1, "lr_finder/chosen": 2e-4}, {"stage": 3, "lr_finder/chosen": 1e-2}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": 5, **line}) + "\n" for line in lines))
    asks = [False, True, True, True, False]
    stages = [plain_stage(find_lr=asked) for asked in asks]
    assert model_card._found_rates(tmp_path, stages) == {1: 2e-4, 2: 2e-4, 3: 1e-2}


def test_no_folder_of_the_machine_is_published(run: Path) -> None:
    card_of_run(INFO, CLASSES, RunFolder(run))
    text = (run / "model" / "README.md").read_text()
    assert "photos" in text
    assert "secret" not in text
    assert str(run.parent) not in text


def test_names_of_classes_are_no_markup(run: Path) -> None:
    card_of_run(INFO, CLASSES, RunFolder(run))
    text = read(run).text
    assert r"dog\|wolf" in text
    assert "<b>" not in text


def test_intervals_come_from_evaluate(run: Path) -> None:
    judged = {
        "top1": 0.8,
        "macro_f1": 0.7,
        "roc_auc": None,
        "images": 40,
        "intervals": {"top1": [0.71, 0.9]},
        "classes": list(CLASSES),
        "own_data": True,
    }
    (run / "evaluation").mkdir()
    (run / "evaluation" / "metrics.json").write_text(json.dumps(judged))
    found = judged_metrics(None, run, CLASSES)
    about = Described(INFO, CLASSES, run, {"data": "demo"}, timm_usage("x"), found, licence="mit")
    text = card(about, curves=False)
    assert "| top-1 accuracy | 0.8000 | 0.7100 to 0.9000 |" in text
    assert "| macro F1 | 0.7000 | unknown |" in text
    assert "ROC-AUC" not in text
    assert "computes intervals" not in text
    assert "- this model: mit" in text
    assert "data: CC-BY-NC-SA-4.0" in text
    assert ModelCard(text).data.license == "mit"


def test_metrics_on_other_data_are_not_those_of_the_data(run: Path) -> None:
    judged = {"top1": 0.8, "images": 9, "classes": list(CLASSES), "own_data": False, "data": "/somewhere/snow"}
    path = run / "metrics.json"
    path.write_text(json.dumps(judged))
    found = judged_metrics(str(run), run, CLASSES)
    text = card(Described(INFO, CLASSES, run, {"data": "photos"}, "", found), curves=False)
    assert "On 9 images of other data (snow)." in text
    assert not ModelCard(text).data.eval_results
    assert "chose them" not in text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{}", "no metrics to read"),
        ('{"top1": 0.5, "classes": ["a"]}', "other classes"),
        ('{"top1": 0.5, "classes": ["a", "b"], "members": {"x": 1}}', "an ensemble"),
    ],
)
def test_metrics_of_something_else_are_refused(content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    path = tmp_path / "evaluation" / "metrics.json"
    path.write_text(content)
    with pytest.raises(UserError, match=reason):
        judged_metrics(str(path), tmp_path, ("a", "b"))
    assert judged_metrics(None, tmp_path, ("a", "b")) == {}


def test_a_model_without_a_run_is_described_all_the_same() -> None:
    text = card(Described(INFO, CLASSES, None, {}, timm_usage("x")), curves=False)
    assert "No evaluation is known of this model." in text
    assert "hardware: unknown" in text
    assert "weights it started from: unknown" in text
    assert ModelCard(text).data.license == "unknown"


def test_a_card_that_fails_costs_a_warning_only(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_card, "write_card", failing)
    card_of_run(INFO, CLASSES, RunFolder(run))
    said = capsys.readouterr().err
    assert said.startswith("warning: no model card")
    assert "No space left" in said


@pytest.mark.parametrize(
    ("config", "stated"),
    [
        ({"model": "resnet18", "weights": "none"}, "none: it started from random values"),
        ({"model": "resnet18", "weights": "/some/file.pth"}, "unknown"),
        ({"model": "local-dir:/nowhere", "weights": "pretrained"}, "unknown"),
        ({"model": "no_such_model", "weights": "pretrained"}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_licences_are_never_guessed(config: dict[str, Any], stated: str) -> None:
    assert licences.weights_licence(config) == stated


def test_the_licence_of_a_folder_counts_only_where_it_is_no_run(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"pretrained_cfg": {"license": "cc-by-4.0"}}')
    config = {"model": f"local-dir:{model}", "weights": "pretrained"}
    assert licences.weights_licence(config) == "cc-by-4.0 (as model/config.json states)"
    (tmp_path / "config.yaml").write_text("model: resnet18\n")
    assert licences.weights_licence(config) == "unknown"


def test_a_dataset_of_the_hub_is_named_in_the_header() -> None:
    about = Described(replace(INFO), CLASSES, None, {"data": "owner/flowers"}, "", {"top1": 0.5})
    found = ModelCard(card(about, curves=False)).data
    assert found.datasets == ["owner/flowers"]
    assert found.eval_results[0].dataset_type == "owner/flowers"
