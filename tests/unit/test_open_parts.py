"""Stages that open kinds of parameters at any depth: norms, or norms and biases; and what drop-path does there."""

from __future__ import annotations

import pytest
import timm
import torch
from plain_stages import plain_stage
from timm.layers import DropPath
from torch import nn

from tuning.depth import bias_names, closed_eval, freeze_batch_norm, head_names, norm_names, open_names, set_open
from tuning.errors import UserError
from tuning.plan import make_plan

# Norm parameters counted by hand: (blocks x norms a block + the rest) x 2.
COUNTED = {
    "vit_tiny_patch16_224": 2 * (12 * 2 + 1),
    "resnet18": 2 * (1 + 8 * 2 + 3),
    "convnext_atto": 2 * (12 + 3 + 1 + 1),
    "swin_tiny_patch4_window7_224": 2 * (12 * 2 + 3 + 1 + 1),
}


def meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, num_classes=5)


@pytest.mark.parametrize("name", COUNTED)
def test_all_scales_and_shifts_and_nothing_else(name: str) -> None:
    model = meta(name)
    norms, parameters = norm_names(model), dict(model.named_parameters())
    assert len(norms) == COUNTED[name]
    assert all(parameters[name].dim() == 1 for name in norms)
    assert open_names(model, "norms") == norms | head_names(model)


@pytest.mark.parametrize(
    "name",
    [*COUNTED, "resnetv2_50", "efficientnet_b0", "densenet121", "eva02_tiny_patch14_224", "beit_base_patch16_224",
     "convnextv2_atto", "evonorm_stub", "mobilenetv4_conv_small", "resmlp_12_224", "cait_xxs24_224"],
)  # fmt: skip
def test_they_are_those_that_timm_and_torch_call_norms(name: str) -> None:
    """An independent look: by what the module's class inherits from or where it is defined."""
    model = meta("resnetv2_50d_evos" if name == "evonorm_stub" else name)
    torchs = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)
    timms = ("norm", "norm_act", "evo_norm", "filter_response_norm", "grn")
    expected = {
        f"{path}.{parameter}"
        for path, module in model.named_modules()
        if isinstance(module, torchs)
        or type(module).__module__ in {f"timm.layers.{file}" for file in timms}
        or type(module).__name__ == "Affine"
        for parameter, _ in module.named_parameters(recurse=False)
    }
    assert expected
    assert norm_names(model) == expected
    both = open_names(model, "norms-biases")
    assert both == expected | bias_names(model) | head_names(model)
    assert all(name.endswith("bias") for name in both - expected - head_names(model))


def test_a_thousandth_of_the_model_is_open() -> None:
    """12 blocks of 4 x 192 norm and (3 + 1 + 4 + 1) x 192 bias elements, the last norm, the stem's, the head."""
    model = meta("vit_tiny_patch16_224")
    (planned,) = make_plan(
        [plain_stage(open="norms-biases", batch_size=4)],
        model,
        train_images=8,
        world_size=1,
        micro_batch=4,
        image_size=224,
    )
    assert planned.open_parameters == 12 * (4 + 9) * 192 + 2 * 192 + 192 + 5 * 193
    assert {group.weight_decay for group in planned.groups if group.open_parameters} == {0.0}


def test_layers_decay_among_open_parts() -> None:
    (planned,) = make_plan(
        [plain_stage(open="norms", lr_ratio=0.1, batch_size=4)],
        meta("vit_tiny_patch16_224"),
        train_images=8,
        world_size=1,
        micro_batch=4,
        image_size=224,
    )
    rates = [group.peak_lr for group in planned.groups if group.open_parameters]
    assert rates == sorted(rates)
    assert len({*rates}) == 13, "twelve blocks, the last norm and the head; the stem has no norm"


def test_models_without_norms_are_refused() -> None:
    with pytest.raises(UserError, match="open='norms-biases': VGG has no normalisation layers"):
        open_names(meta("vgg11"), "norms-biases")


def entered(name: str, opened: str, **changes: object) -> nn.Module:
    model = timm.create_model(name, num_classes=3, **changes)
    set_open(model, open_names(model, opened))
    model.train()
    closed_eval(model)
    return model


def test_statistics_move_with_open_norms_unless_they_are_frozen() -> None:
    for frozen in (False, True):
        model = entered("test_efficientnet", "norms")
        if frozen:
            freeze_batch_norm(model)
        before = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
        model(torch.randn(4, 3, 32, 32)).sum().backward()
        moved = [name for name, value in model.named_buffers() if "running" in name and not value.equal(before[name])]
        assert len(moved) == (0 if frozen else len(before))
        opened = {name for name, p in model.named_parameters() if p.grad is not None}
        assert opened == open_names(model, "norms"), "frozen or not, scales and shifts train"


def test_what_is_all_closed_rests_and_what_is_open_in_part_trains() -> None:
    """A ViT: attention and MLP hold no norm and rest; blocks hold two, and their drop-path acts."""
    rates = {"img_size": 32, "attn_drop_rate": 0.5, "proj_drop_rate": 0.5, "drop_path_rate": 0.5}
    for opened, trains in (("norms", False), ("norms-biases", True)):
        model = entered("test_vit3", opened, **rates)
        for block in model.blocks:
            assert block.training
            assert block.norm1.training
            assert block.drop_path1.training
            for part in (block.attn, block.attn.attn_drop, block.attn.proj_drop, block.mlp, block.mlp.drop1):
                assert part.training is trains
        assert model.pos_drop.training, "the whole model holds it"


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "resnet18", "efficientnet_b0"])
def test_drop_path_rates_rise_linearly_with_depth(name: str) -> None:
    """Huang et al. 2016: from 0 at the first block to the flag's rate at the last.

    In families whose rate is i / blocks timm stops short of it by one block.
    """
    model = timm.create_model(name, num_classes=3, drop_path_rate=0.2)
    rates, seen = [0.0], set()
    for module in model.modules():
        if isinstance(module, DropPath) and id(module) not in seen:
            seen.add(id(module))
            rates.append(module.drop_prob)
    distinct = torch.tensor(sorted({round(rate, 6) for rate in rates}), dtype=torch.float64)
    steps = distinct.diff()
    assert len(distinct) >= 8
    smallest = float(steps.min())
    torch.testing.assert_close(steps / smallest, (steps / smallest).round(), atol=1e-3, rtol=0)
    last = float(distinct[-1])
    assert last == pytest.approx(0.2, abs=1e-6) or last == pytest.approx(0.2 - smallest, abs=1e-4)


def test_a_path_is_kept_as_often_as_said_and_scaled_by_it() -> None:
    drop, pictures = DropPath(0.3).train(), torch.ones(20_000, 2, 3)
    torch.manual_seed(0)
    made = drop(pictures)
    kept = made[:, 0, 0] > 0
    assert kept.double().mean().item() == pytest.approx(0.7, abs=0.01)
    assert torch.equal(made[kept], torch.full_like(made[kept], 1 / 0.7))
    assert made.mean().item() == pytest.approx(1.0, abs=0.015), "the expectation is that of evaluation"
    assert torch.equal(drop.eval()(pictures), pictures)
