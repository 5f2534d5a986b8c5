"""The temperature against a general minimiser, its limits, and where it is stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from scipy.optimize import minimize_scalar
from test_final_metrics import answers
from torch.nn import functional as F

from tuning.errors import UserError
from tuning.flags import DataFlags
from tuning.judging.calibration import HIGHEST, LOWEST, calibrated, fit_temperature, place_for, store
from tuning.judging.finished import open_finished
from tuning.models.build import build, save_timm_folder


@pytest.mark.parametrize(("scale", "classes"), [(1.0, 3), (5.0, 3), (0.2, 10), (2.0, 2)])
def test_the_temperature_minimises_the_loss(scale: float, classes: int) -> None:
    logits, labels = answers(400, classes)
    logits = logits * scale
    best = minimize_scalar(
        lambda t: float(F.cross_entropy(logits.double() / t, labels)), bounds=(LOWEST, HIGHEST), method="bounded"
    )
    assert fit_temperature(logits, labels) == pytest.approx(best.x, rel=1e-3)


def test_logits_that_are_too_large_by_a_factor_give_back_that_factor() -> None:
    generator = torch.Generator().manual_seed(0)
    honest = torch.randn(20000, 4, generator=generator) * 2
    labels = torch.multinomial(honest.softmax(1), 1, generator=generator)[:, 0]
    assert fit_temperature(honest * 3, labels) == pytest.approx(3.0, rel=0.03)
    told = calibrated(honest * 3, labels, "photos")
    assert told["loss_after"] < told["loss_before"]
    assert (told["images"], told["fitted_on"]) == (20000, "20,000 evaluation images of photos")


def test_without_mistakes_and_without_sense_the_limits_hold() -> None:
    labels = torch.tensor([0, 1])
    assert fit_temperature(torch.eye(2), labels) == pytest.approx(LOWEST)
    assert fit_temperature(-torch.eye(2), labels) == pytest.approx(HIGHEST)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The model of a run."""
    (tmp_path / "config.yaml").write_text("data: photos\nlimit_eval: null\neval_split: null\n")
    made, info = build("test_vit", classes=("a", "b"), weights="none", image_size=32)
    save_timm_folder(made, info, ("a", "b"), tmp_path / "model")
    return tmp_path / "model"


def test_it_is_stored_in_a_folder_that_timm_still_loads(model: Path) -> None:
    before = json.loads((model / "config.json").read_text())
    plain = timm.create_model(f"local-dir:{model}", pretrained=True).eval()
    store(model, {"temperature": 1.5, "fitted_on": "3 évaluation images"})
    found = open_finished(str(model))
    assert (found.temperature, found.fitted_on) == (1.5, "3 évaluation images")
    after = json.loads((model / "config.json").read_text())
    assert {key: value for key, value in after.items() if key != "calibration"} == before
    loaded = timm.create_model(f"local-dir:{model}", pretrained=True).eval()
    assert loaded.pretrained_cfg == plain.pretrained_cfg
    pictures = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(pictures), plain(pictures))
    assert sorted(path.name for path in model.iterdir()) == ["config.json", "model.safetensors"]


def test_only_the_model_of_a_run_on_its_own_images_takes_one(model: Path, tmp_path: Path) -> None:
    own = DataFlags(data="photos")
    assert place_for(tmp_path, own) == place_for(model, own) == model
    (tmp_path / "checkpoints/step-00000001").mkdir(parents=True)
    with pytest.raises(UserError, match="is a checkpoint"):
        place_for(tmp_path / "checkpoints/step-00000001", own)
    for other, flag in (
        (DataFlags(data="others"), "--data"),
        (DataFlags(data="photos", eval_split="x"), "--eval-split"),
    ):
        with pytest.raises(UserError, match=f"evaluation images of the run .*: leave {flag} out"):
            place_for(model, other)
    plain = tmp_path.parent / f"{tmp_path.name}-plain"
    plain.mkdir()
    assert place_for(plain, DataFlags(data="others")) == plain
