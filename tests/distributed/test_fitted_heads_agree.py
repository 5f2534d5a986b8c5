"""The fitted head is one head on every process, and that of a single process; heads that are more are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from stage_runs import PRESETS, run_stages, state_of
from torch import Tensor

from tuning import session
from tuning.cli.command_line import parse_command
from tuning.data.sources import open_data
from tuning.data.tables import label_array
from tuning.errors import UserError
from tuning.feeds import plain_feed
from tuning.losses import balanced_weights
from tuning.models.build import build
from tuning.models.head_fit import fit_head
from tuning.plan import make_plan

SMALL = ("--weights", "none", "--image-size", "32", "--batch-size", "8", "--workers", "0", "--tracker", "none")


def fitted(photos: str, name: str, balanced: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """The model's state before and after `fit_head`, and the penalty."""
    command = parse_command(["--data", photos, "--model", name, *SMALL], "test", "", PRESETS)
    flags = command.flags
    accelerator = session.start(flags.run.precision, 1)
    data = open_data(**vars(flags.data), seed=0)
    model, info = build(name, classes=data.classes, weights="none", image_size=32, seed=0)
    (planned, *_) = make_plan(
        command.stages,
        model,
        train_images=len(data.train),
        world_size=accelerator.num_processes,
        micro_batch="auto",
        image_size=info.input_size,
    )
    weights = balanced_weights(label_array(data.train), len(data.classes)) if balanced else None
    before = state_of(model)
    feed = plain_feed(accelerator, data.train, planned, info, workers=0)
    penalty = fit_head(accelerator, model, feed, model, weights, len(data.classes), seed=0)
    return before, state_of(model), penalty


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("model", ["test_vit", "test_efficientnet"])
def test_two_processes_fit_the_head_of_one(photos: Path, model: str, balanced: bool) -> None:
    ((before, alone, penalty),) = run_ranks(1, fitted, str(photos), model, balanced)
    (_, first, on_first), (_, second, on_second) = run_ranks(2, fitted, str(photos), model, balanced)
    assert penalty == on_first == on_second
    assert all(torch.equal(first[name], second[name]) for name in first)
    moved = {name for name in before if not torch.equal(before[name], first[name])}
    assert {name.rsplit(".", 1)[1] for name in moved} == {"weight", "bias"}
    assert len(moved) == 2, "only the classifier may move"
    for name in moved:
        assert torch.allclose(first[name], alone[name], rtol=1e-4, atol=1e-4 * float(alone[name].abs().max()))


def refusal(function: str, photos: str, model: str) -> str:
    try:
        if function == "fit_head":
            fitted(photos, model, False)
        else:
            run_stages("--data", photos, "--model", model, *SMALL[:6], "--cache-features", "--epochs", "0")
    except UserError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("function", "flag"), [("fit_head", "--head-init fitted"), ("cached", "--cache-features")])
def test_two_heads_are_refused(photos: Path, function: str, flag: str, world_size: int) -> None:
    for message in run_ranks(world_size, refusal, function, str(photos), "deit_tiny_distilled_patch16_224"):
        assert "the head of VisionTransformerDistilled" in message
        assert flag in message


@pytest.mark.parametrize("model", ["caformer_s18", "levit_128s"])
def test_a_head_of_several_layers_is_refused_on_every_process(photos: Path, model: str) -> None:
    """An MLP, and BatchNorm before the linear layer: rank 0 must not fail alone while the others wait."""
    for message in run_ranks(2, refusal, "fit_head", str(photos), model):
        assert "--head-init fitted" in message
