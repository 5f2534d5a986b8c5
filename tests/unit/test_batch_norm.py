"""BatchNorm over processes: layers change their class and nothing else, and foreign norms are refused."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from tuning.averaging.batch_norm import (
    SyncedBatchNorm,
    SyncedBatchNormAct,
    apart,
    norms,
    refuse_foreign_norms,
    synchronise,
)
from tuning.errors import UserError


def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_efficientnet", pretrained=False, num_classes=3).train()


def classes(net: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in net.modules()]


def test_layers_change_their_class_and_nothing_else() -> None:
    net = model()
    before, plain = classes(net), dict(copy.deepcopy(net).state_dict())
    parameters, buffers = dict(net.named_parameters()), dict(net.named_buffers())
    synchronise(net, True)
    assert sum(kind in (SyncedBatchNorm, SyncedBatchNormAct) for kind in classes(net)) == len(norms(net)) > 5
    assert all(p is parameters[name] for name, p in net.named_parameters())
    assert all(b is buffers[name] for name, b in net.named_buffers())
    assert list(net.state_dict()) == list(plain)
    with apart(net):
        assert classes(net) == before
    assert SyncedBatchNormAct in classes(net)
    synchronise(net, False)
    assert classes(net) == before
    assert not any("process_group" in vars(module) for module in net.modules())


def test_closed_layers_stay_what_they_are() -> None:
    net = model()
    net.bn1.eval()
    synchronise(net, True)
    assert type(net.bn1) is timm.layers.BatchNormAct2d
    net.bn1.train()
    net.bn2.eval()
    synchronise(net, True)
    assert type(net.bn1) is SyncedBatchNormAct
    assert type(net.bn2) is timm.layers.BatchNormAct2d


def test_alone_and_in_evaluation_they_compute_what_plain_ones_do() -> None:
    net, pictures = model(), torch.randn(4, 3, 32, 32)
    plain = copy.deepcopy(net)
    synchronise(net, True)
    net.eval()
    plain.eval()
    assert torch.equal(net(pictures), plain(pictures))
    twin = copy.deepcopy(net)
    assert type(twin.bn1) is SyncedBatchNormAct
    synchronise(twin, False)
    assert classes(twin) == classes(plain)


def test_other_running_statistics_are_refused() -> None:
    refuse_foreign_norms(model(), "--batch-norm sync")
    synchronised = model()
    synchronise(synchronised, True)
    refuse_foreign_norms(synchronised, "--batch-norm sync")
    foreign = nn.Sequential(timm.layers.EvoNorm2dB0(4))
    with pytest.raises(UserError, match="--batch-norm sync is for BatchNorm, but 0 of Sequential is EvoNorm2dB0"):
        refuse_foreign_norms(foreign, "--batch-norm sync")
