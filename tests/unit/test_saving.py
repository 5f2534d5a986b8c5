"""Checkpoints: complete or absent, staged, pruned with care, and given up without harm."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from plain_stages import plain_stage
from torch import nn

from tuning.entering import Entered, enter_stage
from tuning.errors import UserError
from tuning.plan import make_plan
from tuning.progress import Progress
from tuning.safety import checkpoint, saving
from tuning.safety.checkpoint import find, forget_after, load
from tuning.safety.manifest import digest, read, sealed
from tuning.safety.saving import Saver

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

STAGE = plain_stage(optimizer="adamw", momentum=0.9, weight_decay=0.1, batch_norm="train")


def entered_stage(accelerator: Accelerator) -> Entered:
    """A small model with BatchNorm that has made one step."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=3)
    (planned,) = make_plan([STAGE], model, train_images=8, world_size=1, micro_batch=4, image_size=32)
    entered = enter_stage(accelerator, model, planned)
    step(entered)
    return entered


def step(entered: Entered) -> None:
    entered.wrapped(torch.randn(4, 3, 32, 32)).square().mean().backward()
    entered.optimizer.step()
    entered.optimizer.zero_grad()


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def saved_at(run: Path, steps: list[int], keep: int, best: dict[int, int] | None = None) -> list[str]:
    accelerator = Accelerator()
    entered = entered_stage(accelerator)
    with Saver(accelerator, run, keep, {}) as saver:
        for number in steps:
            saver.save(entered, Progress(step=number, best_step=(best or {}).get(number)))
    return names(run)


def test_round_trip(tmp_path: Path) -> None:
    accelerator = Accelerator()
    entered = entered_stage(accelerator)
    with Saver(accelerator, tmp_path, 2, {"versions": {"torch": "2"}}) as saver:
        saver.save(entered, Progress(step=7, due=True))
    found, damaged = find(tmp_path, "auto")
    assert found is not None
    assert (found.progress.step, found.progress.due, found.world_size, damaged) == (7, True, 1, [])
    assert found.facts["versions"] == {"torch": "2"}
    other = entered_stage(accelerator)
    step(other)
    load(accelerator, found, other)
    for a, b in zip(entered.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    mine, theirs = entered.optimizer.state_dict()["state"], other.optimizer.state_dict()["state"]
    assert all(torch.equal(mine[n][key], theirs[n][key]) for n in mine for key in mine[n])


def test_what_is_staged_is_this_step_though_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator()
    entered, gate, write = entered_stage(accelerator), threading.Event(), saving.save_file

    def wait_and_write(*args: object) -> None:
        assert gate.wait(10)
        write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(saving, "save_file", wait_and_write)
    before = {name: tensor.clone() for name, tensor in entered.model.state_dict().items()}
    moments = [slot["exp_avg"].clone() for slot in entered.optimizer.state_dict()["state"].values()]
    with Saver(accelerator, tmp_path, 2, {}) as saver:
        saver.save(entered, Progress(step=1))
        step(entered)
        gate.set()
    found, _ = find(tmp_path, "auto")
    assert found is not None
    load(accelerator, found, entered)
    assert all(torch.equal(before[name], tensor) for name, tensor in entered.model.state_dict().items())
    loaded = [slot["exp_avg"] for slot in entered.optimizer.state_dict()["state"].values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, loaded, strict=True))


def test_newest_and_best_are_kept(tmp_path: Path) -> None:
    assert saved_at(tmp_path / "a", [1, 2, 3, 4], keep=2) == ["step-00000003", "step-00000004"]
    kept = saved_at(tmp_path / "b", [1, 2, 3, 4], keep=1, best={2: 1, 3: 1, 4: 1})
    assert kept == ["step-00000001", "step-00000004"]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    assert saved_at(tmp_path, [3, 3], keep=2) == ["step-00000003"]
    assert read(tmp_path / "checkpoints/step-00000003").progress.step == 3


