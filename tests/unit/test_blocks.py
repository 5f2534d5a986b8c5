"""The block that a network repeats, over timm's families; without weights or memory, on the meta device."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from tuning.blocks import repeated_blocks


@pytest.mark.parametrize(
    ("model", "block", "count", "share"),
    [
        ("vit_tiny_patch16_224", "Block", 12, 0.9),
        ("deit3_small_patch16_224", "Block", 12, 0.9),
        ("eva02_tiny_patch14_224", "EvaBlock", 12, 0.9),
        ("hiera_tiny_224", "HieraBlock", 12, 0.9),
        ("swin_tiny_patch4_window7_224", "SwinTransformerBlock", 12, 0.9),
        ("convnext_atto", "ConvNeXtBlock", 12, 0.8),
        ("maxvit_nano_rw_256", "MaxxVitBlock", 7, 0.9),
        ("resnet50", "Bottleneck", 16, 0.9),
        ("tf_efficientnet_lite0", "InvertedResidual", 15, 0.6),
        ("regnety_002", "", 0, 0.0),
    ],
)
def test_the_unit_of_every_family(model: str, block: str, count: int, share: float) -> None:
    with torch.device("meta"):
        network = timm.create_model(model)
    found = repeated_blocks(network)
    assert {type(module).__name__ for module in found} == ({block} if block else set())
    assert len(found) == count
    held = sum(p.numel() for module in found for p in module.parameters())
    assert held >= share * sum(p.numel() for p in network.parameters())
    order = [module for module in network.modules() if any(module is one for one in found)]
    assert all(a is b for a, b in zip(order, found, strict=True))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)


class Stage(nn.Module):
    """Two blocks, beside a layer of 64 x 64."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = nn.Linear(64, 64)
        self.blocks = nn.Sequential(Block(width), Block(width))


def test_a_stage_that_holds_more_than_its_blocks_is_the_unit() -> None:
    stages = [Stage(4), Stage(4)]
    assert repeated_blocks(nn.Sequential(nn.Sequential(*stages))) == stages
    wide = [Stage(256), Stage(256)]
    assert repeated_blocks(nn.Sequential(nn.Sequential(*wide))) == [block for one in wide for block in one.blocks]


def test_what_stands_once_is_looked_through() -> None:
    stage = Stage(4)
    assert repeated_blocks(nn.Sequential(nn.Sequential(stage))) == [*stage.blocks]


def test_nothing_repeats() -> None:
    assert repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == []
