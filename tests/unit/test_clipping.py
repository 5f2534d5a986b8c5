"""Clipping equals torch's and timm's, and the norm returned is the one before."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.utils.agc import adaptive_clip_grad
from torch import nn

from tuning.clipping import clipping
from tuning.depth import head_names

SCALE = 50.0


@pytest.fixture
def model() -> nn.Module:
    """Closed stem, open rest, with gradients far too large."""
    torch.manual_seed(0)
    made = timm.create_model("test_vit", num_classes=3, img_size=32)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(not name.startswith("patch_embed"))
    made(torch.randn(4, 3, 32, 32)).logsumexp(dim=1).sum().mul(SCALE).backward()
    return made


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def norm_of(model: nn.Module) -> float:
    return float(torch.stack([g.norm() for g in gradients(model).values()]).norm())


@pytest.mark.parametrize(
    ("norm", "value", "agc"), [(1.0, None, None), (0.0, None, None), (1.0, 0.01, None), (1.0, None, 0.02)]
)
def test_the_norm_before_clipping_is_returned(
    model: nn.Module, norm: float, value: float | None, agc: float | None
) -> None:
    before = norm_of(model)
    returned = clipping(norm, value, agc)(model)
    assert returned.shape == ()
    assert float(returned) == pytest.approx(before, rel=1e-5)
    assert before > 1


def test_by_norm_keeps_the_direction(model: nn.Module) -> None:
    before, norm = gradients(model), norm_of(model)
    clipping(0.5, None, None)(model)
    assert norm_of(model) == pytest.approx(0.5, rel=1e-4)
    for name, gradient in gradients(model).items():
        assert torch.allclose(gradient, before[name] * 0.5 / norm, rtol=1e-4, atol=1e-9)


def test_small_gradients_stay(model: nn.Module) -> None:
    before = gradients(model)
    clipping(1e9, None, None)(model)
    clipping(0.0, None, None)(model)
    assert all(torch.equal(gradient, before[name]) for name, gradient in gradients(model).items())


def test_by_value_is_torchs(model: nn.Module) -> None:
    other = with_gradients(model)
    nn.utils.clip_grad_value_(other.parameters(), 0.01)
    clipping(1.0, 0.01, None)(model)
    assert_same(model, other)


def test_agc_is_timms_and_skips_the_head(model: nn.Module) -> None:
    before, other, head = gradients(model), with_gradients(model), head_names(model)
    adaptive_clip_grad([p for name, p in other.named_parameters() if name not in head], clip_factor=0.02)
    clipping(1.0, None, 0.02)(model)
    assert_same(model, other)
    after = gradients(model)
    assert all(torch.equal(after[name], before[name]) for name in head)
    assert any(not torch.equal(after[name], before[name]) for name in after.keys() - head)


def test_a_head_alone_can_be_clipped(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in head_names(model))
        parameter.grad = parameter.grad if parameter.requires_grad else None
    before = norm_of(model)
    assert float(clipping(1.0, None, 0.02)(model)) == pytest.approx(before)


def with_gradients(model: nn.Module) -> nn.Module:
    """A copy with the gradients, which `deepcopy` leaves behind."""
    other = copy.deepcopy(model)
    for (_, theirs), (_, ours) in zip(other.named_parameters(), model.named_parameters(), strict=True):
        theirs.grad = None if ours.grad is None else ours.grad.clone()
    return other


def assert_same(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = gradients(a), gradients(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
