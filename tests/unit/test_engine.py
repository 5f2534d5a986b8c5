"""The step itself: normalisation, clipping, the scaler, frozen parts, and what must not happen inside it."""

from __future__ import annotations

import ast
import copy
import json
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from plain_stages import plain_stage as stage
from torch import Tensor, nn

from tuning.clipping import clipping
from tuning.data.loader import FeatureFeed, Micro
from tuning.data.mixing import Mixing, mixed
from tuning.data.sampling import TrainOrder
from tuning.engine import Step, train_steps
from tuning.entering import Entered, enter_stage
from tuning.errors import UserError
from tuning.losses import Loss, cross_entropy
from tuning.plan import make_plan
from tuning.progress import Progress
from tuning.safety.numerical_faults import NumericalFaults
from tuning.sizes import plan_batch
from tuning.stage_lists import standard_stages
from tuning.stages import Stage

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

IMAGES, CLASSES, SIZE = 13, 3, 32
ROOT = Path(__file__).parents[2]


def pictures() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(IMAGES, 3, SIZE, SIZE, generator=generator), torch.randint(
        0, CLASSES, (IMAGES,), generator=generator
    )


def network(name: str = "test_vit") -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=CLASSES, **({"img_size": SIZE} if "vit" in name else {}))


def enter(accelerator: Accelerator, model: nn.Module, chosen: Stage, micro: int) -> tuple[Entered, FeatureFeed]:
    (planned,) = make_plan([chosen], model, train_images=IMAGES, world_size=1, micro_batch=micro, image_size=SIZE)
    order = TrainOrder(IMAGES, 0, plan_batch(chosen.batch_size, micro, 1, IMAGES), 0)
    return enter_stage(accelerator, model, planned), FeatureFeed(*pictures(), order)


def counter(folder: Path, limit: int) -> NumericalFaults:
    rows = [{"image": {"bytes": None, "path": f"{row}.jpg"}} for row in range(IMAGES)]
    return NumericalFaults(limit, folder, Dataset.from_list(rows), writes=True)


def train(model: nn.Module, chosen: Stage, micro: int, clip_norm: float = 0.0) -> list[Step]:
    accelerator = Accelerator()
    entered, feed = enter(accelerator, model, chosen, micro)
    steps = train_steps(accelerator, entered, feed, cross_entropy(), clipping(clip_norm, None, None), Progress(), 0)
    return list(steps)


def plain_loop(model: nn.Module, chosen: Stage) -> list[float]:
    """The same epoch written out: the mean loss over each step's images, plain SGD."""
    images, labels = pictures()
    order = TrainOrder(IMAGES, 0, plan_batch(chosen.batch_size, chosen.batch_size, 1, IMAGES), 0)
    losses = []
    model.train()
    for items in order.micro_batches(0):
        rows = torch.tensor([item.row for item in items if item.weight])
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= chosen.lr * gradient
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_every_step_is_the_mean_over_its_images(micro: int) -> None:
    """13 images in steps of 4: the last step has one image, whatever the micro-batch."""
    model = network()
    reference = copy.deepcopy(model)
    losses = plain_loop(reference, stage())
    steps = train(model, stage(), micro)
    assert [step.images for step in steps] == [4, 4, 4, 1]
    assert [float(step.loss) for step in steps] == pytest.approx(losses, abs=1e-5)
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


class MixedFeed(FeatureFeed):
    """The pictures of a plain feed, mixed as pictures from a folder are."""

    def epoch(self, epoch: int, first_step: int = 0, run_step: int = 0) -> Iterator[Micro]:
        for micro in super().epoch(epoch, first_step):
            drawn = MIXING.draw(epoch, micro.rows.numpy(), micro.weights.numpy() > 0, SIZE)
            inputs, others = mixed(micro.inputs, drawn), micro.labels[drawn.partners]
            yield micro._replace(inputs=inputs, others=others, shares=drawn.shares)


MIXING = Mixing(1.0, 1.0, 0, IMAGES)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_step_of_mixed_images_is_the_mean_over_their_soft_targets(smoothing: float) -> None:
    """13 images in micro-batches of 2, written out with torch's cross-entropy of soft targets."""
    model, accelerator = network(), Accelerator()
    reference = copy.deepcopy(model)
    entered, plain = enter(accelerator, model, stage(), 2)
    feed, loss = MixedFeed(*pictures(), plain.order), cross_entropy(smoothing)
    steps = list(train_steps(accelerator, entered, feed, loss, clipping(0.0, None, None), Progress(), 0))
    micros, losses = list(feed.epoch(0)), []
    for step in steps:
        these = [micros.pop(0) for _ in range(-(-step.images // 2))]
        inputs, labels, weights, _, others, shares = (torch.cat(column) for column in zip(*these, strict=True))
        first, second = (nn.functional.one_hot(classes, CLASSES) for classes in (labels, others))
        target = shares[:, None] * first + (1 - shares[:, None]) * second
        real = weights > 0
        mean = nn.functional.cross_entropy(reference(inputs[real]), target[real], label_smoothing=smoothing)
        gradients = torch.autograd.grad(mean, list(reference.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(reference.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
        losses.append(float(mean.detach()))
    assert not micros
    assert [float(step.loss) for step in steps] == pytest.approx(losses, abs=1e-5)
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_images_that_are_all_their_own_train_as_unmixed_ones() -> None:
    """Shares of 1, to the bit; and without mixing the loss is called once a micro-batch."""
    states, calls = [], []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        calls[-1] += 1
        return cross_entropy()(logits, labels)

    class Own(FeatureFeed):
        def epoch(self, epoch: int, first_step: int = 0, run_step: int = 0) -> Iterator[Micro]:
            for micro in super().epoch(epoch, first_step):
                yield micro._replace(others=micro.labels.flip(0), shares=torch.ones(len(micro.labels)))

    for made in (FeatureFeed, Own):
        model, accelerator = network(), Accelerator()
        entered, plain = enter(accelerator, model, stage(), 2)
        calls.append(0)
        feed = made(*pictures(), plain.order)
        deque(train_steps(accelerator, entered, feed, loss, clipping(0.0, None, None), Progress(), 0))
        states.append(everything(model, entered))
    assert same(*states)
    assert calls == [7, 14]


def test_clipping_once_per_step_and_norm_before_it() -> None:
    model, free = network(), network()
    unclipped = train(free, stage(epochs=1), 2)
    clipped = train(model, stage(epochs=1), 2, clip_norm=1e-3)
    assert float(clipped[0].grad_norm) == pytest.approx(float(unclipped[0].grad_norm), rel=1e-4)
    assert float(clipped[0].grad_norm) > 1e-2
    fresh = network()
    moved = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), fresh.parameters(), strict=True)]).norm()
    assert float(moved) <= 0.1 * 1e-3 * len(clipped) * 1.01


def test_scaler_skips_and_counts_infinite_gradients(tmp_path: Path) -> None:
    """A real GradScaler around the engine: one step's loss overflows; the update is left out, the next ones go on."""
    model = network()
    accelerator = Accelerator()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    entered, feed = enter(accelerator, model, stage(), 2)
    assert entered.optimizer.scaler is accelerator.scaler  # type: ignore[attr-defined]
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    calls = iter(range(100))

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        factor = float("inf") if next(calls) == 3 else 1.0  # second step, second micro-batch
        return cross_entropy()(logits, labels) * factor

    progress, states = Progress(), [copy.deepcopy(model.state_dict())]
    faults, norms = counter(tmp_path, limit=10), []
    for step in train_steps(accelerator, entered, feed, loss, clipping(0.0, None, None), progress, 0):
        states.append(copy.deepcopy(model.state_dict()))
        norms.append(float(step.grad_norm))
        faults.count(step, float(step.loss), norms[-1], progress)
    moved = [any(not torch.equal(a[k], b[k]) for k in a) for a, b in pairwise(states)]
    assert moved == [True, False, True, True]
    assert progress.skipped == 1
    assert accelerator.scaler.get_scale() == 2.0**9
    AcceleratorState._reset_state(reset_partial_state=True)
    plain = train(network(), stage(), 2)
    assert norms[0] == pytest.approx(float(plain[0].grad_norm), rel=1e-4), "the norm is that of unscaled gradients"


def test_closed_part_rests_and_keeps_no_gradients() -> None:
    model = network("test_efficientnet")
    (head_stage, *_) = standard_stages(stage(batch_norm="train"), 1, 0.1, "all")
    entered, feed = enter(Accelerator(), model, head_stage, 2)
    assert [
        name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d) and module.training
    ] == []
    for _ in train_steps(Accelerator(), entered, feed, cross_entropy(), clipping(0.0, None, None), Progress(), 0):
        assert entered.trained.training
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"classifier"}
    assert all(p.grad is None for p in model.parameters())


