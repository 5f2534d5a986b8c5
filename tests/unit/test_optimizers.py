"""Optimizers by name step, keep the keys of our groups, and use the fused implementation where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry
from torch import nn

from tuning.errors import UserError
from tuning.groups import param_groups, set_lr
from tuning.optimizers import check_optimizer, create_optimizer


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = timm.create_model("test_vit", num_classes=3, img_size=32)
    return made


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    return param_groups(model, lr=1e-2, layer_decay=0.5, weight_decay=0.1)


def backward(model: nn.Module) -> None:
    model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))).square().sum().backward()


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "AdamW"])
def test_fused_where_torch_has_it(model: nn.Module, name: str) -> None:
    optimizer = create_optimizer(name, groups_of(model), 0.9)
    assert all(group["fused"] for group in optimizer.param_groups)


def test_sgd_has_nesterov_momentum(model: nn.Module) -> None:
    optimizer = create_optimizer("sgd", groups_of(model), 0.8)
    assert {(group["momentum"], group["nesterov"]) for group in optimizer.param_groups} == {(0.8, True)}


def test_sgd_without_momentum(model: nn.Module) -> None:
    optimizer = create_optimizer("sgd", groups_of(model), 0.0)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.0}


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lamb", "lion", "adan", "muon", "rmsproptf", "nadamw"])
def test_a_step_moves_every_open_layer_and_keeps_the_groups(model: nn.Module, name: str) -> None:
    groups = groups_of(model)
    optimizer = create_optimizer(name, groups, 0.9)
    closed = next(iter(model.parameters()))
    closed.requires_grad_(False)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    for _ in range(2):
        backward(model)
        set_lr(optimizer.param_groups, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    kept = ("name", "peak_lr", "weight_decay", "depth")
    assert [[g[key] for key in kept] for g in optimizer.param_groups] == [[g[key] for key in kept] for g in groups]
    assert [g["lr"] for g in optimizer.param_groups] == [g["peak_lr"] * 0.5 for g in groups]
    for key, parameter in model.named_parameters():
        assert parameter.isfinite().all()
        assert torch.equal(parameter, before[key]) == (parameter is closed), key
    assert not optimizer.state.get(closed)


def test_each_group_moves_at_its_own_rate(model: nn.Module) -> None:
    """SGD moves by exactly lr * (gradient + decay * weight) in its first step."""
    optimizer = create_optimizer("momentum", groups_of(model), 0.9)
    backward(model)
    expected = {
        id(p): p.detach() - group["peak_lr"] * (p.grad + group["weight_decay"] * p.detach())
        for group in optimizer.param_groups
        for p in group["params"]
    }
    optimizer.step()
    assert len({group["lr"] for group in optimizer.param_groups}) > 2
    assert all(torch.allclose(p, expected[id(p)], atol=1e-7) for p in model.parameters())


def test_the_callers_groups_are_left_alone(model: nn.Module) -> None:
    groups = groups_of(model)
    optimizer = create_optimizer("adamw", groups, 0.9)
    optimizer.param_groups[0]["lr"] = 7.0
    assert all(set(group) == {"params", "name", "peak_lr", "lr", "weight_decay", "depth"} for group in groups)
    assert groups[0]["lr"] != 7.0


@pytest.mark.parametrize(("typed", "meant"), [("adamww", "adamw"), ("sdg", "sgd"), ("lio", "lion")])
def test_an_unknown_name_suggests_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"--optimizer '{typed}' is not known to timm.*'{meant}'"):
        check_optimizer(typed)


class Signs(torch.optim.Optimizer):
    """An optimizer that timm doesn't have: steps as large as the learning rate."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                parameter.sub_(group["lr"] * parameter.grad.sign())


def test_one_that_is_registered_with_timm_needs_nothing_more(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_registry, "_optimizers", {**default_registry._optimizers})
    default_registry.register(OptimInfo("signs", Signs))
    check_optimizer("signs")
    optimizer = create_optimizer("signs", groups_of(model), 0.9)
    before = model.head.weight.detach().clone()
    backward(model)
    optimizer.step()
    moved = (model.head.weight - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-2), atol=1e-5, rtol=0)


def test_an_optimizer_whose_package_is_missing_is_refused() -> None:
    """`bnbadam` needs bitsandbytes, and a GPU with it."""
    with pytest.raises(UserError, match=r"--optimizer 'bnbadam' .*"):
        check_optimizer("bnbadam")
