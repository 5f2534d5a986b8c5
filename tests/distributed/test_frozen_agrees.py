"""Head-only stages on one process and two: what DDP exchanges, views of cached features, the choice of a forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from plain_stages import plain_stage
from ranks import run_ranks
from safetensors.torch import save_file
from stage_runs import largest_difference, run_stages
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from tuning import session
from tuning.clipping import clipping
from tuning.data.loader import FeatureFeed
from tuning.data.sampling import TrainOrder
from tuning.engine import train_steps
from tuning.entering import enter_stage
from tuning.losses import cross_entropy
from tuning.plan import make_plan
from tuning.progress import Progress

MODEL = ("--model", "test_efficientnet", "--weights", "none", "--image-size", "32", "--batch-size", "8")
HEAD = ("--freeze-epochs", "3", "--epochs", "0", "--augment", "medium", "--optimizer", "sgd", "--freeze-lr", "0.05")


def exchanged(depth: str | int) -> tuple[list[int], int]:
    """Numbers of elements that DDP exchanges in a step of a stage, and of the parameters that it opens."""
    accelerator = session.start("fp32", 1)
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=3)
    (planned,) = make_plan([plain_stage(open=depth)], model, train_images=8, world_size=2, micro_batch=2, image_size=32)
    entered, sizes = enter_stage(accelerator, model, planned), list[int]()

    def exchange(bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sizes.append(bucket.buffer().numel())
        return allreduce_hook(torch.distributed.group.WORLD, bucket)  # type: ignore[arg-type]

    entered.wrapped.register_comm_hook(None, lambda _, bucket: exchange(bucket))  # type: ignore[operator]
    order = TrainOrder(8, 0, planned.batch, accelerator.process_index)
    feed = FeatureFeed(torch.randn(8, 3, 32, 32), torch.arange(8) % 3, order)
    next(train_steps(accelerator, entered, feed, cross_entropy(), clipping(1.0, None, None), Progress(), 0))
    return sizes, sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("depth", ["head", pytest.param(2, marks=pytest.mark.slow)])
def test_only_gradients_of_open_parameters_are_exchanged(depth: str | int) -> None:
    for sizes, opened in run_ranks(2, exchanged, depth):
        assert sum(sizes) == opened


def test_as_many_views_as_epochs_are_the_live_run(photos: Path) -> None:
    """Two processes on cached views, one on pictures: the same crops, operations, flips and boxes in every epoch."""
    argv = ("--data", str(photos), *MODEL, *HEAD, "--random-erasing", "0.5")
    (live,) = run_ranks(1, run_stages, *argv)
    first, second = run_ranks(2, run_stages, *argv, "--cache-features", "--feature-views", "3")
    assert largest_difference(first.states[-1], second.states[-1]) == 0
    assert first.losses == second.losses
    assert len(live.losses) == 15
    assert first.losses == pytest.approx(live.losses, abs=2e-5)
    (two,) = run_ranks(1, run_stages, *argv, "--cache-features", "--feature-views", "2")
    assert two.losses[:10] == pytest.approx(live.losses[:10], abs=2e-5)
    assert two.losses[10:] != pytest.approx(live.losses[10:], abs=1e-4), "the third epoch has the first one's views"


def weights_in(folder: Path) -> str:
    """A file of weights, for layers whose statistics are to be kept."""
    torch.manual_seed(0)
    save_file(timm.create_model("test_efficientnet", num_classes=7).state_dict(), folder / "w.safetensors")
    return str(folder / "w.safetensors")


@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
def test_a_partly_closed_stage_on_features_is_the_live_run(photos: Path, tmp_path: Path, batch_norm: str) -> None:
    """Pictures that look the same in every epoch, on one process, and their features, on one and two."""
    argv = ("--data", str(photos), *MODEL, "--augment", "none", "--flip", "none", "--optimizer", "sgd", "--lr", "0.05")
    argv += ("--batch-norm", batch_norm, *(("--weights", weights_in(tmp_path)) if batch_norm == "frozen" else ()))

    def staged(name: str, cached: bool) -> tuple[str, ...]:
        stages = f"stages: [{{open: 0.5, epochs: 3, cache_features: {str(cached).lower()}}}]"
        (tmp_path / name).write_text(stages)
        return (*argv, "--preset", str(tmp_path / name))

    (live,) = run_ranks(1, run_stages, *staged("live.yaml", cached=False))
    (one,) = run_ranks(1, run_stages, *staged("cached.yaml", cached=True))
    assert len(live.losses) == 15
    assert one.losses == pytest.approx(live.losses, abs=2e-5)
    assert one.metrics[-1]["loss"] == pytest.approx(live.metrics[-1]["loss"], abs=2e-5)
    if batch_norm == "frozen":
        first, second = run_ranks(2, run_stages, *staged("cached.yaml", cached=True))
        assert largest_difference(first.states[-1], second.states[-1]) == 0
        assert first.losses == pytest.approx(live.losses, abs=2e-5)