def test_fused_optimizer_and_channels_last_inputs() -> None:
    from tuning.data.transforms import Normalise

    entered, _ = enter(Accelerator(), network(), stage(optimizer="adamw"), 2)
    assert entered.optimizer.param_groups[0]["fused"] is True
    inputs = Normalise((0.5,) * 3, (0.5,) * 3)(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert inputs.is_contiguous(memory_format=torch.channels_last)


def test_nothing_in_the_step_waits_for_the_device() -> None:
    """No `.item()`, `.tolist()`, `.cpu()` or `float(...)` in the engine or in the loss and clipping it calls."""
    waiting = {"item", "tolist", "cpu", "numpy", "synchronize"}
    for module in ("engine", "losses", "clipping"):
        tree = ast.parse((ROOT / "tuning" / f"{module}.py").read_text())
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not [c.attr for c in calls if isinstance(c, ast.Attribute) and c.attr in waiting], module
        if module == "engine":
            assert not [c for c in calls if isinstance(c, ast.Name) and c.id == "float"]


def test_training_mode_returns_after_an_evaluation_between_steps() -> None:
    model = network()
    accelerator = Accelerator()
    entered, feed = enter(accelerator, model, stage(epochs=2), 2)
    modes = []
    for step in train_steps(accelerator, entered, feed, cross_entropy(), clipping(0.0, None, None), Progress(), 0):
        modes.append(model.training)
        if step.ends_epoch:
            model.eval()
    assert all(modes)


def test_break_and_go_on_is_the_same_run() -> None:
    """`break` at any step, then a new generator from the same progress."""
    whole = network()
    train(whole, stage(epochs=2), 2)
    model, accelerator, progress = network(), Accelerator(), Progress()
    entered, feed = enter(accelerator, model, stage(epochs=2), 2)
    clip = clipping(0.0, None, None)
    while progress.stage_step < 8:
        for step in train_steps(accelerator, entered, feed, cross_entropy(), clip, progress, 0):
            if step.step % 3 == 0:
                break
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def loss_with(faults: dict[int, float]) -> Loss:
    """Cross-entropy, but for the forward passes in *faults*, whose losses are multiplied by the number there."""
    calls = iter(range(1000))

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy()(logits, labels) * faults.get(next(calls), 1.0)

    return loss


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lamb"])
@pytest.mark.parametrize("bad", [0, 5])
def test_a_step_that_is_not_finite_leaves_no_trace(optimizer: str, bad: int) -> None:
    """Skipped at the very first step too, where torch's fused SGD would leave a momentum that was never written."""
    chosen = stage(optimizer=optimizer, momentum=0.9, lr=1e-2, batch_norm="train", epochs=2)
    states = []
    for fault in (float("nan"), float("inf")):
        model, accelerator = network("test_efficientnet"), Accelerator()
        entered, feed = enter(accelerator, model, chosen, 4)
        assert entered.statistics
        steps = train_steps(
            accelerator, entered, feed, loss_with({bad: fault}), clipping(1.0, None, None), Progress(), 0
        )
        after = [everything(model, entered)]
        finite = []
        for step in steps:
            after.append(everything(model, entered))
            finite.append(bool(step.grad_norm.isfinite() & step.loss.isfinite()))
        assert [n for n, ok in enumerate(finite) if not ok] == [bad]
        assert [n for n in range(1, 8) if same(after[n], after[n + 1])] == [bad] * (bad > 0)
        states.append(after[-1])
    assert same(*states)
    assert all(tensor.isfinite().all() for tensor in states[0])


def everything(model: nn.Module, entered: Entered) -> list[Tensor]:
    """Copies of parameters, running statistics and the optimizer's tensors."""
    counters = "num_batches_tracked"  # changes nothing where a momentum is given
    state = [tensor for name, tensor in model.state_dict().items() if not name.endswith(counters)]
    kept = [value for slots in entered.optimizer.state.values() for value in slots.values()]
    return [tensor.clone() for tensor in (*state, *kept) if isinstance(tensor, Tensor)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_an_infinite_loss_with_finite_gradients_is_left_out_too() -> None:
    model, accelerator = network(), Accelerator()
    entered, feed = enter(accelerator, model, stage(), 4)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy()(logits, labels) + float("inf")

    before = everything(model, entered)
    step = next(train_steps(accelerator, entered, feed, loss, clipping(0.0, None, None), Progress(), 0))
    assert not step.grad_norm.isfinite()
    assert same(before, everything(model, entered))


def test_too_many_in_a_row_end_the_run_with_their_images(tmp_path: Path) -> None:
    model, accelerator, progress = network(), Accelerator(), Progress(stage=1)
    entered, feed = enter(accelerator, model, stage(epochs=3), 4)
    loss = loss_with({n: float("nan") for n in (1, 4, 5, 6)})
    faults = counter(tmp_path / "faults", limit=3)
    steps = train_steps(accelerator, entered, feed, loss, clipping(0.0, None, None), progress, 0)
    with pytest.raises(UserError, match=r"3 optimizer steps in a row.*first step 5 in stage 2") as caught:
        deque(faults.count(step, float(step.loss), float(step.grad_norm), progress) for step in steps)
    assert (progress.step, progress.skipped, progress.skipped_in_a_row) == (7, 4, 3)
    (path,) = (tmp_path / "faults").iterdir()
    assert str(path) in str(caught.value)
    seen = json.loads(path.read_text())
    assert (seen["step"], seen["epoch"], seen["stage"], seen["loss"]) == (5, 1, 1, "nan")
    drawn = [item.row for item in next(feed.order.micro_batches(1)) if item.weight]
    assert seen["images"] == [f"{row}.jpg" for row in drawn]
    assert seen["lr"] == dict.fromkeys(seen["lr"], 0.1)
