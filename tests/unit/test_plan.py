"""The plan: what every stage trains, in numbers that hold before anything is spent."""

from __future__ import annotations

import dataclasses

import pytest
import timm
import torch
from torch import nn

from tuning.cli.command_line import resolve_stages
from tuning.errors import UserError
from tuning.flags import Flags
from tuning.plan import StagePlan, make_plan
from tuning.stages import Stage


def plan(model: nn.Module, *stages: Stage, images: int = 100) -> tuple[StagePlan, ...]:
    return make_plan(stages, model, train_images=images, world_size=1, micro_batch="auto", image_size=32)


def stage(**changes: object) -> Stage:
    base = dataclasses.replace(resolve_stages(Flags())[-1], batch_size=16)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def resnet() -> nn.Module:
    with torch.device("meta"):
        return timm.create_model("resnet18", num_classes=5)


def test_numbers_of_two_stages() -> None:
    model = resnet()
    head, everything = plan(model, stage(open="head", epochs=2), stage(lr_ratio=0.25, lr=1e-3, epochs=3))
    assert (head.steps_per_epoch, head.steps, everything.steps) == (7, 14, 21)
    assert head.open_parameters == 512 * 5 + 5
    assert everything.open_parameters == sum(p.numel() for p in model.parameters())
    assert everything.groups[0].peak_lr == pytest.approx(2.5e-4)
    assert everything.groups[-1].peak_lr == 1e-3
    assert {g.weight_decay for g in everything.groups} == {0.0, 0.05}
    assert all(p.requires_grad for p in model.parameters()), "the model is only read"
    rates = list(head.lrs())
    assert len(rates) == 14
    assert {tuple(rate) for rate in rates} == {("layer9",)}
    assert list(head.lrs(every=4)) == rates[::4]


def test_rates_that_underflow_are_refused() -> None:
    with pytest.raises(UserError, match="Use --lr-ratio 1 for equal rates"):
        plan(resnet(), stage(layer_decay=1e-200, lr_ratio=None))


def test_rates_that_coincide_are_refused() -> None:
    """So near to 1 that the rates are the same numbers."""
    with pytest.raises(UserError, match="10 open depths of the model have 1 different learning rates"):
        plan(resnet(), stage(layer_decay=1 - 1e-16, lr_ratio=None, lr=1e-323))


def test_a_head_alone_needs_no_second_rate() -> None:
    (head,) = plan(resnet(), stage(open="head", lr_ratio=0.1))
    assert {g.peak_lr for g in head.groups if g.open_parameters} == {stage().lr}


def test_two_heads_cannot_be_cached() -> None:
    with torch.device("meta"):
        model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5)
    with pytest.raises(UserError, match="more than one classifier"):
        plan(model, stage(open="head", cache_features=True))


def test_unknown_optimizer_is_named() -> None:
    with pytest.raises(UserError, match="Perhaps you meant 'adamw'"):
        plan(resnet(), stage(optimizer="adamww"))
