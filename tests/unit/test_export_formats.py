"""Formats of an export: what is written is what was trained, for every batch size; what can't be is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from tuning.data.transforms import Normalise
from tuning.errors import UserError
from tuning.exporting import formats
from tuning.exporting.formats import Format, check_packages, input_type, inputs_for, load, write
from tuning.models.build import ModelInfo, build

CLASSES = ("cat", "dog", "emu")
TOLERANCE = 1e-4
KINDS: tuple[Format, ...] = get_args(Format)


def assert_equal_answers(name: str, size: int, kind: Format, uint8: bool, folder: Path) -> None:
    model, info = build(name, classes=CLASSES, weights="none", image_size=size, seed=3)
    model.eval()
    write(kind, model, info, CLASSES, folder, uint8)
    assert (folder / formats.FILES[kind]).is_file()
    network = load(kind, folder, threads=1)
    for batch in (1, 2, 5):
        images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
        with torch.no_grad():
            wanted = model(Normalise(info.mean, info.std)(images))
            got = network(inputs_for(images, info, uint8))
        assert got.shape == (batch, len(CLASSES))
        torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "kind", "uint8"),
    [
        ("test_efficientnet", "onnx", False),
        ("test_vit", "exported-program", True),
        ("test_vit", "timm", False),
        ("test_efficientnet", "timm", False),
    ],
)
def test_answers_are_the_original_s(name: str, kind: Format, uint8: bool, tmp_path: Path) -> None:
    assert_equal_answers(name, 32, kind, uint8, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "exported-program"])
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("test_vit", 32),
        ("test_efficientnet", 32),
        ("resnet18", 64),
        ("tf_efficientnet_lite0", 64),
        ("mobilenetv3_small_050", 64),
        ("regnety_002", 64),
        ("test_convnext", 32),
        ("convnext_atto", 64),
        ("vit_tiny_patch16_224", 224),
        ("deit_tiny_patch16_224", 224),
        ("swin_tiny_patch4_window7_224", 224),
    ],
)
def test_usual_families(name: str, size: int, kind: Format, tmp_path: Path) -> None:
    assert_equal_answers(name, size, kind, True, tmp_path)


def test_a_model_left_in_training_mode_is_exported_for_use(tmp_path: Path) -> None:
    model, info = build("test_efficientnet", classes=CLASSES, weights="none", image_size=32, drop_rate=0.9)
    model.train()
    write("exported-program", model, info, CLASSES, tmp_path, True)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        wanted = model.eval()(Normalise(info.mean, info.std)(images))
    torch.testing.assert_close(load("exported-program", tmp_path, 1)(images), wanted, rtol=0, atol=TOLERANCE)


class Undecided(nn.Module):
    """Its way through the network depends on the pixels."""

    def forward(self, images: Tensor) -> Tensor:
        means = images.float().mean((2, 3))
        return means * 2 if means.sum() > 0 else means


class Foreign(nn.Module):
    """Computes what ONNX has no operator for."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.linalg.eigvals(images.float().mean(1)).abs()[:, :3]


INFO = ModelInfo("mine", "mine", "", 32, (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)


@pytest.mark.parametrize("kind", ["onnx", "exported-program"])
def test_what_depends_on_the_pixels_is_refused_with_the_reason(kind: Format, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        write(kind, Undecided(), INFO, CLASSES, tmp_path, True)
    assert f"--format {kind}: mine can't be expressed in it" in str(raised.value)
    assert "data-dependent" in str(raised.value)
    assert "Choose --format timm" in str(raised.value)


def test_what_onnx_has_no_operator_for_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"can't be expressed in it .*eig.*Choose --format timm or exported-program"):
        write("onnx", Foreign(), INFO, CLASSES, tmp_path, True)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(formats, "find_spec", lambda name: None if "onnx" in name else find(name))
    with pytest.raises(UserError, match=r"onnx, onnxscript, onnxruntime, .*fine-tuning\[onnx\]"):
        check_packages("onnx")
    check_packages("timm")
    check_packages("exported-program")


def test_the_input_of_a_timm_folder_is_normalised_outside() -> None:
    assert [input_type(kind, None) for kind in ("timm", "onnx", "exported-program")] == ["float", "uint8", "uint8"]
    assert input_type("onnx", "float") == "float"
    with pytest.raises(UserError, match="--export-input uint8: a timm folder"):
        input_type("timm", "uint8")
