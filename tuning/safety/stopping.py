"""What all processes agree on at a boundary: to stop, or to save.

A signal reaches one process, a clock runs in one, a file is seen by one: the wishes are exchanged after every
optimizer step and every evaluation batch, so that all processes leave at the same one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from tuning.errors import UserError
from tuning.safety import interrupts
from tuning.safety.interrupts import StopRequested
from tuning.safety.saving import Saver

STOP_FILE = "STOP"
SAVE_EVERY_SECONDS = 300.0
STOP_FILE_EVERY_SECONDS = 1.0
BY_FILE, BY_CLOCK, BY_FAILED_SAVE = "the file STOP", "--stop-after", "a failed save"
REASONS = ("", BY_FILE, BY_CLOCK, *reversed(interrupts.NAMES), BY_FAILED_SAVE)  # of different ones the last wins
LAG = 2  # boundaries between a wish and reading it on a GPU, so that nothing waits for the step just begun

Batch = TypeVar("Batch")


class Asked(NamedTuple):
    """What all processes do now.

    Attributes:
        stop: the reason to stop; empty to go on.
        save: time for a checkpoint.
    """

    stop: str
    save: bool


class Boundary:
    """Wishes of this process and their agreement. Every process calls `agree` at the same boundaries.

    Args:
        folder: of the run; a file named STOP in it ends the run.
        started: `time.time()` when the run began.
        stop_after: minutes from then to the wish to stop.
        save_every: optimizer steps between checkpoints; ``auto`` = by the clock, 0 = none in between.
        save_failed: whether a checkpoint could not be written and that is to end the run.
        lag: boundaries between a wish and its effect; None = 0 on a CPU, `LAG` elsewhere.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        started: float,
        stop_after: float | None = None,
        save_every: int | Literal["auto"] = 0,
        save_failed: Callable[[], bool] = lambda: False,
        lag: int | None = None,
    ) -> None:
        self._accelerator, self._file = accelerator, folder / STOP_FILE
        self._deadline = float("inf") if stop_after is None else started + 60 * stop_after
        self._save_every, self._last_save, self._last_look = save_every, time.monotonic(), 0.0
        self._save_failed = save_failed
        self._lag = lag if lag is not None else LAG * (accelerator.device.type != "cpu")
        self._sent: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def agree(self, step: int | None = None) -> Asked:
        """What to do at this boundary, the same on every process. A file STOP that is obeyed is removed.

        Args:
            step: optimizer steps completed; None in an evaluation, where nothing is saved.
        """
        wishes = self._wishes()
        if self._accelerator.num_processes > 1:
            wishes = self._exchanged(wishes)
        reason = REASONS[wishes[0]]
        if reason == BY_FILE:
            self.close()
        on_step = bool(step and isinstance(self._save_every, int) and self._save_every and step % self._save_every == 0)
        return Asked(reason, on_step or bool(wishes[1]))

    def watch(self, batches: Iterable[Batch], during: str = "an evaluation") -> Iterator[Batch]:
        """*batches*, until all processes agree to stop. A failed save waits for the next optimizer step.

        Args:
            during: what is left, for the message.

        Raises:
            StopRequested: on every process, before the same batch. What was trained must be saved already.
        """
        for batch in batches:
            stop = self.agree().stop
            if stop and stop != BY_FAILED_SAVE:
                raise StopRequested(f"{stop}, in {during}")
            yield batch

    def close(self) -> None:
        """Remove the file STOP: obeyed, or too late for a run that is done."""
        if self._accelerator.is_main_process:
            self._file.unlink(missing_ok=True)

    def saved(self) -> None:
        """Start the time to the next checkpoint anew; every process calls it when it has saved."""
        self._last_save = time.monotonic()
        self._sent.clear()

    def _wishes(self) -> tuple[int, int]:
        reason = interrupts.wish() or (BY_FAILED_SAVE if self._save_failed() else "")
        main, now = self._accelerator.is_main_process, time.monotonic()
        if main and not reason and time.time() >= self._deadline:
            reason = BY_CLOCK
        if main and not reason and now - self._last_look >= STOP_FILE_EVERY_SECONDS:
            self._last_look = now
            reason = BY_FILE if self._file.exists() else ""
        save = main and self._save_every == "auto" and now - self._last_save >= SAVE_EVERY_SECONDS
        return REASONS.index(reason), int(save)

    def _exchanged(self, wishes: tuple[int, int]) -> tuple[int, int]:
        """The largest of all processes' wishes, those of `lag` boundaries ago."""
        device = self._accelerator.device
        votes = torch.cat([torch.full((1,), wish, dtype=torch.int32, device=device) for wish in wishes])
        torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
        done = None
        if device.type == "cuda":
            votes = torch.empty_like(votes, device="cpu", pin_memory=True).copy_(votes, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        self._sent.append((votes, done))
        if len(self._sent) <= self._lag:
            return 0, 0
        votes, done = self._sent.popleft()
        if done is not None:
            done.synchronize()
        stop, save = votes.tolist()
        return stop, save


def end_run(accelerator: Accelerator, saver: Saver, reason: str, step: int) -> NoReturn:
    """Leave together, when the checkpoint of *step* is on the disk.

    Raises:
        StopRequested: on every process.
        UserError: the reason is a checkpoint that could not be written.
    """
    saver.wait()
    accelerator.wait_for_everyone()
    if reason == BY_FAILED_SAVE:
        raise UserError(
            f"{saver.failure or 'A checkpoint could not be written.'} --save-errors is stop: make room, then go on by "
            "--resume auto."
        )
    raise StopRequested(f"{reason}, after step {step}")
