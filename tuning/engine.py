"""The one training loop: a generator of optimizer steps.

The caller's ``for`` body logs, evaluates, saves and stops in plain statements; `break` is fine at any step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tuning.clipping import Clip
from tuning.data.loader import Feed, Micro
from tuning.data.sampling import step_seed
from tuning.entering import Entered
from tuning.groups import set_lr
from tuning.losses import Loss
from tuning.progress import Progress


@dataclass(frozen=True)
class Step:
    """One completed optimizer step.

    Attributes:
        step: optimizer steps completed in the run, this one included.
        epoch: passes over the data completed, as a fraction.
        images: images of this step, over all processes.
        loss: this process's part of the mean loss over all images of the step; the sum over processes is the mean.
            0-d, on the device.
        grad_norm: norm of the gradient before clipping, the same on every process. 0-d, on the device.
        lrs: learning rate of every open group in this step.
        ends_epoch: the step completed a pass over the data.
        ends_stage: the step was the last of its stage.
    """

    step: int
    epoch: float
    images: int
    loss: Tensor
    grad_norm: Tensor
    lrs: dict[str, float]
    ends_epoch: bool
    ends_stage: bool


def train_steps(
    accelerator: Accelerator, entered: Entered, feed: Feed, loss: Loss, clip: Clip, progress: Progress, seed: int
) -> Iterator[Step]:
    """Train the stage from where *progress* stands to its end, yielding after every optimizer step.

    All processes take part in every step. *progress* is brought up to date before each yield, so what the caller saves
    then is a clean boundary. Nothing here waits for the device.
    """
    per_epoch = feed.order.steps_per_epoch
    total = entered.stage.steps(per_epoch)
    while progress.stage_step < total:
        first = progress.stage_step % per_epoch
        stream = feed.epoch(progress.epoch, first)
        for in_epoch in range(first, per_epoch):
            if not entered.trained.training:  # an evaluation came between
                entered.train_mode()
            images = feed.order.images_in(in_epoch)
            factor = entered.factor(progress.stage_step)
            set_lr(entered.optimizer.param_groups, factor)
            mean_loss = _backward(accelerator, entered.wrapped, stream, loss, feed, images, seed, progress.step)
            grad_norm = _update(accelerator, entered, clip)
            ends_epoch = in_epoch == per_epoch - 1
            progress.step += 1
            progress.stage_step += 1
            progress.images += images
            progress.epoch += ends_epoch
            epoch = progress.epoch + (0.0 if ends_epoch else (in_epoch + 1) / per_epoch)
            ends_stage = progress.stage_step == total
            yield Step(progress.step, epoch, images, mean_loss, grad_norm, entered.lrs, ends_epoch, ends_stage)


def _backward(
    accelerator: Accelerator,
    wrapped: nn.Module,
    stream: Iterator[Micro],
    loss: Loss,
    feed: Feed,
    images: int,
    seed: int,
    step: int,
) -> Tensor:
    """Gradients of the mean loss over the step's *images* images, whatever the micro-batches and processes.

    Every micro-batch contributes (sum of its losses) / images; DDP averages over processes, so the sum over processes
    is restored by their number. Filler has weight 0. Gradients are exchanged in the last micro-batch only.
    """
    micro_steps = feed.order.batch.micro_steps(images)
    total = torch.zeros((), device=accelerator.device)
    for number in range(micro_steps):
        micro = next(stream)
        torch.manual_seed(step_seed(seed, step, number, accelerator.process_index))
        last = number == micro_steps - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(wrapped):
            losses = loss(wrapped(micro.inputs), micro.labels)
            share = (losses * micro.weights).sum() / images
            accelerator.backward(share * accelerator.num_processes)
        total += share.detach()
    return total


def _update(accelerator: Accelerator, entered: Entered, clip: Clip) -> Tensor:
    """Unscale, clip once, update; a step with infinite gradients under fp16 is left out by the scaler."""
    accelerator.unscale_gradients(entered.optimizer)
    grad_norm = clip(entered.model).detach()
    entered.optimizer.step()
    entered.optimizer.zero_grad()
    return grad_norm
