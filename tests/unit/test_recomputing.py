"""Gradient checkpointing: less is kept, nothing else changes, and where something would, it is refused."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import timm
import torch
from accelerate import Accelerator
from plain_stages import plain_stage
from torch import Tensor, nn

from tuning import sharding
from tuning.cli.command_line import parse_command
from tuning.clipping import clipping
from tuning.data.loader import FeatureFeed
from tuning.data.sampling import TrainOrder
from tuning.engine import train_steps
from tuning.entering import Entered, enter_stage
from tuning.errors import UserError
from tuning.losses import cross_entropy
from tuning.plan import make_plan
from tuning.preflight.memory import counted_activations
from tuning.progress import Progress
from tuning.recomputing import check_recomputing, recompute_blocks

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
IMAGES, CLASSES, MICRO = 8, 3, 2
MODELS = ("test_efficientnet", "test_vit", "test_convnext")
PRESETS = Path(__file__).parents[2] / "recipes" / "presets"


def network(name: str, recomputes: bool) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES, drop_rate=0.3, drop_path_rate=0.3)
    if recomputes:
        recompute_blocks(model, "--grad-checkpointing", "leave it out")
    return model


def entered_with(model: nn.Module, depth: str | int, batch_norm: str) -> tuple[Accelerator, Entered, FeatureFeed]:
    accelerator, size = Accelerator(), model.pretrained_cfg["input_size"][-1]  # type: ignore[index]
    stage = plain_stage(open=depth, batch_norm=batch_norm, momentum=0.9)
    (planned,) = make_plan([stage], model, train_images=IMAGES, world_size=1, micro_batch=MICRO, image_size=size)
    inputs = torch.randn(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(1))
    feed = FeatureFeed(inputs, torch.arange(IMAGES) % CLASSES, TrainOrder(IMAGES, 0, planned.batch, 0))
    return accelerator, enter_stage(accelerator, model, planned), feed


def trained(
    name: str, depth: str | int, recomputes: bool, batch_norm: str = "frozen"
) -> tuple[dict[str, Tensor], list[float], int]:
    """The model after two optimizer steps of two micro-batches, their losses, and the bytes that a step keeps."""
    model = network(name, recomputes)
    accelerator, entered, feed = entered_with(model, depth, batch_norm)
    clip = clipping(1.0, None, None)
    steps = train_steps(accelerator, entered, feed, cross_entropy(), clip, Progress(), 0)
    with counted_activations(entered) as kept:
        losses = [float(next(steps).loss)]
        saved = kept()
    losses += [float(step.loss) for step in steps]
    return model.state_dict(), losses, saved


@pytest.mark.parametrize("depth", ["all", 1, "norms"])
@pytest.mark.parametrize("name", MODELS)
def test_the_weights_are_those_without_bit_for_bit(name: str, depth: str | int) -> None:
    """Dropout and drop-path included: the second pass draws what the first drew."""
    with_it, losses, _ = trained(name, depth, recomputes=True)
    without, expected, _ = trained(name, depth, recomputes=False)
    assert losses == expected
    assert all(torch.equal(with_it[key], without[key]) for key in without)


@pytest.mark.parametrize("name", MODELS)
def test_less_is_kept_for_the_backward_pass(name: str) -> None:
    *_, kept = trained(name, "all", recomputes=True)
    *_, without = trained(name, "all", recomputes=False)
    assert 0 < kept < 0.6 * without


@pytest.mark.parametrize("name", MODELS)
def test_closed_blocks_keep_nothing(name: str) -> None:
    """Below the lowest open layer there is no graph, and checkpointing makes none: what a block saw is gone."""
    model = network(name, recomputes=True)
    _, entered, feed = entered_with(model, "head", "frozen")
    outputs: list[weakref.ref[Tensor]] = []
    for module in model.modules():
        module.register_forward_hook(lambda module, inputs, output: outputs.append(weakref.ref(output)))
    logits = entered.wrapped(next(feed.epoch(0)).inputs)
    alive = [output for ref in outputs if (output := ref()) is not None]
    assert logits.requires_grad
    assert len(outputs) > 20
    assert all(output is logits or output.numel() <= MICRO * model.num_features for output in alive)  # type: ignore[operator]


def test_why_trained_batch_norm_is_refused() -> None:
    """Its running statistics would move twice a step."""
    with_it, *_ = trained("test_efficientnet", "all", recomputes=True, batch_norm="train")
    without, *_ = trained("test_efficientnet", "all", recomputes=False, batch_norm="train")
    moved = [key for key in without if key.endswith("running_mean") and not torch.equal(with_it[key], without[key])]
    assert moved
    model = network("test_efficientnet", recomputes=False)
    for how in ("train", "sync"):
        with pytest.raises(
            UserError, match=f"--batch-norm {how} would move .* twice .* --batch-norm frozen, or leave it out"
        ):
            check_recomputing(model, [plain_stage(batch_norm=how)], "fp32", "--grad-checkpointing")


def test_what_keeps_no_statistics_moving_is_not_refused() -> None:
    still = network("test_efficientnet", recomputes=False)
    check_recomputing(
        still, [plain_stage(open="head", batch_norm="train"), plain_stage()], "bf16", "--grad-checkpointing"
    )
    check_recomputing(
        network("test_vit", recomputes=False), [plain_stage(batch_norm="train")], "fp32", "--grad-checkpointing"
    )


@pytest.mark.parametrize("precision", ["bf16-master", "bf16-pure"])
def test_copies_of_weights_are_refused(precision: str) -> None:
    with pytest.raises(UserError, match=f"--precision {precision}.* Use --precision bf16"):
        check_recomputing(network("test_vit", recomputes=False), [plain_stage()], precision, "--grad-checkpointing")


def test_a_model_without_it_is_refused() -> None:
    model = timm.create_model("inception_v3", num_classes=CLASSES)
    with pytest.raises(UserError, match="InceptionV3 has no gradient checkpointing in timm; leave it out"):
        recompute_blocks(model, "--grad-checkpointing", "leave it out")


def test_a_run_of_the_head_alone_is_refused() -> None:
    argv = ["--data", "photos", "--grad-checkpointing", "--freeze-epochs", "2", "--epochs"]
    with pytest.raises(UserError, match="--grad-checkpointing has no effect: no stage opens anything below the head"):
        parse_command([*argv, "0"], "recipes/finetune.py", "", PRESETS)
    assert parse_command([*argv, "1"], "recipes/finetune.py", "", PRESETS).flags.batch.grad_checkpointing


@pytest.mark.parametrize(("sharded", "given"), [("true", "true"), ("true", "false"), ("false", "true")])
def test_the_launcher_asks_for_it_under_fsdp_only(monkeypatch: pytest.MonkeyPatch, sharded: str, given: str) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", sharded)
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", given)
    assert sharding.recomputes() is (sharded == given == "true")
