"""What makes it fast, as facts about the structure: no times, so nothing here depends on the machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from pictures import encode, noise
from plain_stages import plain_stage
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tuning.clipping import clipping
from tuning.data.loader import FeatureFeed, Micro, TrainFeed
from tuning.data.sampling import TrainOrder
from tuning.data.transforms import Crop, Normalise
from tuning.engine import Step, train_steps
from tuning.entering import Entered, enter_stage
from tuning.errors import UserError
from tuning.features import CHECKED, compute_features
from tuning.losses import Loss, cross_entropy
from tuning.plan import make_plan
from tuning.progress import Progress

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
IMAGES, CLASSES, SIZE, MICRO = 8, 3, 32, 4
CPU = torch.device("cpu")


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=CLASSES)


def entered_with(model: nn.Module, **stage: Any) -> tuple[Accelerator, Entered, FeatureFeed]:
    """A stage of two steps of two micro-batches, on pictures as the loader hands them to the model."""
    accelerator = Accelerator()
    (planned,) = make_plan(
        [plain_stage(**stage)], model, train_images=IMAGES, world_size=1, micro_batch=MICRO, image_size=SIZE
    )
    pixels = torch.randint(0, 256, (IMAGES, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(1))
    inputs = Normalise((0.5,) * 3, (0.25,) * 3)(pixels.byte())
    feed = FeatureFeed(inputs, torch.arange(IMAGES) % CLASSES, TrainOrder(IMAGES, 0, planned.batch, 0))
    return accelerator, enter_stage(accelerator, model, planned), feed


def steps(accelerator: Accelerator, entered: Entered, feed: FeatureFeed, loss: Loss | None = None) -> Iterator[Step]:
    clip = clipping(1.0, None, None)
    return train_steps(accelerator, entered, feed, loss or cross_entropy(), clip, Progress(), 0)


@dataclass(frozen=True)
class OnePass:
    """Every image of a feed once."""

    feed: FeatureFeed

    @property
    def order(self) -> TrainOrder:
        return self.feed.order

    def __iter__(self) -> Iterator[Micro]:
        return self.feed.epoch(0)


@contextmanager
def watched(model: nn.Module, see: Callable[[str, nn.Module, Tensor], None]) -> Iterator[None]:
    """In the body, *see* is told of what every module without children puts out."""
    leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
    hooks = [
        module.register_forward_hook(lambda module, _, output, name=name: see(name, module, output))
        for name, module in leaves
    ]
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("depth", ["head", 1])
def test_closed_layers_run_in_eval_without_a_graph(depth: str | int) -> None:
    """In a step of the engine itself: nothing below the lowest open layer has a gradient function or trains."""
    model = network("test_efficientnet")
    accelerator, entered, feed = entered_with(model, open=depth, batch_norm="train")
    graph: dict[str, bool] = {}
    modes: dict[str, bool] = {}

    def see(name: str, module: nn.Module, output: Tensor) -> None:
        graph[name], modes[name] = output.requires_grad or output.grad_fn is not None, module.training

    with watched(model, see):
        next(steps(accelerator, entered, feed))
    opened = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    first = next(number for number, name in enumerate(graph) if name in opened)
    assert first > 5
    assert not any(list(graph.values())[:first])
    assert list(graph.values())[first]
    closed = [name for name in list(graph)[:first] if list(model.get_submodule(name).parameters())]
    assert not any(modes[name] for name in closed)
    assert all(modes[name] for name in opened if name in modes)


def test_a_head_alone_keeps_no_activations_of_what_is_closed() -> None:
    """All that the step keeps for its backward pass is a few rows of features; with everything open it is maps."""
    kept: dict[str, int] = {}
    for depth in ("head", "all"):
        model = network("test_efficientnet")
        accelerator, entered, feed = entered_with(model, open=depth)
        held = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        sizes: list[int] = []

        def pack(tensor: Tensor, held: set[int] = held, sizes: list[int] = sizes) -> Tensor:
            sizes.append(0 if tensor.data_ptr() in held else tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            next(steps(accelerator, entered, feed))
        kept[depth] = sum(sizes)
    features = MICRO * model.num_features  # type: ignore[operator]
    assert kept["head"] <= 2 * features
    assert kept["all"] > 20 * features


@pytest.mark.parametrize("depth", ["head", 1])
def test_closed_parameters_have_neither_gradients_nor_state(depth: str | int) -> None:
    model = network("test_efficientnet")
    accelerator, entered, feed = entered_with(model, open=depth, optimizer="adamw")
    seen: list[set[str]] = []

    def clip(trained: nn.Module) -> Tensor:
        seen.append({name for name, p in model.named_parameters() if p.grad is not None})
        return clipping(1.0, None, None)(trained)

    opened = {name for name, p in model.named_parameters() if p.requires_grad}
    list(train_steps(accelerator, entered, feed, cross_entropy(), clip, Progress(), 0))
    assert seen == [opened, opened]
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in entered.optimizer.state} == opened


def test_rates_of_open_groups_are_those_of_a_loaded_state() -> None:
    """Which groups are open is asked once a stage; loading a checkpoint then brings other groups."""
    _, entered, _ = entered_with(network("test_efficientnet"), open="head", optimizer="adamw", lr=0.25)
    (name,) = entered.lrs
    assert entered.lrs == {name: 0.25}
    state = entered.optimizer.state_dict()
    entered.optimizer.load_state_dict({**state, "param_groups": [g | {"lr": 0.125} for g in state["param_groups"]]})
    assert entered.lrs == {name: 0.125}


def test_features_cost_four_pictures_more_than_a_pass() -> None:
    """The four whose logits show that the head classifies what was computed."""
    model, seen = network("test_efficientnet"), []
    accelerator, _, feed = entered_with(model, open="head")
    handle = model.conv_stem.register_forward_hook(lambda _, inputs, output: seen.append(len(output)))
    compute_features(accelerator, model, OnePass(feed))
    handle.remove()
    assert sum(seen) == IMAGES + CHECKED


def test_a_head_that_does_more_than_classify_is_refused() -> None:
    model = network("test_efficientnet")
    accelerator, _, feed = entered_with(model, open="head")
    compute_features(accelerator, model, OnePass(feed))
    model.register_forward_hook(lambda module, inputs, logits: logits.flip(1))
    with pytest.raises(UserError, match="does more than classify pooled features"):
        compute_features(accelerator, model, OnePass(feed))


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_the_fused_optimizer_is_chosen_and_updates_open_groups_only(name: str) -> None:
    model = network("test_efficientnet")
    accelerator, entered, feed = entered_with(model, open="head", optimizer=name, momentum=0.9)
    groups = [id(group) for group in entered.optimizer.param_groups]
    updated: list[int] = []
    entered.optimizer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: updated.append(len(optimizer.param_groups))
    )
    next(steps(accelerator, entered, feed))
    assert all(group["fused"] is True for group in entered.optimizer.param_groups)
    assert updated == [2], "weight and bias of the head"
    assert [id(group) for group in entered.optimizer.param_groups] == groups


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_convnext"])
@pytest.mark.parametrize("depth", ["head", "all"])
def test_channels_last_is_kept_through_the_network(name: str, depth: str) -> None:
    model = network(name)
    accelerator, entered, feed = entered_with(model, open=depth)
    other: list[str] = []

    def see(name: str, module: nn.Module, output: Tensor) -> None:
        if isinstance(module, nn.Conv2d) and not output.is_contiguous(memory_format=torch.channels_last):
            other.append(name)

    with watched(model, see):
        next(steps(accelerator, entered, feed))
    assert other == []


def test_workers_hand_over_uint8_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """What crosses from a worker is a quarter of float32, in the order that the model takes."""
    rows = [{"image": {"bytes": encode(noise(48, 40, seed)), "path": None}, "label": 0} for seed in range(IMAGES)]
    (planned,) = make_plan(
        [plain_stage()], network("test_vit"), train_images=IMAGES, world_size=1, micro_batch=MICRO, image_size=160
    )
    crop, normalise = Crop(SIZE, "bilinear", 1.0), Normalise((0.5,) * 3, (0.25,) * 3)
    order = TrainOrder(IMAGES, 0, planned.batch, 0)
    feed = TrainFeed(rows, order, crop, normalise, augment="light", flip="horizontal", workers=1, device=CPU)
    batches: list[Any] = []
    to_device = TrainFeed._to_device
    monkeypatch.setattr(
        TrainFeed, "_to_device", lambda self, batch, size: (batches.append(batch), to_device(self, batch, size))[1]
    )
    (micro, *_) = list(feed.epoch(0))
    assert [batch.images.dtype for batch in batches] == [torch.uint8] * 2
    assert all(batch.images.is_contiguous(memory_format=torch.channels_last) for batch in batches)
    assert micro.inputs.dtype == torch.float32
    assert micro.inputs.is_contiguous(memory_format=torch.channels_last)


class Waited(AssertionError):
    """The host asked the device for a number."""


class NothingWaits(TorchDispatchMode):
    """Raises where the host would wait for a GPU: `.item()` and all that comes down to it (float, int, bool, if)."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masked = function is torch.ops.aten.index.Tensor and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if masked or function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise Waited(str(function))
        return function(*args, **(kwargs or {}))


@contextmanager
def nothing_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a CPU `.cpu()`, `.tolist()` and `.numpy()` reach no operation of torch, so these raise by name."""

    def refuse(name: str) -> Callable[..., None]:
        def refused(*_: Any, **__: Any) -> None:
            raise Waited(name)

        return refused

    with monkeypatch.context() as patched, NothingWaits():
        for name in ("cpu", "tolist", "numpy"):
            patched.setattr(torch.Tensor, name, refuse(name))
        yield


@pytest.mark.parametrize("stage", [{"open": "head"}, {"open": "all", "batch_norm": "train"}], ids=["head", "all"])
@pytest.mark.parametrize("clip", [(1.0, None, None), (0.0, 0.1, None), (0.0, None, 0.1)], ids=["norm", "value", "agc"])
def test_nothing_in_a_step_asks_the_device(
    monkeypatch: pytest.MonkeyPatch, stage: dict[str, Any], clip: tuple[Any, Any, Any]
) -> None:
    accelerator, entered, feed = entered_with(network("test_efficientnet"), optimizer="adamw", **stage)
    loop = train_steps(accelerator, entered, feed, cross_entropy(0.1), clipping(*clip), Progress(), 0)
    with nothing_waits(monkeypatch):
        assert len(list(loop)) == 2


CULPRITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "int": lambda x: int(x.sum()),
    "if": lambda x: 1 if x.sum() > 0 else 0,
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "mask": lambda x: x[x > 0],
}


@pytest.mark.parametrize("culprit", CULPRITS)
def test_what_asks_the_device_is_noticed(monkeypatch: pytest.MonkeyPatch, culprit: str) -> None:
    accelerator, entered, feed = entered_with(network("test_efficientnet"), open="head")

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        CULPRITS[culprit](logits.detach())
        return cross_entropy()(logits, labels)

    with pytest.raises(Waited), nothing_waits(monkeypatch):
        next(steps(accelerator, entered, feed, loss))
