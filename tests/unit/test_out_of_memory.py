"""Memory that runs out, on one process: what counts as that, and how training and evaluation go on."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from pictures import write_classes
from plain_stages import plain_stage
from short_memory import ShortMemory, Where
from torch import Tensor, nn

from tuning.clipping import clipping
from tuning.data.loader import FeatureFeed, Micro, TrainFeed
from tuning.data.mixing import Mixing
from tuning.data.sampling import TrainOrder
from tuning.data.sources import open_data
from tuning.data.transforms import Crop, Normalise
from tuning.engine import Step, train_steps
from tuning.entering import Entered, enter_stage
from tuning.errors import UserError
from tuning.judging.evaluation import evaluate
from tuning.losses import cross_entropy
from tuning.plan import at_micro_batch, make_plan
from tuning.preflight.memory import fitting_micro_batch
from tuning.progress import Progress
from tuning.safety.out_of_memory import InParts, is_out_of_memory
from tuning.sizes import BatchPlan

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

IMAGES, CLASSES, SIZE, BATCH = 44, 3, 32, 16


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (torch.cuda.OutOfMemoryError(), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (torch.distributed.DistBackendError("NCCL: can't allocate memory"), False),
        (OSError("Cannot allocate memory"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, counts: bool) -> None:
    assert is_out_of_memory(error) is counts


def test_the_cpu_allocator_is_understood() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)


def network(name: str = "test_vit", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": SIZE} if "vit" in name else {}
    return timm.create_model(name, num_classes=CLASSES, **size, **options)  # type: ignore[no-any-return]


def pictures() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 3, SIZE, SIZE, generator=generator)
    return images, torch.randint(0, CLASSES, (IMAGES,), generator=generator)


def entered_with(
    model: nn.Module, micro: int, accelerator: Accelerator | None = None, **changes: object
) -> tuple[Accelerator, Entered, FeatureFeed]:
    accelerator = accelerator or Accelerator()
    stage = plain_stage(**{"batch_size": BATCH, "epochs": 2, "lr": 0.02, "momentum": 0.9, **changes})
    (planned,) = make_plan([stage], model, train_images=IMAGES, world_size=1, micro_batch=micro, image_size=SIZE)
    feed = FeatureFeed(*pictures(), TrainOrder(IMAGES, 0, planned.batch, 0))
    return accelerator, enter_stage(accelerator, model, planned), feed


def train(model: nn.Module, micro: int, progress: Progress | None = None, **changes: object) -> list[Step]:
    accelerator, entered, feed = entered_with(model, micro, **changes)
    clip = clipping(1.0, None, None)
    return list(train_steps(accelerator, entered, feed, cross_entropy(), clip, progress or Progress(), 0))


def equal(a: nn.Module, b: nn.Module) -> bool:
    states = zip(a.state_dict().items(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for (name, x), y in states if "num_batches" not in name)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])
def test_the_run_is_that_of_small_micro_batches(name: str, where: Where) -> None:
    """Bit for bit, dropout and trained BatchNorm included: nothing of the failed attempts is left."""
    small, model = network(name, drop_rate=0.3), network(name, drop_rate=0.3)
    reference = train(small, 4, batch_norm="train")
    short, progress = ShortMemory(where, fits=4), Progress()
    short.watch(model.get_submodule({"test_vit": "blocks.1", "test_efficientnet": "blocks.2"}[name]))
    steps = train(model, 16, progress, batch_norm="train")
    assert short.failed == [16, 8]
    assert [(s.step, s.rows, s.lrs, s.images) for s in steps] == [(s.step, s.rows, s.lrs, s.images) for s in reference]
    assert torch.equal(torch.stack([s.loss for s in steps]), torch.stack([s.loss for s in reference]))
    assert equal(model, small)
    assert progress.micro_batch == 4
    assert [s.order.batch.accumulation for s in steps] == [4] * 6


def test_it_is_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    model = network()
    ShortMemory("backward", fits=8, first=2).watch(model.blocks)  # type: ignore[arg-type]
    train(model, 16)
    seen, done = capfd.readouterr().err.splitlines()
    assert seen == "note: process 0 ran out of memory: OutOfMemoryError: out of memory with 16 images"
    assert done == (
        "note: out of memory at step 3: micro-batch 16 -> 8, accumulation 1 -> 2; the global batch and the learning "
        "rate stay."
    )


def test_other_errors_end_the_run() -> None:
    accelerator, entered, feed = entered_with(network(), 16)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        next(train_steps(accelerator, entered, feed, loss, clipping(1.0, None, None), Progress(), 0))
    assert feed.order.batch.micro_batch == 16


def test_not_even_one_image() -> None:
    model = network()
    ShortMemory("backward", fits=0, first=0).watch(model.blocks)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"at step 1: not even one image.*--image-size"):
        train(model, 16)
    assert all(p.grad is None for p in model.parameters())


def test_the_update_has_no_second_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    accelerator, entered, feed = entered_with(model, 16)

    def step(*_: object) -> None:
        raise torch.OutOfMemoryError("no room for state")

    monkeypatch.setattr(entered.optimizer.optimizer, "step", step)
    with pytest.raises(UserError, match=r"in the update of step 1.*--optimizer"):
        next(train_steps(accelerator, entered, feed, cross_entropy(), clipping(1.0, None, None), Progress(), 0))


class Held:
    """Something that lives as long as the graph of a forward pass."""


class Holding(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, inputs: Tensor, held: Held) -> Tensor:
        context.held = held
        return inputs.view_as(inputs)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_nothing_holds_the_activations_of_a_failed_attempt(where: Where) -> None:
    """They must be gone before the next attempt, or it fails too."""
    model, graphs, alive = network(), [], []

    def note(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        alive.append(sum(graph() is not None for graph in graphs))
        held = Held()
        graphs.append(weakref.ref(held))
        return Holding.apply(output, held)  # type: ignore[no-any-return]

    model.patch_embed.register_forward_hook(note)  # type: ignore[operator, union-attr]
    ShortMemory(where, fits=4).watch(model.blocks)  # type: ignore[arg-type]
    train(model, 16, epochs=1)
    assert alive[:3] == [0, 0, 0], "attempts with 16, 8 and 4 images"


def test_the_scaler_has_seen_nothing() -> None:
    model, accelerator = network(), Accelerator()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    _, entered, feed = entered_with(model, 16, accelerator=accelerator)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    ShortMemory("backward", fits=8, first=1).watch(model.blocks)  # type: ignore[arg-type]
    scales = []
    for _ in train_steps(accelerator, entered, feed, cross_entropy(), clipping(1.0, None, None), Progress(), 0):
        scales.append(accelerator.scaler.get_scale())
    assert scales == [2.0**10, 2.0**11, 2.0**11, 2.0**12, 2.0**12, 2.0**13]


def batches_of(feed: TrainFeed, epoch: int, first: int, most: int | None = None) -> list[Micro]:
    found = []
    for micro in feed.epoch(epoch, first):
        found.append(micro)
        if len(found) == most:
            break
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_begin_again_in_the_middle_of_an_epoch(tmp_path: Path, workers: int) -> None:
    """The same loader processes, with batches of the old size still under way."""
    write_classes(tmp_path / "photos", {"cat": 20, "dog": 20})
    data = open_data(
        str(tmp_path / "photos"), image_column=None, label_column=None, train_split=None, eval_split=None,
        val_fraction=0.25, seed=0, limit_train=None, limit_eval=None,
    )  # fmt: skip

    def feed(micro: int) -> TrainFeed:
        order = TrainOrder(len(data.train), 0, BatchPlan(8, micro, 1), 0)
        crop, normalise = Crop(16, "bilinear", 1.0), Normalise((0.5,) * 3, (0.5,) * 3)
        return TrainFeed(
            data.train, order, crop, normalise, augment="medium", flip="both", workers=workers,
            device=torch.device("cpu"), mixing=Mixing(0.4, 1.0, 0, len(data.train)),
        )  # fmt: skip

    shrinking, small, copied = feed(8), feed(2), None
    assert len(data.train) == 30
    assert [len(m.labels) for m in batches_of(shrinking, 0, 0, most=2)] == [8, 8]
    copied = copy.copy(shrinking)  # as the LR finder has one
    assert copied.shrink()
    assert shrinking.shrink()
    assert copied.order == shrinking.order == small.order
    assert copied.shrunk_to == shrinking.shrunk_to == 2
    for epoch, first in ((0, 1), (1, 0)):
        ours, theirs = batches_of(shrinking, epoch, first), batches_of(small, epoch, first)
        assert len(ours) == len(theirs) == 15 - 4 * first
        for a, b in zip(ours, theirs, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_stage_goes_on_with_what_fitted() -> None:
    (planned,) = make_plan(
        [plain_stage(batch_size=BATCH)], network(), train_images=IMAGES, world_size=2, micro_batch=8, image_size=SIZE
    )
    assert at_micro_batch(planned, None) is planned
    smaller = at_micro_batch(planned, 2)
    assert smaller.batch == BatchPlan(BATCH, 2, 2)
    assert (smaller.steps, smaller.groups) == (planned.steps, planned.groups)


def test_an_evaluation_goes_on_in_parts() -> None:
    model = network().eval()
    images, labels = pictures()
    whole = [Micro(images, labels, torch.ones(IMAGES), torch.arange(IMAGES))] * 2
    accelerator, sizes = Accelerator(), []
    expected = evaluate(accelerator, model, whole[:1], IMAGES, CLASSES)

    def short(_module: nn.Module, inputs: tuple[Tensor]) -> None:
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > 15:
            raise torch.OutOfMemoryError("no memory")

    model.register_forward_pre_hook(short)
    found = evaluate(accelerator, model, whole[:1], IMAGES, CLASSES)
    assert found == pytest.approx(expected, abs=1e-6)
    assert sizes == [44, 22, 11, 11, 11, 11]
    parts = InParts(model)
    assert torch.allclose(parts(images), torch.cat([model(part) for part in images.split(11)]))
    sizes.clear()
    parts(images)
    assert sizes == [11] * 4, "the size that fits is remembered"


def test_an_evaluation_of_one_image_that_does_not_fit() -> None:
    def forward(inputs: Tensor) -> Tensor:
        raise MemoryError

    with pytest.raises(UserError, match="not even one image"):
        InParts(forward)(torch.zeros(8, 3))


def test_the_preflight_learns_what_does_not_fit() -> None:
    """The engine would go on with smaller micro-batches there, too."""
    model = network()
    ShortMemory("backward", fits=1).watch(model.blocks)  # type: ignore[arg-type]
    stage = plain_stage(batch_size=BATCH)
    (planned,) = make_plan([stage], model, train_images=IMAGES, world_size=1, micro_batch=16, image_size=SIZE)
    accelerator = Accelerator()
    entered = enter_stage(accelerator, model, planned)
    with pytest.raises(torch.OutOfMemoryError, match="2 pictures don't fit"):
        fitting_micro_batch(accelerator, entered, planned, CLASSES, cross_entropy(), clipping(1.0, None, None))
    assert all(p.grad is None for p in model.parameters())
