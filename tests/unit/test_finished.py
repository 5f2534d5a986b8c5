"""Opening what was trained: runs, their checkpoints, timm folders; and one message for everything else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from tuning.errors import UserError
from tuning.judging.finished import open_finished
from tuning.models.build import build, save_timm_folder
from tuning.progress import Progress
from tuning.safety.manifest import digest, sealed

CLASSES = ("cat", "dog", "emu")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run with one checkpoint, its three sets of weights all different."""
    run = tmp_path / "run"
    model, info = build("test_vit", classes=CLASSES, weights="none", image_size=32, crop_pct=0.8, seed=1)
    save_timm_folder(model, info, CLASSES, run / "model")
    (run / "config.yaml").write_text("data: photos\nseed: 7\nmodel: test_vit\nimage_size: 32\n")
    (run / "summary.json").write_text('{"status": "done"}')
    checkpoint = run / "checkpoints" / "step-00000005"
    checkpoint.mkdir(parents=True)
    for seed, name in ((2, "model.safetensors"), (3, "ema.safetensors")):
        state = build("test_vit", classes=CLASSES, weights="none", image_size=32, seed=seed)[0].state_dict()
        save_file(state, checkpoint / name)
    (checkpoint / "optimizer.pt").write_bytes(b"-")
    seal(checkpoint)
    return run


def seal(checkpoint: Path, stage: int = 0) -> None:
    (checkpoint / "manifest.json").unlink(missing_ok=True)
    files = {p.name: {"bytes": p.stat().st_size, "sha256": digest(p)} for p in checkpoint.iterdir()}
    progress = Progress(step=5, stage=stage).to_json()
    (checkpoint / "manifest.json").write_text(
        sealed({"format": 1, "progress": progress, "world_size": 1, "files": files})
    )


def change(folder: Path, **values: Any) -> None:
    """Replace keys of a config.json; None removes one."""
    content = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def holds(model: torch.nn.Module, file: Path) -> bool:
    state = load_file(file)
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_run_gives_its_model_and_its_flags(run: Path) -> None:
    found = open_finished(str(run))
    assert holds(found.model, run / "model/model.safetensors")
    assert not any(module.training for module in found.model.modules())
    assert (found.classes, found.run, found.temperature) == (CLASSES, run, 1.0)
    assert (found.config["data"], found.config["seed"]) == ("photos", 7)
    assert (found.info.input_size, found.info.crop_pct) == (32, 0.8)
    pictures = torch.randn(2, 3, 32, 32)
    own = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True).eval()
    torch.testing.assert_close(found.model(pictures), own(pictures))


def test_the_model_of_a_run_knows_the_run_and_a_copy_elsewhere_does_not(run: Path, tmp_path: Path) -> None:
    assert open_finished(str(run / "model")).config["data"] == "photos"
    shutil.copytree(run / "model", tmp_path / "copy")
    found = open_finished(str(tmp_path / "copy"))
    assert (found.run, found.config, found.classes) == (None, {}, CLASSES)


def test_a_checkpoint_gives_its_averaged_weights_or_else_its_own_and_says_which(run: Path) -> None:
    checkpoint = run / "checkpoints/step-00000005"
    found = open_finished(str(checkpoint))
    assert holds(found.model, checkpoint / "ema.safetensors")
    assert found.info.weights == f"the averaged weights (EMA) of {checkpoint}"
    (checkpoint / "ema.safetensors").unlink()
    seal(checkpoint)
    found = open_finished(str(checkpoint))
    assert holds(found.model, checkpoint / "model.safetensors")
    assert found.info.weights == f"the weights of {checkpoint}"
    assert (found.run, found.classes) == (run.resolve(), CLASSES)


def test_a_checkpoint_sees_the_pixels_of_the_last_stage(run: Path) -> None:
    lines = "model: test_resnet\nstages:\n- {open: head, image-size: 48}\n- {open: all}\n"
    (run / "config.yaml").write_text(lines)
    checkpoint = run / "checkpoints/step-00000005"
    assert open_finished(str(checkpoint)).info.input_size == 160  # of test_resnet
    (run / "config.yaml").write_text(f"image_size: 64\n{lines}")
    assert open_finished(str(checkpoint)).info.input_size == 64
    (run / "config.yaml").write_text("model: test_resnet\nstages:\n- {open: head}\n- {open: all, image-size: 48}\n")
    assert open_finished(str(checkpoint)).info.input_size == 48


def test_a_stored_temperature_comes_with_the_model_and_timm_still_loads_it(run: Path) -> None:
    change(run / "model", calibration={"temperature": 1.25})
    assert open_finished(str(run)).temperature == 1.25
    timm.create_model(f"local-dir:{run / 'model'}", pretrained=True)
    for wrong in (-1, "warm", None):
        change(run / "model", calibration={"temperature": wrong})
        with pytest.raises(UserError, match="the temperature"):
            open_finished(str(run))


def test_runs_without_an_end_or_a_model_are_refused(run: Path) -> None:
    (run / "summary.json").write_text('{"status": "preempted"}')
    with pytest.raises(UserError, match=r"is not finished\. .*--resume auto, or take .*run/model"):
        open_finished(str(run))
    assert open_finished(str(run / "model")).classes == CLASSES
    (run / "model/config.json").unlink()
    with pytest.raises(UserError, match="holds no model"):
        open_finished(str(run))
    with pytest.raises(UserError, match=r"has no .*config\.json, which names the classes"):
        open_finished(str(run / "checkpoints/step-00000005"))


def test_what_is_none_of_these_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither a run .* nor a checkpoint .* nor a timm folder"):
        open_finished(str(tmp_path))
    with pytest.raises(UserError, match="there is no such folder"):
        open_finished(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="is a file"):
        open_finished(str(run / "model/model.safetensors"))
    (run / "checkpoints/step-00000005/model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match=r"model\.safetensors is missing or damaged"):
        open_finished(str(run / "checkpoints/step-00000005"))


def test_a_config_without_class_names_is_refused(run: Path) -> None:
    change(run / "model", label_names=None)
    with pytest.raises(UserError, match=r'does not name the classes .*"label_names"'):
        open_finished(str(run))
    change(run / "model", label_names=["cat", "dog"])
    with pytest.raises(UserError, match="names 2 classes for 3 outputs"):
        open_finished(str(run))
    (run / "model/config.json").write_text("{")
    with pytest.raises(UserError, match="can't be read as JSON"):
        open_finished(str(run))
