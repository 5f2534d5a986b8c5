"""When memory runs out on one process: all of them begin the optimizer step anew, in smaller micro-batches.

The others can't know at once. They wait in DDP's exchange of gradients, which the process without memory completes with
zeros before all of them agree to throw the attempt away. Nothing of it is left: no gradient, no running statistic, no
random draw, and the gradient scaler has seen nothing yet.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tuning.data.loader import Feed
from tuning.entering import Entered
from tuning.errors import UserError
from tuning.sharding import is_sharded

WORDS = (  # of allocators without an exception of their own: torch's on a CPU, C++, MPS, libraries of CUDA
    *("can't allocate memory", "not enough memory: you tried to allocate", "std::bad_alloc"),
    "could not create a primitive",  # oneDNN, when there is no memory for its copies
    *("mps backend out of memory", "cuda error: out of memory", "cublas_status_alloc_failed"),
)
REMEDY = "Use a smaller --image-size, another --model, or open fewer layers"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether *error* says that there was no memory for a tensor, on a CPU or a GPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    lost_others = isinstance(error, torch.distributed.DistError)
    return isinstance(error, RuntimeError) and not lost_others and any(word in str(error).lower() for word in WORDS)


def give_back(device: torch.device) -> None:
    """Hand memory that torch keeps for later back to the GPU, so that it can be cut in other sizes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Exchange:
    """The exchange of gradients at the end of one optimizer step, which all processes must complete.

    DDP sends a gradient when the step's last backward pass has computed it, and wants each exactly once.
    """

    def __init__(self, accelerator: Accelerator, entered: Entered) -> None:
        self._device, self._process = accelerator.device, accelerator.process_index
        self._alone = accelerator.num_processes == 1 or is_sharded(entered.model)
        self._wrapped, self._trained = entered.wrapped, entered.trained
        self._before: list[tuple[int, int] | None] | None = None

    def begins(self) -> None:
        """Called between the forward and the backward pass that exchanges."""
        if not self._alone:
            self._before = [_mark(p) for p in self._open()]

    def complete(self, said: str) -> None:
        """Send zeros for the gradients that are still missing here, when this process has run out of memory.

        Args:
            said: what the allocator said.
        """
        print(f"note: process {self._process} ran out of memory: {said}", file=sys.stderr, flush=True)
        give_back(self._device)
        if self._alone:
            return
        if self._before is None:
            self._announce()
            self.begins()
        assert self._before is not None
        # From the last layer to the first, the order in which DDP expects them.
        for parameter, before in reversed([*zip(self._open(), self._before, strict=True)]):
            if _mark(parameter) == before:
                zeros = parameter.new_zeros(()).expand_as(parameter)
                torch.autograd.backward(parameter, zeros)

    def _open(self) -> list[nn.Parameter]:
        return [p for p in self._trained.parameters() if p.requires_grad]

    def _announce(self) -> None:
        """DDP's part of a forward pass, without the model's: it exchanges after one only."""
        patched = vars(self._trained).get("forward")  # by accelerate
        self._trained.forward = torch.zeros_like
        try:
            self._wrapped(torch.zeros(1, device=self._device))
        finally:
            del self._trained.forward
            if patched is not None:
                self._trained.forward = patched


def _mark(parameter: nn.Parameter) -> tuple[int, int] | None:
    """Changes when a backward pass adds to the gradient, or when DDP moves it into a bucket; None without one."""
    return None if parameter.grad is None else (parameter.grad.data_ptr(), parameter.grad._version)


def start_over(accelerator: Accelerator, entered: Entered, statistics: Sequence[Tensor], feed: Feed, step: int) -> None:
    """Put back what a void attempt at optimizer step *step* has changed, and shrink the micro-batches of *feed*.

    All processes take part. Global batch, images of every step and learning rates stay. It is said once on stderr.

    Args:
        statistics: running statistics before the attempt.

    Raises:
        UserError: one image in a forward pass is too much already.
    """
    entered.optimizer.zero_grad()
    for buffer, old in zip(entered.statistics.values(), statistics, strict=True):
        buffer.copy_(old)
    give_back(accelerator.device)
    before = feed.order.batch
    if not feed.shrink():
        raise UserError(f"out of memory at step {step}: not even one image fits into a forward pass. {REMEDY}.")
    now = feed.order.batch
    if accelerator.is_main_process:
        norms = f" BatchNorm that trains now sees {now.micro_batch} images at a time." if statistics else ""
        print(
            f"note: out of memory at step {step}: micro-batch {before.micro_batch} -> {now.micro_batch}, accumulation "
            f"{before.accumulation} -> {now.accumulation}; the global batch and the learning rate stay.{norms}",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def no_second_attempt(step: int) -> Iterator[None]:
    """Around the update of optimizer step *step*, of which a part may be done when memory runs out.

    Raises:
        UserError: it did.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory in the update of step {step}: the state of the optimizer doesn't fit beside the model, and "
            "a smaller --micro-batch won't help. Use an --optimizer that keeps less (sgd, lion), or open fewer layers."
        ) from None


def lost_share(step: int) -> UserError:
    """Memory ran out on this process in optimizer step *step*, while others wait for its share within the pass."""
    return UserError(
        f"out of memory at step {step}: under FSDP or with --batch-norm sync, where processes need one another within "
        "the pass, the attempt can't be taken back. Give a smaller --micro-batch."
    )


class InParts:
    """A forward pass for evaluation that cuts its batches in halves where memory runs out, and remembers the size.

    Each process for itself: nothing is exchanged in it.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        self._forward = forward
        self._most: int | None = None

    def __call__(self, inputs: Tensor) -> Tensor:
        """``forward(inputs)``, up to rounding.

        Raises:
            UserError: one image is too much already.
        """
        while True:
            size = min(len(inputs), self._most or len(inputs))
            try:
                parts = [self._forward(part) for part in torch.split(inputs, size)]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            give_back(inputs.device)
            if isinstance(self._forward, nn.Module) and is_sharded(self._forward):  # the others wait for its share
                raise UserError(f"out of memory in an evaluation under FSDP. {REMEDY}.")
            if size == 1:
                raise UserError(f"out of memory in an evaluation: not even one image fits. {REMEDY}.")
            self._most = size // 2
