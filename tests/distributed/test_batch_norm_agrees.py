"""Synchronised BatchNorm on two processes is BatchNorm on one with the whole batch; statistics taken anew agree."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from accelerate import Accelerator
from plain_stages import plain_stage
from ranks import run_ranks
from short_memory import ShortMemory
from stage_runs import largest_difference, run_stages
from timm.layers import BatchNormAct2d
from torch import Tensor, distributed, nn

from tuning import session
from tuning.averaging.batch_norm import SyncedBatchNorm, synchronise
from tuning.clipping import clipping
from tuning.data.loader import FeatureFeed
from tuning.data.sampling import TrainOrder
from tuning.engine import train_steps
from tuning.entering import enter_stage
from tuning.errors import UserError
from tuning.losses import cross_entropy
from tuning.plan import StagePlan, make_plan
from tuning.progress import Progress

LAYERS = {
    "1d": (lambda: nn.BatchNorm1d(5), (8, 5)),
    "1d with length": (lambda: nn.BatchNorm1d(5, momentum=None), (8, 5, 7)),
    "2d": (lambda: nn.BatchNorm2d(5, eps=1e-3, momentum=0.3), (8, 5, 4, 6)),
    "not affine": (lambda: nn.BatchNorm2d(5, affine=False), (8, 5, 4, 6)),
    "no statistics": (lambda: nn.BatchNorm2d(5, track_running_stats=False), (8, 5, 4, 6)),
    "with activation": (lambda: BatchNormAct2d(5, act_layer=nn.SiLU), (8, 5, 4, 6)),
}


def passes(layer: nn.Module, batches: list[Tensor], weights: Tensor) -> dict[str, Tensor]:
    """Two passes forward, one back; *weights* make the loss another function of every output."""
    for batch in batches[:-1]:
        layer(batch)
    inputs = batches[-1].clone().requires_grad_()
    outputs = layer(inputs)
    (outputs * weights).sum().backward()
    found = {"outputs": outputs.detach(), "inputs": inputs.grad}
    found |= dict(layer.named_buffers())
    return {**found, **{f"{name}.grad": parameter.grad for name, parameter in layer.named_parameters()}}


def drawn(kind: str) -> tuple[nn.Module, list[Tensor], Tensor]:
    make, shape = LAYERS[kind]
    generator = torch.Generator().manual_seed(3)
    layer = make().train()
    for parameter in layer.parameters():
        parameter.data = torch.rand(parameter.shape, generator=generator) + 0.5
    batches = [3 + 2 * torch.randn(shape, generator=generator) for _ in range(2)]
    return layer, batches, torch.randn(shape, generator=generator)


def half(kind: str) -> dict[str, Tensor]:
    """This process's half of the batch."""
    layer, batches, weights = drawn(kind)
    synchronise(layer, True)
    assert isinstance(layer, SyncedBatchNorm)
    rank, size = distributed.get_rank(), len(weights) // 2
    assert distributed.get_world_size() == 2
    mine = slice(rank * size, rank * size + size)
    return passes(layer, [batch[mine] for batch in batches], weights[mine])


@pytest.mark.parametrize("kind", LAYERS)
def test_two_halves_are_the_whole(kind: str) -> None:
    whole = passes(*drawn(kind))
    halves = run_ranks(2, half, kind)
    for name in ("outputs", "inputs"):
        together = torch.cat([one[name] for one in halves])
        assert torch.allclose(together, whole[name], atol=1e-5), name
    for name in whole.keys() - {"outputs", "inputs"}:
        if name.endswith(".grad"):  # DDP adds these up
            assert torch.allclose(halves[0][name] + halves[1][name], whole[name], rtol=1e-5, atol=1e-5), name
        else:
            assert torch.equal(halves[0][name], halves[1][name]), name
            assert torch.allclose(halves[0][name], whole[name], atol=1e-5), name


def low_precision() -> tuple[torch.dtype, float]:
    layer, batches, _ = drawn("with activation")
    synchronise(layer, True)
    plain = copy.deepcopy(layer)
    mine = batches[0][distributed.get_rank() :: 2]
    outputs = layer(mine.bfloat16())
    return outputs.dtype, float((outputs.float() - plain(mine)).abs().max())


def test_sums_are_not_made_in_bf16() -> None:
    for dtype, difference in run_ranks(2, low_precision):
        assert dtype == torch.bfloat16
        assert 0 < difference < 0.05


BATCH_NORM = ("--model", "test_efficientnet", "--weights", "none", "--image-size", "32", "--batch-size", "8")
STAGES = ("--freeze-epochs", "0", "--epochs", "1", "--optimizer", "sgd", "--lr", "0.02")


def test_a_run_on_two_processes_is_that_of_one_with_the_whole_batch(photos: Path) -> None:
    """Short last steps included; 37 pictures in steps of 8."""
    argv = ("--data", str(photos), *BATCH_NORM, *STAGES)
    (alone,) = run_ranks(1, run_stages, *argv, "--batch-norm", "train", "--micro-batch", "8")
    first, second = run_ranks(2, run_stages, *argv, "--batch-norm", "sync", "--micro-batch", "4")
    for after_one, on_first, on_second in zip(alone.states, first.states, second.states, strict=True):
        assert largest_difference(on_first, on_second) == 0
        assert largest_difference(on_first, after_one) < 1e-4
    assert first.losses == pytest.approx(alone.losses, abs=1e-4)
    (apart,) = run_ranks(1, run_stages, *argv, "--batch-norm", "train", "--micro-batch", "4")
    assert largest_difference(apart.states[-1], first.states[-1]) > 1e-3, "statistics of halves are no others"


def short_of_memory() -> str:
    accelerator = session.start("fp32", 1)
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=3)
    stage = plain_stage(batch_norm="sync", batch_size=8)
    (planned,) = make_plan([stage], model, train_images=16, world_size=2, micro_batch=4, image_size=32)
    if accelerator.process_index == 1:
        ShortMemory("forward", fits=2).watch(model.get_submodule("blocks.2"))
    entered = enter_stage(accelerator, model, planned)
    feed = FeatureFeed(torch.randn(16, 3, 32, 32), torch.zeros(16, dtype=torch.int64), order_of(accelerator, planned))
    try:
        list(train_steps(accelerator, entered, feed, cross_entropy(), clipping(1.0, None, None), Progress(), 0))
    except UserError as error:
        return str(error)
    except RuntimeError:  # the other one has left
        return "left alone"
    return "trained"


def order_of(accelerator: Accelerator, planned: StagePlan) -> TrainOrder:
    return TrainOrder(16, 0, planned.batch, accelerator.process_index)


def test_memory_that_runs_out_on_one_process_ends_the_run() -> None:
    """Within the pass the others wait for its sums, so the step can't begin anew."""
    first, second = run_ranks(2, short_of_memory)
    assert first == "left alone"
    assert "out of memory at step 1: under FSDP or with --batch-norm sync" in second
    assert "Give a smaller --micro-batch" in second
