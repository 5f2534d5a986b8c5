"""An export is judged on real pictures, and is there as a whole or not at all."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from pictures import encode, noise
from torch import Tensor, nn

from tuning.data.tables import picture_dataset
from tuning.errors import UserError
from tuning.exporting import bundle
from tuning.exporting.comparison import Comparison, compare
from tuning.exporting.formats import original
from tuning.exporting.latency import latencies
from tuning.judging.finished import open_finished
from tuning.models.build import ModelInfo, build, save_timm_folder

CLASSES = ("cat", "dog", "emu")


@pytest.fixture(scope="module")
def built() -> tuple[nn.Module, ModelInfo]:
    model, info = build("test_vit", classes=CLASSES, weights="none", image_size=32, seed=3)
    return model.eval(), info


@pytest.fixture
def rows(tmp_path: Path) -> Dataset:
    """40 pictures: of several sizes, some transparent, one broken."""
    paths = []
    for number in range(40):
        picture = noise(33 + 3 * number, 120 - 2 * number, number).convert("RGBA" if number % 5 == 0 else "RGB")
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(encode(picture))
    paths[7].write_bytes(b"no picture")
    return picture_dataset([str(path) for path in paths], [0] * 40, CLASSES)


def judged(built: tuple[nn.Module, ModelInfo], rows: Dataset, export: Any, uint8: bool = True) -> Comparison:
    settings = bundle.settings_for(built[1], CLASSES, 1.0, uint8)
    return compare(built[0], export, rows, torch.arange(40) % 3, built[1], uint8, settings)


@pytest.mark.parametrize("uint8", [True, False])
def test_an_equal_export_passes(built: tuple[nn.Module, ModelInfo], rows: Dataset, uint8: bool) -> None:
    sizes = []
    network = original(*built, uint8)

    def export(inputs: Tensor) -> Tensor:
        sizes.append(len(inputs))
        answer: Tensor = network(inputs)
        return answer

    found = judged(built, rows, export, uint8)
    assert (found.images, found.pillow_images, found.same_class) == (39, 39, 1.0)
    assert found.largest_logit_difference < 1e-5
    assert found.within(1e-3)
    assert found.export_top1 == found.original_top1 > 0
    assert {1, 3, 31} <= set(sizes)  # several sizes of a batch, and the single pictures that Pillow read
    assert 0 < found.pillow_largest_logit_difference < 0.02
    assert found.pillow_same_class > 0.95


@pytest.mark.parametrize(
    ("spoil", "difference"),
    [
        (lambda logits: logits + torch.tensor([0.0, 0.5, 0.0]), 0.5),
        (lambda logits: logits.flip(0), None),
        (lambda logits: logits * math.nan, math.nan),
    ],
    ids=["shifted", "other order", "not finite"],
)
def test_another_answer_does_not(
    built: tuple[nn.Module, ModelInfo], rows: Dataset, spoil: Any, difference: float | None
) -> None:
    network = original(*built, True)
    found = judged(built, rows, lambda inputs: spoil(network(inputs)))
    assert not found.within(1e-3)
    assert not found.within(0.01)
    if difference is not None:
        assert found.largest_logit_difference == pytest.approx(difference, abs=1e-4, nan_ok=True)


def test_unreadable_pictures_alone_are_refused(built: tuple[nn.Module, ModelInfo], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    rows = picture_dataset([str(broken)], [0], CLASSES)
    settings = bundle.settings_for(built[1], CLASSES, 1.0, True)
    with pytest.raises(UserError, match="none of the 1 pictures"):
        compare(*(built[0], original(*built, True), rows, torch.zeros(1).long(), built[1], True, settings))


def test_networks_are_timed_in_turns() -> None:
    calls: list[tuple[str, int]] = []

    def network(name: str) -> Any:
        return lambda inputs: calls.append((name, len(inputs)))

    table = latencies({"torch": network("torch"), "onnx": network("onnx")}, torch.zeros(8, 3, 4, 4), 5, batches=(1, 8))
    assert [(row["batch"], row["repeats"]) for row in table] == [(1, 5), (8, 5)]
    assert all(row["torch"] >= 0 and row["onnx"] >= 0 for row in table)
    assert [batch for _, batch in calls] == [1] * 12 + [8] * 12
    assert all({calls[n][0], calls[n + 1][0]} == {"torch", "onnx"} for n in range(0, 24, 2))


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail(output: Path) -> None:
        with bundle.appearing(output) as folder:
            (folder / "half").touch()
            raise RuntimeError

    for output in (tmp_path / "new", tmp_path / "two" / "levels" / "down"):
        with pytest.raises(RuntimeError):
            fail(output)
    with bundle.appearing(tmp_path / "dry", keep=False) as folder:
        (folder / "whole").touch()
    assert list(tmp_path.iterdir()) == []


def test_all_of_it_appears_at_once(tmp_path: Path) -> None:
    output = tmp_path / "exports" / "onnx"
    left = output.with_name(".onnx.partial")
    left.mkdir(parents=True)
    (left / "of a killed export").touch()
    with bundle.appearing(output) as folder:
        (folder / "model.onnx").touch()
        assert not output.exists()
    assert [path.name for path in output.iterdir()] == ["model.onnx"]
    assert [path.name for path in output.parent.iterdir()] == ["onnx"]


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").touch()
    with pytest.raises(UserError, match="exists and is not empty"), bundle.appearing(tmp_path / "full"):
        pass
    with pytest.raises(UserError, match="is a file"), bundle.appearing(tmp_path / "full" / "kept"):
        pass
    with pytest.raises(UserError, match="can't be written"), bundle.appearing(tmp_path / "full" / "kept" / "in"):
        pass
    (tmp_path / "empty").mkdir()
    with bundle.appearing(tmp_path / "empty") as folder:
        (folder / "new").touch()
    assert (tmp_path / "empty" / "new").exists()


def test_a_timm_export_carries_the_temperature(built: tuple[nn.Module, ModelInfo], tmp_path: Path) -> None:
    model, info = built
    save_timm_folder(model, info, CLASSES, tmp_path)
    settings = bundle.settings_for(info, CLASSES, 1.7, False, "40 images of photos")
    bundle.write_companions("timm", settings, tmp_path)
    found = open_finished(str(tmp_path))
    assert (found.temperature, found.fitted_on) == (1.7, "40 images of photos")
    assert json.loads((tmp_path / "preprocessing.json").read_text())["temperature"] == 1.7


def test_where_an_export_goes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert bundle.output_folder("out", run, run, "onnx") == Path("out")
    assert bundle.output_folder(None, run, run, "onnx") == run / "export" / "onnx"
    assert bundle.output_folder(None, run / "model", run, "timm") == run / "export" / "timm"
    checkpoint = run / "checkpoints" / "step-00000007"
    assert bundle.output_folder(None, checkpoint, run, "onnx") == run / "export" / "step-00000007-onnx"
    with pytest.raises(UserError, match="give --output"):
        bundle.output_folder(None, tmp_path, None, "onnx")


@pytest.mark.parametrize("kind", ["onnx", "exported-program", "timm"])
def test_the_example_has_about_ten_lines(kind: Any, built: tuple[nn.Module, ModelInfo], tmp_path: Path) -> None:
    bundle.write_companions(kind, bundle.settings_for(built[1], CLASSES, 1.0, True), tmp_path)
    lines = (tmp_path / "example.py").read_text().splitlines()
    assert len([line for line in lines[1:] if line.strip()]) in (9, 10)
