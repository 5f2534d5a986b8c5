"""The open part of a model by itself: the same outputs and gradients as in the whole model, for families of models."""

from __future__ import annotations

import pytest
import timm
import torch
from plain_stages import plain_stage
from torch import nn

from tuning import session
from tuning.depth import open_names
from tuning.entering import enter_stage
from tuning.errors import UserError
from tuning.open_part import open_part
from tuning.plan import make_plan

SIDE = 64
FAMILIES = {
    "test_vit": 0.5,
    "test_convnext": 0.5,
    "test_efficientnet": 0.5,
    "test_resnet": 0.4,
    "test_mambaout": 0.5,
    "test_nfnet": 0.6,
    "mobilenetv3_small_050": 3,
    "regnety_002": 0.5,
    "densenet121": 0.3,
    "deit_tiny_distilled_patch16_224": 2,
}


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    sized = {"img_size": SIDE} if "vit" in name or "deit" in name else {}
    return timm.create_model(name, num_classes=3, **sized)


def entered_at(model: nn.Module, depth: int | float, **changes: object):  # type: ignore[no-untyped-def]
    stage = plain_stage(open=depth, **changes)
    (planned,) = make_plan([stage], model, train_images=8, world_size=1, micro_batch=4, image_size=SIDE)
    return enter_stage(session.start("fp32", 1), model, planned), planned


@pytest.mark.parametrize(("name", "depth"), FAMILIES.items())
@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
def test_it_learns_what_the_whole_model_learns(name: str, depth: int | float, batch_norm: str) -> None:
    images, labels = torch.randn(4, 3, SIDE, SIDE), torch.arange(4) % 3
    outcomes = []
    for cached in (False, True):
        model = built(name)
        entered, planned = entered_at(model, depth, cache_features=cached, batch_norm=batch_norm)
        inputs = images
        if cached:
            with torch.inference_mode():
                features = entered.trained.below(model.eval(), images)
            assert features[0].numel() * 4 * 8 == planned.feature_bytes
            entered.train_mode()
            inputs = features.clone()
        logits = entered.wrapped(inputs)
        nn.functional.cross_entropy(logits, labels).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        outcomes.append((logits.detach(), gradients, {n: b.clone() for n, b in model.named_buffers()}))
    (logits, gradients, buffers), (again, others, moved) = outcomes
    torch.testing.assert_close(again, logits)
    assert gradients.keys() == others.keys() == open_names(built(name), depth)
    torch.testing.assert_close(others, gradients)
    torch.testing.assert_close(moved, buffers)


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = built(name).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    part = open_part(model, open_names(model, 0.5), SIDE)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    part.below(model.eval(), torch.randn(2, 3, SIDE, SIDE))
    assert not [module for module in model.modules() if "forward" in vars(module) or module._forward_hooks]


def test_the_part_of_an_average_has_its_weights() -> None:
    model, average = built("test_vit").eval(), built("test_vit").eval()
    part = open_part(model, open_names(model, 2), SIDE)
    with torch.inference_mode():
        nn.init.ones_(average.get_classifier().bias)
        features = part.below(model, torch.randn(2, 3, SIDE, SIDE))
        torch.testing.assert_close(part.of(average)(features), part(features) + 1)


@pytest.mark.parametrize(
    ("name", "opened", "said"),
    [
        ("test_vit", 4, "no layers of VisionTransformer are closed"),
        ("xcit_nano_12_p16_224", 0.5, "the layers of Xcit from blocks.6 on do not run one after the other"),
    ],
)
def test_what_has_no_such_part_is_refused(name: str, opened: float, said: str) -> None:
    model = timm.create_model(name, num_classes=3)
    names = open_names(model, opened) | ({"pos_embed"} if opened == 4 else set())
    with pytest.raises(UserError, match=said):
        open_part(model, names, 160 if name == "test_vit" else 224)
