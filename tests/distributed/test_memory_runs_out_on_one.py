"""Memory runs out on rank 1 only: both ranks begin the step anew with smaller micro-batches, and train the same run."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import timm
import torch
from accelerate import Accelerator
from plain_stages import plain_stage
from ranks import run_ranks
from short_memory import ShortMemory, Where
from stage_runs import largest_difference, state_of
from torch import Tensor, nn

from tuning import session
from tuning.clipping import clipping
from tuning.data.loader import FeatureFeed
from tuning.data.sampling import TrainOrder
from tuning.engine import train_steps
from tuning.entering import enter_stage
from tuning.errors import UserError
from tuning.losses import cross_entropy
from tuning.plan import at_micro_batch, make_plan
from tuning.progress import Progress
from tuning.safety.agreement import average_statistics, refuse_drift

IMAGES, CLASSES, SIZE, BATCH = 44, 3, 32, 16  # steps of 16, 16, 12 images; 8 a process
MIDDLE = {"test_vit": "blocks.1", "test_efficientnet": "blocks.2"}


@dataclass
class Trained:
    """What one process saw: per optimizer step, and at the end."""

    micro: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    lrs: list[dict[str, float]] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    recorded: list[int | None] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    error: str = ""


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=CLASSES, **({"img_size": SIZE} if "vit" in name else {}))


def pictures() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 3, SIZE, SIZE, generator=generator)
    return images, torch.randint(0, CLASSES, (IMAGES,), generator=generator)


def train(
    micro: int,
    short: ShortMemory | None = None,
    stages: int = 1,
    failing_stage: int = 0,
    name: str = "test_vit",
    views: bool = True,
) -> Trained:
    """Stages of two epochs; where *short* is given it makes rank 1, and it alone, run out of memory in one of them."""
    accelerator = session.start("fp32", 1) if views else Accelerator()  # gradients as views of buckets, or not
    model, seen = network(name), Trained()
    chosen = [plain_stage(name=str(n), open=("head", "all")[n + 2 - stages], epochs=2, lr=0.02, momentum=0.9,
                          batch_size=BATCH, batch_norm="train", schedule="cosine") for n in range(stages)]  # fmt: skip
    world = accelerator.num_processes
    plan = make_plan(chosen, model, train_images=IMAGES, world_size=world, micro_batch=micro, image_size=SIZE)
    progress, entered = Progress(), None
    for number, planned in enumerate(plan):
        if short and number == failing_stage and accelerator.process_index == 1:
            short.watch(model.get_submodule(MIDDLE[name]))
        entered = enter_stage(accelerator, model, at_micro_batch(planned, progress.micro_batch), before=entered)
        feed = FeatureFeed(*pictures(), TrainOrder(IMAGES, 0, planned.batch, accelerator.process_index))
        try:
            clip = clipping(1.0, None, None)
            for step in train_steps(accelerator, entered, feed, cross_entropy(), clip, progress, 0):
                seen.micro.append(step.order.batch.micro_batch)
                seen.losses.append(float(step.loss))
                seen.rows.append(step.rows)
                seen.lrs.append(step.lrs)
                seen.recorded.append(progress.micro_batch)
        except UserError as error:
            seen.error = str(error)
        refuse_drift(accelerator, nn.ParameterList(model.parameters()))
        average_statistics(accelerator, entered.statistics.values())
        progress.stage, progress.stage_step, progress.micro_batch = number + 1, 0, None
    seen.failed = short.failed if short else []
    seen.state = {n: t for n, t in state_of(model).items() if "num_batches" not in n}
    return seen


def pair(*args: object, **options: object) -> list[Trained]:
    return run_ranks(2, _named, args, options)


def _named(args: tuple[object, ...], options: dict[str, object]) -> Trained:
    return train(*args, **copy.deepcopy(options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def small() -> Trained:
    """The run that has small micro-batches from the start."""
    return pair(2)[0]


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(
    ("micro", "first", "micros"),
    [
        (8, 0, [2] * 6),  # the first step, twice: DDP is as it was made
        (8, 1, [8] + [2] * 5),  # the second, before which DDP arranges its buckets anew
        (8, 4, [8] * 4 + [2] * 2),
        (4, 0, [2] * 6),  # in a micro-batch whose gradients are not exchanged
        (4, 1, [2] * 6),  # in the one whose gradients are
        (4, 2, [4] + [2] * 5),
        (4, 7, [4] * 3 + [2] * 3),
    ],
)
def test_one_rank_without_memory(small: Trained, where: Where, micro: int, first: int, micros: list[int]) -> None:
    ranks = pair(micro, short=ShortMemory(where, fits=2, first=first))
    assert len(ranks[0].state) > 20
    assert ranks[0].failed == []
    assert ranks[1].failed == ([8, 4] if micro == 8 else [4])
    for seen in ranks:
        assert seen.micro == micros
        assert seen.recorded == [None if size == micro else 2 for size in micros]
        assert seen.rows == small.rows
        assert seen.lrs == small.lrs
        assert seen.losses == pytest.approx(small.losses, abs=1e-5)
    assert largest_difference(ranks[0].state, ranks[1].state) == 0
    assert largest_difference(ranks[0].state, small.state) < 1e-5


@pytest.mark.parametrize("first", [0, 1, 2])
def test_gradients_that_are_no_views_of_buckets(small: Trained, first: int) -> None:
    for seen in pair(4, short=ShortMemory("backward", fits=2, first=first), views=False):
        assert largest_difference(seen.state, small.state) < 1e-5


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_in_the_first_step_of_a_later_stage(where: Where) -> None:
    reference, _ = pair(4, stages=2)
    ranks = pair(4, short=ShortMemory(where, fits=2), stages=2, failing_stage=1)
    assert ranks[1].failed == [4]
    for seen in ranks:
        assert seen.micro == [4] * 6 + [2] * 6
        assert seen.recorded == [None] * 6 + [2] * 6
        assert (seen.rows, seen.lrs) == (reference.rows, reference.lrs)
        assert largest_difference(seen.state, reference.state) < 1e-5
    assert ranks[0].lrs[0].keys() != ranks[0].lrs[-1].keys()


def test_a_later_stage_begins_large_again() -> None:
    for seen in pair(4, short=ShortMemory("forward", fits=2, times=1), stages=2, failing_stage=0):
        assert seen.micro == [2] * 6 + [4] * 6


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_running_statistics_forget_the_attempt(where: Where) -> None:
    """BatchNorm in training mode sees micro-batches: from the step that failed on it is as with small ones."""
    small, _ = pair(4, name="test_efficientnet")
    ranks = pair(8, short=ShortMemory(where, fits=4), name="test_efficientnet")
    assert ranks[1].failed == [8]
    assert sum("running_" in name for name in small.state) > 10
    for seen in ranks:
        assert seen.losses == small.losses
        assert largest_difference(seen.state, small.state) == 0


def test_one_image_that_does_not_fit_ends_the_run_on_both() -> None:
    ranks = pair(4, short=ShortMemory("backward", fits=0))
    assert ranks[1].failed == [4, 2, 1]
    for seen in ranks:
        assert "out of memory at step 1: not even one image" in seen.error
        assert "--image-size" in seen.error
