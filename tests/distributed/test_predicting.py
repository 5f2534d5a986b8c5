"""Logits of every picture once, in the order of the rows, for any number of processes and any remainder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from pictures import write_classes
from PIL import Image
from ranks import run_ranks
from timm.data import create_transform, resolve_data_config

from tuning.data.tables import picture_dataset
from tuning.errors import UserError
from tuning.judging import predicting
from tuning.models.build import build

IMAGES, BROKEN = 23, (0, 11, 22)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = write_classes(tmp_path_factory.mktemp("photos"), {"cat": 12, "dog": 11}, ".png")
    return sorted(root.glob("*/*"))


@pytest.fixture(scope="module")
def damaged(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same pictures, the first, the last and one between them no pictures: the filler is broken too."""
    folder, copies = tmp_path_factory.mktemp("damaged"), []
    for number, file in enumerate(files):
        copies.append(folder / f"{number:02d}.png")
        copies[-1].write_bytes(b"no picture" if number in BROKEN else file.read_bytes())
    return copies


def predict(files: list[Path], batches: int) -> predicting.Predictions:
    accelerator = Accelerator()
    model, info = build("test_efficientnet", classes=2, weights="none", image_size=32)
    table = picture_dataset([str(f) for f in files], [n % 2 for n in range(len(files))], ("a", "b"))
    predicting.BATCHES = batches
    return predicting.predict_all(accelerator, model, info, table, workers=0, batch_size=3)


def assert_oracle(found: predicting.Predictions, files: list[Path], rows: list[int]) -> None:
    """timm's own transform and a plain loop."""
    model = build("test_efficientnet", classes=2, weights="none", image_size=32)[0].eval()
    options = {**resolve_data_config({}, model=model), "input_size": (3, 32, 32)}
    transform = create_transform(**options, is_training=False)
    with torch.inference_mode():
        logits = model(torch.stack([transform(Image.open(files[row]).convert("RGB")) for row in rows]))
    torch.testing.assert_close(found.logits, logits, atol=2e-2, rtol=0)
    assert (found.logits.dtype, found.rows.tolist(), found.labels.tolist()) == (
        torch.float32,
        rows,
        [row % 2 for row in rows],
    )


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batches", [1, 2, 100])
def test_every_picture_once_in_order(files: list[Path], world_size: int, batches: int) -> None:
    for found in run_ranks(world_size, predict, files, batches):
        assert_oracle(found, files, list(range(IMAGES)))
        assert found.unreadable == ()


@pytest.mark.parametrize("world_size", [1, 2])
def test_unreadable_pictures_are_left_out_and_named_once(
    files: list[Path], damaged: list[Path], world_size: int
) -> None:
    for found in run_ranks(world_size, predict, damaged, 1):
        assert_oracle(found, files, [row for row in range(IMAGES) if row not in BROKEN])
        assert [broken.row for broken in found.unreadable] == list(BROKEN)
        assert [broken.name for broken in found.unreadable] == [str(damaged[row]) for row in BROKEN]


def test_nothing_readable_is_refused(damaged: list[Path]) -> None:
    with pytest.raises(UserError, match=r"none of the 1 pictures could be read; the first: .*00\.png"):
        predict(damaged[:1], 1)
