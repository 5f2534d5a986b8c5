"""Running statistics taken anew: the moments of all images, on the first layer by hand, below by torch's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from datasets import Dataset
from parquet_files import write_shards
from pictures import encode, noise
from torch import Tensor, nn

from tuning.averaging import norm_statistics
from tuning.averaging.norm_statistics import NormStatistics
from tuning.data.local_order import train_order
from tuning.data.sampling import SameBatches
from tuning.data.sources import Data, open_data
from tuning.data.transforms import Crop, Normalise
from tuning.flags import DataFlags
from tuning.models.build import ModelInfo
from tuning.sizes import BatchPlan

IMAGES, SIZE = 23, 32
INFO = ModelInfo("test", "test", "", SIZE, (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0)


def rows(broken: int | None = None) -> Dataset:
    pictures = [{"bytes": encode(noise(40, 40, seed=n)), "path": None} for n in range(IMAGES)]
    if broken is not None:
        pictures[broken]["bytes"] = b"no picture"
    return Dataset.from_dict({"image": pictures, "label": [n % 3 for n in range(IMAGES)]})


def inputs(data: Dataset) -> Tensor:
    from tuning.data.images import decode

    squares = [Crop(SIZE, "bilinear", 1.0).center(decode(row["image"]["bytes"])) for row in data]
    return Normalise(INFO.mean, INFO.std)(torch.stack(squares))


def data_of(table: Dataset) -> Data:
    data = object.__new__(Data)
    for name, value in {"train": table, "eval": table, "classes": ("a", "b", "c"), "folder": None}.items():
        object.__setattr__(data, name, value)
    return data


def network() -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model("test_efficientnet", pretrained=False, num_classes=3, drop_rate=0.5).train()


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers() if "running" in name or "num_batches" in name}


@pytest.fixture
def anew(fresh_accelerate: None) -> NormStatistics:
    return NormStatistics(Accelerator(cpu=True), data_of(rows()), INFO, 0, 0, IMAGES)


def test_the_first_layer_has_the_moments_of_all_images(anew: NormStatistics) -> None:
    model = network()
    with torch.no_grad():
        values = model.conv_stem(inputs(rows())).transpose(0, 1).flatten(1).double()
    with anew.estimated(model, ["bn1.running_mean", "bn1.running_var"], SIZE):
        assert torch.allclose(model.bn1.running_mean.double(), values.mean(1), atol=1e-6)
        assert torch.allclose(model.bn1.running_var.double(), values.var(1), rtol=1e-5)


def test_with_one_batch_all_layers_have_those_of_torch(anew: NormStatistics) -> None:
    """`torch.optim.swa_utils.update_bn` on the same pictures, dropout off."""
    model, reference = network(), network()
    names = [name for name in statistics(model) if "running" in name]
    for module in reference.modules():
        module.training = isinstance(module, nn.BatchNorm2d)
    torch.optim.swa_utils.update_bn([inputs(rows())], reference)
    with anew.estimated(model, names, SIZE):
        for name, value in statistics(reference).items():
            if "running" in name:
                assert torch.allclose(dict(model.named_buffers())[name], value, atol=1e-5, rtol=1e-4), name


def test_several_batches_are_pooled(anew: NormStatistics, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments about the common mean: not the mean of the batches' variances."""
    model, names = network(), ["bn1.running_mean", "bn1.running_var"]
    with anew.estimated(model, names, SIZE):
        whole = statistics(model)
    monkeypatch.setattr(norm_statistics, "BATCH", 5)
    with anew.estimated(model, names, SIZE):
        for name in names:
            assert torch.allclose(statistics(model)[name], whole[name], rtol=1e-5, atol=1e-6)


def test_afterwards_everything_is_what_it_was(anew: NormStatistics) -> None:
    model = network()
    model.bn2.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    names = ["bn1.running_mean", "bn1.running_var"]
    with anew.estimated(model, names, SIZE):
        moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
        assert moved == names, "others, and closed layers, serve as they are"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_without_names_nothing_is_read() -> None:
    class Nowhere:
        def __getattr__(self, name: str) -> None:
            raise AssertionError(f"{name} was looked at")

    anew = NormStatistics.__new__(NormStatistics)
    anew._data = Nowhere()  # type: ignore[assignment]
    with anew.estimated(network(), [], SIZE):
        pass


@pytest.mark.usefixtures("fresh_accelerate")
def test_pictures_that_can_t_be_read_are_left_out() -> None:
    broken = NormStatistics(Accelerator(cpu=True), data_of(rows(broken=4)), INFO, 0, 0, IMAGES)
    model, readable = network(), inputs(rows().select([n for n in range(IMAGES) if n != 4]))
    with torch.no_grad():
        values = model.conv_stem(readable).transpose(0, 1).flatten(1).double()
    with broken.estimated(model, ["bn1.running_mean", "bn1.running_var"], SIZE):
        assert torch.allclose(model.bn1.running_mean.double(), values.mean(1), atol=1e-6)


@pytest.mark.parametrize("images", [1, 2, 5, 6, 23, 64])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_batches_are_the_same_on_any_number_of_processes(images: int, processes: int) -> None:
    def batches(world: int) -> list[list[int]]:
        dealt = [list(SameBatches(images, 5, rank, world).micro_batches()) for rank in range(world)]
        assert len({len(mine) for mine in dealt}) == 1
        assert all(len(batch) >= min(images, 2) for mine in dealt for batch in mine)
        in_order = [batch for together in zip(*dealt, strict=True) for batch in together]
        return [[item.row for item in batch] for batch in in_order if batch[0].weight]

    assert batches(processes) == batches(1)
    assert np.concatenate(batches(1)).tolist() == list(range(images))


@pytest.mark.usefixtures("fresh_accelerate")
def test_streamed_pictures_are_those_of_the_same_order_read_once(tmp_path: Path) -> None:
    write_shards(tmp_path, {"train": [13, 20], "val": [5]}, row_group=5)
    flags = DataFlags(data=str(tmp_path), streaming=True)
    data = open_data(**vars(flags), seed=0)
    anew = NormStatistics(Accelerator(cpu=True), data, INFO, 0, 3, 12)
    order = train_order(33, 3, BatchPlan(12, 12, 1), 0, data.train.blocks)
    assert isinstance(anew._rows, Dataset)
    expected = [data.train[row] for row in order.rows(0, 0)]
    found = [anew._rows[number] for number in range(12)]
    assert [row["image"]["path"] for row in found] == [row["image"]["path"] for row in expected]
    assert [row["label"] for row in found] == [row["label"] for row in expected]
    assert [row["image"]["path"] for row in found] != sorted(row["image"]["path"] for row in found)
    with anew.estimated(model := network(), ["bn1.running_mean", "bn1.running_var"], SIZE):
        assert model.bn1.running_mean.abs().max() > 0
