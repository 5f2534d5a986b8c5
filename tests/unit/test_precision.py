"""Weights in bf16: master weights against the same step written out, pure bf16 and what it loses, refusals."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from accelerate import Accelerator
from plain_stages import plain_stage
from torch import Tensor, nn

from tuning import session, sharding
from tuning.cli.command_line import parse_command
from tuning.clipping import clipping
from tuning.data.loader import FeatureFeed
from tuning.data.sampling import TrainOrder
from tuning.engine import train_steps
from tuning.entering import Entered, enter_stage
from tuning.errors import UserError
from tuning.losses import cross_entropy
from tuning.plan import make_plan
from tuning.precision import Level, LowPrecision, cast_weights, level_of, remember
from tuning.progress import Progress
from tuning.stages import Stage

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

IMAGES, CLASSES, SIZE = 12, 3, 32
LOW: tuple[Level, ...] = ("bf16-master", "bf16-pure")


def network(name: str = "test_vit") -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=CLASSES, **({"img_size": SIZE} if "vit" in name else {}))


def pictures() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 3, SIZE, SIZE, generator=generator)
    return images, torch.randint(0, CLASSES, (IMAGES,), generator=generator)


def enter(model: nn.Module, level: Level, stage: Stage) -> tuple[Accelerator, Entered, FeatureFeed]:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    remember(accelerator, level)
    cast_weights(model, level)
    (planned,) = make_plan([stage], model, train_images=IMAGES, world_size=1, micro_batch=2, image_size=SIZE)
    feed = FeatureFeed(*pictures(), TrainOrder(IMAGES, 0, planned.batch, 0))
    return accelerator, enter_stage(accelerator, model, planned), feed


def train(model: nn.Module, level: Level, stage: Stage, clip: float = 0.0) -> Entered:
    accelerator, entered, feed = enter(model, level, stage)
    clipper = clipping(clip, None, None)
    for step in train_steps(accelerator, entered, feed, cross_entropy(), clipper, Progress(), 0):
        assert step.loss.dtype == torch.float32
    return entered


def written_out(master: nn.Module, lr: float) -> None:
    """Apex's O2 by hand: a bf16 copy of the model computes, its gradients are cast, float32 weights move."""
    (planned,) = make_plan([plain_stage()], master, train_images=IMAGES, world_size=1, micro_batch=2, image_size=SIZE)
    images, labels = pictures()
    micros = list(TrainOrder(IMAGES, 0, planned.batch, 0).micro_batches(0))
    for first, second in zip(micros[::2], micros[1::2], strict=True):
        total = [torch.zeros_like(p) for p in master.parameters()]
        for items in (first, second):
            low = copy.deepcopy(master)
            for module in low.modules():
                if isinstance(module, nn.LayerNorm):
                    module.forward = in_fp32(module)  # type: ignore[assignment]
                    continue
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.bfloat16()
            rows = torch.tensor([item.row for item in items])
            losses = nn.functional.cross_entropy(low(images[rows].bfloat16()).float(), labels[rows], reduction="none")
            loss = losses.sum() / 4
            for kept, gradient in zip(total, torch.autograd.grad(loss, list(low.parameters())), strict=True):
                kept += gradient.float()
        with torch.no_grad():
            for parameter, gradient in zip(master.parameters(), total, strict=True):
                parameter -= lr * gradient


def in_fp32(norm: nn.LayerNorm) -> object:
    plain = norm.forward
    return lambda x: plain(x.float()).bfloat16()


def test_master_weights_are_apexs_o2_written_out() -> None:
    """Without oneDNN, whose kernels for CPUs with bf16 add up in another order here and there (0.2 % of an update)."""
    model = network()
    reference = copy.deepcopy(model)
    with torch.backends.mkldnn.flags(enabled=False):
        train(model, "bf16-master", plain_stage())
        written_out(reference, 0.1)
    before = network()
    for mine, theirs, old in zip(model.parameters(), reference.parameters(), before.parameters(), strict=True):
        assert mine.dtype == torch.float32
        assert not torch.equal(mine, old)
        assert torch.allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize("level", LOW)
def test_what_computes_and_what_is_kept(level: Level) -> None:
    """bf16 in every layer but the norms of master weights; gradients and optimizer state in the type of the weights."""
    model = network("test_efficientnet")
    inputs: dict[str, torch.dtype] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0].dtype}))
    entered = train(model, level, plain_stage(optimizer="adamw", batch_norm="train"), clip=1.0)
    kept = torch.float32 if level == "bf16-master" else torch.bfloat16
    state = [t for slots in entered.optimizer.state.values() for key, t in slots.items() if key != "step"]
    assert {tensor.dtype for tensor in (*model.parameters(), *entered.statistics.values(), *state)} == {kept}
    assert inputs["conv_stem"] == inputs["classifier"] == torch.bfloat16
    assert entered.statistics
    assert not torch.equal(entered.statistics["bn1.running_mean"], torch.zeros_like(next(model.bn1.buffers())))


@pytest.mark.parametrize("level", LOW)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion"])
def test_a_step_that_is_not_finite_leaves_no_trace(level: Level, optimizer: str) -> None:
    model = network("test_efficientnet")
    stage = plain_stage(optimizer=optimizer, momentum=0.9, lr=1e-2, batch_norm="train")
    accelerator, entered, feed = enter(model, level, stage)
    before = {k: v.clone() for k, v in model.state_dict().items() if "tracked" not in k}

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy()(logits, labels) * float("nan")

    clip = clipping(1.0, None, None)
    step = next(train_steps(accelerator, entered, feed, loss, clip, Progress(), 0))
    assert not step.grad_norm.isfinite()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_small_updates_vanish_in_pure_bf16_alone() -> None:
    """1e-3 is less than half of bf16's step below 1, 2^-8: it is lost each time, however often."""
    moved = {}
    for level in ("fp32", *LOW):
        weight = nn.Linear(1, 1, bias=False)
        nn.init.ones_(weight.weight)
        cast_weights(weight, level)
        optimizer = torch.optim.SGD(weight.parameters(), lr=1e-3)
        for _ in range(100):
            called = LowPrecision(weight, level == "bf16-master") if level != "fp32" else weight
            called(torch.ones(1, 1)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        moved[level] = 1 - float(weight.weight.detach())
    assert moved["fp32"] == pytest.approx(0.1, abs=1e-5)
    assert moved["bf16-master"] == pytest.approx(0.1, abs=1e-5)
    assert moved["bf16-pure"] == 0.0


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "mobilenetv3_small_050", "regnetx_002"])
@pytest.mark.parametrize("level", LOW)
def test_families(name: str, level: Level) -> None:
    model = cast_weights(network(name).train(), level)
    logits = LowPrecision(model, level == "bf16-master")(pictures()[0])
    logits.sum().backward()
    assert logits.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="precision 'fp16-pure' is not supported"):
        session.start("fp16-pure", 1)  # type: ignore[arg-type]
    argv = ["--run", "runs/x", "--precision", "bf16-pure"]
    with pytest.raises(UserError, match="--precision bf16-pure is a way to train"):
        parse_command(argv, "recipes/evaluate.py", "", Path("presets"))
    monkeypatch.setenv(sharding.ASKED, "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    for level in LOW:
        with pytest.raises(UserError, match=f"precision {level} is not supported under FSDP"):
            sharding.check_asked(True, level, 2, torch.device("cpu"))


def test_the_level_is_remembered() -> None:
    accelerator = session.start("bf16-master", 1)
    assert level_of(accelerator) == session.precision_name(accelerator) == "bf16-master"
    assert accelerator.mixed_precision == "bf16"
