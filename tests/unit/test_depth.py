"""Depth of parameters, what a stage opens, and evaluation mode of what stays closed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import timm
import torch
from timm.optim._param_groups import auto_group_layers
from torch import nn

from tuning.depth import closed_eval, freeze_batch_norm, head_names, layer_ids, open_names, set_open
from tuning.errors import UserError

NAMES = [
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "convnext_atto",
    "resnet18",
    "resnetv2_50",
    "efficientnet_b0",
    "mobilenetv3_small_050",
    "deit_tiny_distilled_patch16_224",
    "vgg11",
    "poolformer_s12",
    "pit_ti_224",
    "crossvit_tiny_240",
    "densenet121",
    "sequencer2d_s",
]


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    with torch.device("meta"):
        yield timm.create_model(request.param, num_classes=5)


def test_every_parameter_has_one_depth_from_stem_to_head(model: nn.Module) -> None:
    ids = layer_ids(model)
    assert list(ids) == [name for name, _ in model.named_parameters()]
    top = max(ids.values())
    assert set(ids.values()) == set(range(top + 1))
    assert top >= 3
    assert ids[next(iter(ids))] == 0
    assert {ids[name] for name in head_names(model)} == {top}


def test_head_holds_the_outputs_and_nothing_else(model: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    head = head_names(model)
    assert len(head) in (2, 4)
    assert all(parameters[name].shape[0] == 5 for name in head)


def test_openness_grows_from_head_to_all(model: nn.Module) -> None:
    ids = layer_ids(model)
    below = max(ids.values())
    chain = [open_names(model, "head"), *(open_names(model, n) for n in range(1, below + 1)), open_names(model, "all")]
    assert all(small < large for small, large in itertools.pairwise(chain[:-1]))
    assert chain[0] == head_names(model)
    assert chain[-2] == chain[-1] == frozenset(ids)
    assert {ids[name] for name in chain[1]} == {below, below - 1}
    assert open_names(model, 1.0) == frozenset(ids)
    assert open_names(model, 1e-9) == chain[1]
    assert open_names(model, 0.5) == chain[-(-below // 2)]


def test_models_without_matcher_are_cut_as_timm_cuts_them() -> None:
    model = timm.create_model("poolformer_s12", num_classes=5)
    assert not hasattr(model, "group_matcher")
    assert layer_ids(model) == auto_group_layers(model)


@pytest.mark.parametrize("bad", ["heads", "", 0, -1, 99, True, 0.0, 1.5, float("nan"), None])
def test_bad_depths_are_refused(bad: object) -> None:
    model = timm.create_model("test_vit", num_classes=5)
    with pytest.raises(UserError, match="is not a depth"):
        open_names(model, bad)  # type: ignore[arg-type]


def test_wrapped_models_are_refused() -> None:
    model = timm.create_model("test_vit", num_classes=5)
    with pytest.raises(ValueError, match="unwrap"):
        layer_ids(nn.DataParallel(model))


def test_head_is_found_without_a_configuration() -> None:
    model = timm.create_model("resnet18", num_classes=5)
    model.pretrained_cfg = {}
    assert head_names(model) == {"fc.weight", "fc.bias"}
    bare = timm.create_model("resnet18", num_classes=0)
    with pytest.raises(UserError, match="no classifier"):
        head_names(bare)


def test_set_open_sets_exactly_the_names() -> None:
    model = timm.create_model("test_vit", num_classes=5)
    for open in ("head", 2, "all", "head"):
        names = open_names(model, open)
        set_open(model, names)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == names
    with pytest.raises(ValueError, match="nowhere"):
        set_open(model, {"nowhere"})


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_buffers() if "running" in name}


def test_statistics_of_closed_layers_stand_still_and_those_of_open_ones_move() -> None:
    model = timm.create_model("test_efficientnet", num_classes=5, drop_path_rate=0.5)
    names = open_names(model, 2)
    set_open(model, names)
    model.train()
    closed_eval(model)
    before = statistics(model)
    model(torch.randn(8, 3, 32, 32))
    moved = {
        name.rsplit(".", 1)[0] for name, value in statistics(model).items() if not torch.equal(value, before[name])
    }
    open_norms = {name.removesuffix(".weight") for name in names} & {name.rsplit(".", 1)[0] for name in before}
    assert moved == open_norms
    assert 0 < len(moved) < len(before) / 2


def test_closed_backbone_is_deterministic_and_its_head_still_trains() -> None:
    model = timm.create_model(
        "test_vit", num_classes=5, img_size=32, drop_rate=0.5, proj_drop_rate=0.5, drop_path_rate=0.5
    )
    set_open(model, open_names(model, "head"))
    model.train()
    closed_eval(model)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.forward_features(images), model.forward_features(images))
    assert model.head.training
    assert model.training
    assert not model.blocks.training
    assert not torch.equal(model(images), model(images))  # the dropout before the open head


def test_modules_without_parameters_follow_a_closed_parent() -> None:
    closed = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Dropout())
    model = nn.Sequential(closed, nn.Conv2d(4, 5, 1))
    set_open(model, {"1.weight"})
    model.train()
    closed_eval(model)
    assert not any(module.training for module in closed.modules())
    assert model[1].training
    set_open(model, {"0.0.weight", "1.weight"})
    model.train()
    closed_eval(model)
    assert closed[1].training


def test_freeze_batch_norm_holds_statistics_of_an_open_model() -> None:
    for name in ("test_efficientnet", "test_resnet"):
        model = timm.create_model(name, num_classes=5)
        model.train()
        freeze_batch_norm(model)
        before = statistics(model)
        model(torch.randn(4, 3, 32, 32))
        assert before
        assert all(torch.equal(value, before[name]) for name, value in statistics(model).items())
        assert model.training