@pytest.mark.parametrize("moment", ["save_file", "torch.save", "digest", "fsync", "rename"])
def test_a_save_that_fails_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], moment: str
) -> None:
    accelerator = Accelerator()
    entered = entered_stage(accelerator)

    def fail(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    with Saver(accelerator, tmp_path, 1, {}, stop_on_error=True) as saver:
        saver.save(entered, Progress(step=1))
        saver.wait()
        assert not saver.must_stop()
        with monkeypatch.context() as patch:
            if moment == "torch.save":
                patch.setattr(torch, "save", fail)
            elif moment == "fsync":
                patch.setattr(os, "fsync", fail)
            elif moment == "rename":
                patch.setattr(Path, "rename", fail)
            else:
                patch.setattr(saving, moment, fail)
            saver.save(entered, Progress(step=2))
            saver.wait()
        assert saver.must_stop()
        assert names(tmp_path) == ["step-00000001"]
        assert read(tmp_path / "checkpoints/step-00000001").progress.step == 1
        saver.save(entered, Progress(step=3))
        saver.wait()
        assert not saver.must_stop()
    told = capfd.readouterr().err
    assert told.count("warning:") == 1
    assert "step-00000002 could not be written (No space left on device" in told
    assert names(tmp_path) == ["step-00000003"]


def test_a_disk_that_really_refuses(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A limit on the size of files, as a quota has: safetensors and torch report it each in their own way."""
    import resource

    accelerator = Accelerator()
    entered = entered_stage(accelerator)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Saver(accelerator, tmp_path, 1, {}) as saver:
        saver.save(entered, Progress(step=1))
        saver.wait()
        try:
            for size in (100_000, 450_000):  # in the weights, in the optimizer's file
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
                saver.save(entered, Progress(step=2))
                saver.wait()
                assert saver.failure
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Earlier checkpoints are intact" in capfd.readouterr().err
    assert names(tmp_path) == ["step-00000001"]
    assert read(tmp_path / "checkpoints/step-00000001")


def test_damaged_checkpoints_are_named_and_passed_over(tmp_path: Path) -> None:
    saved_at(tmp_path, [1, 2, 3], keep=3)
    folder = tmp_path / "checkpoints"
    (folder / "step-00000003/manifest.json").unlink()
    weights = folder / "step-00000002/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (folder / "step-of-mine").mkdir()
    found, damaged = find(tmp_path, "auto")
    assert found is not None
    assert found.progress.step == 1
    assert ["step-00000003" in damaged[0], "manifest.json" in damaged[0]] == [True, True]
    assert ["step-00000002" in damaged[1], "model.safetensors" in damaged[1]] == [True, True]
    with pytest.raises(UserError, match=r"model\.safetensors is missing or damaged"):
        find(tmp_path, str(folder / "step-00000002"))
    forget_after(tmp_path, 1)
    assert names(tmp_path) == ["step-00000001", "step-of-mine"]


def test_a_manifest_that_leaves_a_file_out_is_damaged(tmp_path: Path) -> None:
    saved_at(tmp_path, [1], keep=1)
    path = tmp_path / "checkpoints/step-00000001/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["optimizer.pt"], manifest["sha256"]
    path.write_text(sealed(manifest))
    with pytest.raises(UserError, match=r"optimizer\.pt is missing or damaged"):
        read(path.parent)


def test_what_a_kill_left_is_cleared_away(tmp_path: Path) -> None:
    saved_at(tmp_path, [1], keep=1)
    for name in (".step-00000002.partial", ".step-00000000.removed"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "model.safetensors").write_bytes(b"half")
    found, damaged = find(tmp_path, "auto")
    assert found is not None
    assert damaged == []
    forget_after(tmp_path, 1)
    assert names(tmp_path) == ["step-00000001"]


def test_another_config_is_refused(tmp_path: Path) -> None:
    accelerator = Accelerator()
    with Saver(accelerator, tmp_path, 1, {"config_sha256": "a"}) as saver:
        saver.save(entered_stage(accelerator), Progress(step=1))
    found, _ = find(tmp_path, "auto")
    checkpoint.refuse_other_config(found, {"config_sha256": "a"})
    checkpoint.refuse_other_config(None, {"config_sha256": "b"})
    with pytest.raises(UserError, match="made under other flags"):
        checkpoint.refuse_other_config(found, {"config_sha256": "b"})


def test_no_code_is_run_from_a_checkpoint(tmp_path: Path) -> None:
    """An optimizer.pt with a pickled call in it, its manifest made to fit."""
    import pickle

    saved_at(tmp_path, [1], keep=1)
    folder = tmp_path / "checkpoints/step-00000001"

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"optimizer": Evil(), "scaler": None, "statistics": {}}, folder / "optimizer.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    file = folder / "optimizer.pt"
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": digest(file)}
    (folder / "manifest.json").write_text(sealed(manifest))
    accelerator = Accelerator()
    with pytest.raises(pickle.UnpicklingError):
        load(accelerator, read(folder), entered_stage(accelerator))
    assert not (tmp_path / "evil").exists()


def test_modules_are_restored_in_place(tmp_path: Path) -> None:
    """Loading must not exchange the buffers and parameters that the optimizer and DDP hold."""
    accelerator = Accelerator()
    entered = entered_stage(accelerator)
    with Saver(accelerator, tmp_path, 1, {}) as saver:
        saver.save(entered, Progress(step=1))
    found, _ = find(tmp_path, "auto")
    assert found is not None
    held = [id(p) for group in entered.optimizer.param_groups for p in group["params"]]
    load(accelerator, found, entered)
    assert sorted(held) == sorted(id(p) for p in entered.model.parameters())
    assert isinstance(entered.model, nn.Module)
