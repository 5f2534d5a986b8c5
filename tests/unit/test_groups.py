"""Parameter groups against timm's own layer decay on many families, and the guards around them."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from tuning.depth import layer_ids, open_names, set_open
from tuning.errors import UserError
from tuning.groups import decay_for_ratio, param_groups, set_lr, set_peak_lrs

FAMILIES = [
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "convnext_atto",
    "convnextv2_atto",
    "resnet18",
    "resnetv2_50",
    "regnety_002",
    "efficientnet_b0",
    "tf_efficientnet_lite0",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small",
    "eva02_tiny_patch14_224",
    "deit_tiny_distilled_patch16_224",
    "beit_base_patch16_224",
    "maxvit_tiny_tf_224",
    "coatnet_nano_rw_224",
    "mixer_s32_224",
    "focalnet_tiny_srf",
    "edgenext_xx_small",
    "pvt_v2_b0",
    "densenet121",
    "vgg11",
    "ghostnet_050",
    "fastvit_t8",
    "repvgg_a0",
    "poolformer_s12",
    "hiera_tiny_224",
    "xcit_nano_12_p16_224",
    "crossvit_tiny_240",
    "tiny_vit_5m_224",
    "nfnet_f0",
]


def meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, num_classes=5)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_gets_the_rate_and_decay_that_timm_gives_it(name: str) -> None:
    model = meta(name)
    patterns = getattr(model, "no_weight_decay", lambda: set())()
    expected = {}
    for group in param_groups_layer_decay(model, weight_decay=0.05, no_weight_decay_list=patterns, layer_decay=0.7):
        for parameter in group["params"]:
            expected[id(parameter)] = (pytest.approx(3e-4 * group["lr_scale"], rel=1e-12), group["weight_decay"])
    got = {}
    for group in param_groups(model, lr=3e-4, layer_decay=0.7, weight_decay=0.05):
        for parameter in group["params"]:
            assert id(parameter) not in got
            got[id(parameter)] = (group["peak_lr"], group["weight_decay"])
    assert got == expected
    assert len(got) == len(list(model.parameters()))


def test_groups_are_named_and_ordered_by_depth_and_do_not_change_with_the_stage() -> None:
    model = meta("vit_tiny_patch16_224")
    groups = param_groups(model, lr=1.0, layer_decay=0.5, weight_decay=0.1)
    assert [group["depth"] for group in groups] == sorted(group["depth"] for group in groups)
    assert (groups[0]["name"], groups[-1]["name"]) == ("layer00", "layer13")
    assert {group["name"]: group["peak_lr"] for group in groups} == {
        f"layer{i:02d}": 0.5 ** (13 - i) for i in range(14)
    }
    assert all(group["lr"] == group["peak_lr"] for group in groups)
    assert {group["weight_decay"] for group in groups if group["name"] == "layer07"} == {0.0, 0.1}
    shape = [len(group["params"]) for group in groups]
    set_open(model, open_names(model, "head"))
    assert [len(g["params"]) for g in param_groups(model, lr=1.0, weight_decay=0.0)] == shape


def test_a_new_stage_and_a_step_are_plain_assignments() -> None:
    model = meta("resnet18")
    optimizer = torch.optim.SGD(param_groups(model, lr=0.1, layer_decay=0.9))
    set_peak_lrs(optimizer.param_groups, lr=2.0, layer_decay=0.5)
    assert optimizer.param_groups[-1]["peak_lr"] == 2.0
    assert optimizer.param_groups[0]["peak_lr"] == 2.0 * 0.5 ** max(layer_ids(model).values())
    assert optimizer.param_groups[-1]["lr"] == 0.1
    set_lr(optimizer.param_groups, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [g["peak_lr"] * 0.25 for g in optimizer.param_groups]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "regnety_002", "convnext_atto"])
def test_a_ratio_means_the_same_for_every_family(name: str) -> None:
    model = meta(name)
    decay = decay_for_ratio(model, 0.01)
    assert decay_for_ratio(layer_ids(model), 0.01) == decay
    rates = [group["peak_lr"] for group in param_groups(model, lr=1.0, layer_decay=decay)]
    assert min(rates) / max(rates) == pytest.approx(0.01)
    assert decay_for_ratio(model, 1.0) == 1.0


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.1, float("nan")])
def test_bad_ratios_are_refused(ratio: float) -> None:
    with pytest.raises(UserError, match=f"--lr-ratio .* got {ratio!r}"):
        decay_for_ratio({"stem": 0, "head": 1}, ratio)


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"lr": -1.0}, "--lr "),
        ({"lr": float("nan")}, "--lr "),
        ({"lr": 1.0, "layer_decay": 0.0}, "--layer-decay"),
        ({"lr": 1.0, "layer_decay": 1.2}, "--layer-decay"),
        ({"lr": 1.0, "weight_decay": -0.1}, "--weight-decay"),
    ],
)
def test_bad_rates_are_refused(values: dict[str, float], flag: str) -> None:
    with pytest.raises(UserError, match=flag):
        param_groups(nn.Linear(2, 2), **values)


def test_a_ratio_needs_more_than_one_depth() -> None:
    with pytest.raises(UserError, match="single depth"):
        decay_for_ratio(nn.Linear(2, 2), 0.1)
