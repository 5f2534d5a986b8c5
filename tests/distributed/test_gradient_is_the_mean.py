"""The gradient of an optimizer step is that of the mean loss over all its images, however they are shared out."""

from __future__ import annotations

import pytest
import timm
import torch
from accelerate import Accelerator
from plain_stages import plain_stage
from ranks import run_ranks
from torch import Tensor, nn

from tuning.data.loader import FeatureFeed
from tuning.data.sampling import TrainOrder
from tuning.engine import train_steps
from tuning.entering import enter_stage
from tuning.losses import cross_entropy
from tuning.plan import make_plan
from tuning.progress import Progress

IMAGES, CLASSES, SIZE, BATCH = 26, 3, 32, 12  # steps of 12, 12 and 2 images


def network() -> nn.Module:
    """Without BatchNorm, whose statistics depend on the micro-batch."""
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=CLASSES, img_size=SIZE)


def pictures() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 3, SIZE, SIZE, generator=generator)
    return images, torch.randint(0, CLASSES, (IMAGES,), generator=generator)


def gradients(micro: int) -> list[list[Tensor]]:
    """Of every step of an epoch, as the engine hands them to the clipping; the weights never move."""
    accelerator, model = Accelerator(cpu=True), network()
    world, rank = accelerator.num_processes, accelerator.process_index
    stage = plain_stage(batch_size=BATCH, lr=1e-30)
    (planned,) = make_plan([stage], model, train_images=IMAGES, world_size=world, micro_batch=micro, image_size=SIZE)
    seen: list[list[Tensor]] = []

    def clip(model: nn.Module) -> Tensor:
        seen.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        return torch.zeros(())

    feed = FeatureFeed(*pictures(), TrainOrder(IMAGES, 0, planned.batch, rank))
    entered = enter_stage(accelerator, model, planned)
    steps = list(train_steps(accelerator, entered, feed, cross_entropy(), clip, Progress(), 0))
    assert [step.images for step in steps] == [12, 12, 2]
    return seen


def in_one_pass() -> list[list[Tensor]]:
    """The same by one forward pass a step, in plain torch."""
    model, (images, labels), expected = network(), pictures(), []
    (planned,) = make_plan(
        [plain_stage(batch_size=BATCH)], model, train_images=IMAGES, world_size=1, micro_batch=BATCH, image_size=SIZE
    )
    for items in TrainOrder(IMAGES, 0, planned.batch, 0).micro_batches(0):
        rows = torch.tensor([item.row for item in items if item.weight])
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        expected.append([g.clone() for g in torch.autograd.grad(loss, list(model.parameters()))])
    return expected


@pytest.mark.parametrize(("world", "micro"), [(1, 12), (1, 4), (1, 1), (2, 6), (2, 3), (2, 1), (3, 4), (3, 2)])
def test_processes_and_micro_batches_change_no_gradient(world: int, micro: int) -> None:
    """Also in the last step, whose 2 images leave the third process nothing but filler."""
    (expected,) = run_ranks(1, in_one_pass)  # autograd in this process would stand in the way of the next fork
    for seen in run_ranks(world, gradients, micro):
        assert len(seen) == 3
        for mine, right in zip(seen, expected, strict=True):
            for ours, theirs in zip(mine, right, strict=True):
                assert torch.allclose(ours, theirs, atol=1e-6, rtol=1e-4)
