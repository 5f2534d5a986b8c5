"""Initialisation schemes: distributions, orthogonality, and independence from the global random state."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

from tuning.depth import head_modules
from tuning.errors import UserError
from tuning.models.initialisation import init_head, initialise, orthogonal


def test_orthogonal_matrices_are_orthonormal() -> None:
    generator = torch.Generator().manual_seed(3)
    for rows, columns in ((5, 40), (40, 5), (16, 16), (1, 9), (9, 1)):
        weight = orthogonal(rows, columns, 3, generator)
        assert weight.shape == (3, rows, columns)
        small = weight @ weight.mT if rows <= columns else weight.mT @ weight
        torch.testing.assert_close(small, torch.eye(min(rows, columns)).expand_as(small), atol=1e-5, rtol=0)


def test_orthogonal_layers_of_a_network() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 3, groups=2), nn.Linear(10, 4)
    )
    initialise(model, "orthogonal", seed=1)
    full = model[0].weight.flatten(1)
    torch.testing.assert_close(full @ full.T, torch.eye(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(model[1].weight.flatten(1).norm(dim=1), torch.ones(8))
    for half in model[2].weight.flatten(1).chunk(2):
        torch.testing.assert_close(half @ half.T, torch.eye(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(model[3].weight @ model[3].weight.T, torch.eye(4), atol=1e-5, rtol=0)
    assert all(not layer.bias.any() for layer in model)


@pytest.mark.parametrize(
    ("layer", "fan_in", "fan_out"),
    [
        (nn.Linear(300, 200), 300, 200),
        (nn.Conv2d(40, 60, 5), 1000, 1500),
        (nn.Conv2d(2000, 2000, 5, groups=2000), 25, 25),
        (nn.Conv2d(400, 800, 3, groups=100), 36, 72),
        (nn.ConvTranspose2d(60, 40, 5), 1500, 1000),
    ],
)
def test_kaiming_and_xavier_spread_follow_the_fans(layer: nn.Module, fan_in: int, fan_out: int) -> None:
    initialise(layer, "kaiming", seed=0)
    assert float(layer.weight.detach().std()) == pytest.approx(math.sqrt(2 / fan_in), rel=0.03)
    initialise(layer, "xavier", seed=0)
    assert float(layer.weight.detach().std()) == pytest.approx(math.sqrt(2 / (fan_in + fan_out)), rel=0.03)
    assert float(layer.weight.detach().abs().max()) <= math.sqrt(6 / (fan_in + fan_out))


def test_whole_network_keeps_norms_and_still_sends_a_signal() -> None:
    model = timm.create_model("test_efficientnet", num_classes=7)
    for scheme in ("kaiming", "xavier", "orthogonal"):
        initialise(model, scheme, seed=5)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms
        assert all(bool((m.weight == 1).all()) and not m.bias.any() for m in norms)
        logits = model(torch.randn(4, 3, 32, 32))
        logits.square().sum().backward()
        assert torch.isfinite(logits).all()
        assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.ndim > 1)


def test_values_depend_on_the_seed_only_and_leave_the_global_generator_alone() -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    initialise(model, "kaiming", seed=4)
    first = model.conv1[0].weight.clone() if isinstance(model.conv1, nn.Sequential) else model.conv1.weight.clone()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    initialise(model, "kaiming", seed=4)
    again = model.conv1[0].weight if isinstance(model.conv1, nn.Sequential) else model.conv1.weight
    assert torch.equal(again, first)
    initialise(model, "kaiming", seed=5)
    assert not torch.equal(again, first)


def test_head_schemes_touch_the_head_alone() -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1, num_classes=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    init_head(model, "default", seed=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    init_head(model, "zero", seed=1)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head_dist.weight"}
    assert not model.head.weight.any()
    assert not model.head_dist.weight.any()
    init_head(model, "orthogonal", seed=1)
    torch.testing.assert_close(model.head.weight @ model.head.weight.T, torch.eye(4), atol=1e-5, rtol=0)
    assert not torch.equal(model.head.weight, model.head_dist.weight)


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_convnext", "test_resnet"])
@pytest.mark.parametrize("zeroed", ["network", "head"])
def test_a_network_of_zeros_never_sees_the_pictures_a_head_of_zeros_does(name: str, zeroed: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **({"img_size": 32} if name == "test_vit" else {}))
    for root in [model] if zeroed == "network" else head_modules(model).values():
        for module in root.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.zeros_(module.weight)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    logits = model.eval()(images).detach()
    apart = float((logits - logits[0]).abs().max())
    assert apart < 1e-6 if zeroed == "network" else apart > 1e-4


def test_refusals_name_the_remedy() -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    with pytest.raises(UserError, match="--head-init zero"):
        initialise(model, "zero")
    with pytest.raises(UserError, match="Perhaps you meant 'kaiming'"):
        init_head(model, "kaimin")
