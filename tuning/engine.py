"""The one training loop: a generator of optimizer steps.

The caller's ``for`` body logs, evaluates, saves and stops in plain statements; `break` is fine at any step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tuning.clipping import Clip
from tuning.data.loader import Feed, Micro
from tuning.data.sampling import TrainOrder, step_seed
from tuning.entering import Entered
from tuning.groups import set_lr
from tuning.losses import Loss
from tuning.optimizers import step_if
from tuning.progress import Progress
from tuning.safety.agreement import sum_if_all
from tuning.safety.heartbeat import one_line
from tuning.safety.out_of_memory import Exchange, is_out_of_memory, lost_share, no_second_attempt, start_over
from tuning.sharding import exchanging, is_sharded, own, whole


@dataclass(frozen=True)
class Step:
    """One completed optimizer step.

    Attributes:
        step: optimizer steps completed in the run, this one included.
        epoch: passes over the data completed, as a fraction.
        images: images of this step, over all processes.
        order: which image goes where.
        place: the epoch and the optimizer step within it (0 the first) in that order.
        loss: mean loss over all images of the step, the same on every process. 0-d, on the device.
        grad_norm: norm of the gradient before clipping, the same on every process; not finite if the step was left
            out. 0-d, on the device.
        lrs: learning rate of every open group in this step.
        ends_epoch: the step completed a pass over the data.
        ends_stage: the step was the last of its stage.
        image_size: side of its pictures in pixels, where steps draw it.
    """

    step: int
    epoch: float
    images: int
    order: TrainOrder
    place: tuple[int, int]
    loss: Tensor
    grad_norm: Tensor
    lrs: dict[str, float]
    ends_epoch: bool
    ends_stage: bool
    image_size: int | None = None

    @property
    def rows(self) -> list[int]:
        """Rows of the training data in this step, over all processes."""
        return self.order.rows(*self.place)


def train_steps(
    accelerator: Accelerator, entered: Entered, feed: Feed, loss: Loss, clip: Clip, progress: Progress, seed: int
) -> Iterator[Step]:
    """Train the stage from where *progress* stands to its end, yielding after every optimizer step.

    All processes take part in every step. *progress* is brought up to date before each yield, so what the caller saves
    then is a clean boundary. A step whose loss or gradient is not finite, on whichever process, is left out on all:
    parameters, optimizer and running statistics stay as they were. A step for which memory runs out, on whichever
    process, begins anew on all with smaller micro-batches. Nothing here waits for the device, except as
    `optimizers.step_if` says.

    Raises:
        UserError: not even one image fits into a forward pass, or the optimizer's state doesn't fit.
    """
    per_epoch = feed.order.steps_per_epoch
    total = entered.stage.steps(per_epoch)
    while progress.stage_step < total and not progress.stage_over:
        first = progress.stage_step % per_epoch
        stream = feed.epoch(progress.epoch, first, progress.step)
        for in_epoch in range(first, per_epoch):
            if not entered.trained.training:  # an evaluation came between
                entered.train_mode()
            images = feed.order.images_in(in_epoch)
            factor = entered.factor(progress.stage_step) * progress.lr_factor
            set_lr(entered.optimizer.param_groups, factor)
            before = [buffer.clone() for buffer in entered.statistics.values()]
            step = progress.step
            while (mean_loss := _attempt(accelerator, entered, stream, loss, feed, images, seed, step)) is None:
                start_over(accelerator, entered, before, feed, step + 1)
                stream = feed.epoch(progress.epoch, in_epoch, step)
            with no_second_attempt(step + 1):
                grad_norm = _update(accelerator, entered, clip, mean_loss, before)
            order, place = feed.order, (progress.epoch, in_epoch)
            ends_epoch = in_epoch == per_epoch - 1
            _count(progress, images, ends_epoch, feed.shrunk_to)
            epoch = progress.epoch + (0.0 if ends_epoch else (in_epoch + 1) / per_epoch)
            ends_stage = progress.stage_step == total
            lrs, size = entered.lrs, feed.image_size(step)
            yield Step(
                progress.step, epoch, images, order, place, mean_loss, grad_norm, lrs, ends_epoch, ends_stage, size
            )


def _count(progress: Progress, images: int, ends_epoch: bool, shrunk_to: int | None) -> None:
    """One more optimizer step has been made, of *images* images."""
    progress.step += 1
    progress.stage_step += 1
    progress.images += images
    progress.epoch += ends_epoch
    progress.micro_batch = shrunk_to or progress.micro_batch


def _attempt(
    accelerator: Accelerator,
    entered: Entered,
    stream: Iterator[Micro],
    loss: Loss,
    feed: Feed,
    images: int,
    seed: int,
    step: int,
) -> Tensor | None:
    """`_backward`, and the loss summed over processes; None on all of them where memory ran out on any."""
    exchange, mine, said = Exchange(accelerator, entered), None, ""
    try:
        mine = _backward(accelerator, entered, stream, loss, feed, images, seed, step, exchange)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if is_sharded(entered.model) or entered.synchronised:  # the others wait in the middle of the pass
            raise lost_share(step + 1) from None
        said = one_line(error)
    if mine is None:  # out here nothing holds the traceback any more, and with it the activations
        exchange.complete(said)
    return sum_if_all(accelerator, mine)


def _backward(
    accelerator: Accelerator,
    entered: Entered,
    stream: Iterator[Micro],
    loss: Loss,
    feed: Feed,
    images: int,
    seed: int,
    step: int,
    exchange: Exchange,
) -> Tensor:
    """Gradients of the mean loss over the step's *images* images, whatever the micro-batches and processes.

    Returns this process's part of that loss.

    Every micro-batch contributes (sum of its losses) / images; DDP averages over processes, so the sum over processes
    is restored by their number. Filler has weight 0. Gradients are exchanged in the last micro-batch only.
    """
    micro_steps = feed.order.batch.micro_steps(images)
    total = torch.zeros((), device=accelerator.device)
    for number in range(micro_steps):
        micro = next(stream)
        _seed_draws(step_seed(seed, step, number, accelerator.process_index), accelerator.device)
        last = number == micro_steps - 1
        with exchanging(accelerator, entered.model, entered.wrapped, last):
            losses = _losses(loss, entered.wrapped(micro.inputs), micro)
            share = (losses * micro.weights).sum() / images
            if last:
                exchange.begins()
            accelerator.backward(share * accelerator.num_processes)
        total += share.detach()
    return total


def _losses(loss: Loss, logits: Tensor, micro: Micro) -> Tensor:
    """The loss of every image, ``(B,)``; where images were mixed, of both labels by their shares."""
    losses = loss(logits, micro.labels)
    if micro.others is None or micro.shares is None:
        return losses
    return torch.lerp(loss(logits, micro.others), losses, micro.shares)


def _seed_draws(seed: int, device: torch.device) -> None:
    """`torch.manual_seed` for the devices in use; for those that aren't there it formats a stack at every call."""
    torch.default_generator.manual_seed(seed)
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).manual_seed(seed)


def _update(accelerator: Accelerator, entered: Entered, clip: Clip, mean_loss: Tensor, before: list[Tensor]) -> Tensor:
    """Unscale, clip once, update if everything is finite; else put the running statistics back to *before*."""
    _taint(entered.trained, mean_loss)
    accelerator.unscale_gradients(entered.optimizer)
    grad_norm = whole(clip(entered.trained).detach())
    finite = grad_norm.isfinite()
    if entered.optimizer.scaler is not None:
        entered.optimizer.step()  # the scaler looks at the gradients itself
    else:
        step_if(entered.optimizer.optimizer, finite, entered.open_groups)
    entered.drop_gradients()
    for buffer, old in zip(entered.statistics.values(), before, strict=True):
        buffer.copy_(torch.where(finite, buffer, old))
    return grad_norm


def _taint(trained: nn.Module, mean_loss: Tensor) -> None:
    """Make a gradient NaN if the loss is not finite, so that one check, the gradient scaler's too, serves both.

    An infinite loss can have finite gradients: that of a logit at minus infinity.
    """
    gradient = own(next(p.grad for p in trained.parameters() if p.grad is not None))
    gradient[(slice(0, 1),) * gradient.dim()].add_((mean_loss * 0).to(gradient.device))  # a share may be empty
