"""What a second process brings on this machine, and what the exchange of gradients takes: the engine itself, gloo.

    python -m tests.benchmarks.two_processes        # under four minutes on two idle cores; --quick: two

Full fine-tuning and the head alone, one CPU thread a process, pictures in memory, so that no loader takes part. One
process and two take turns, each in processes of its own. The first table is the efficiency, images/s of two processes
over twice those of one, when the second gets as much work as the first. Bars: >= 0.9 for everything, >= 0.98 for the
head. "Of two that exchange nothing" leaves out what they take from each other in memory and caches: their steps with
the exchange of gradients against silent ones, which alternate with them. A silent step keeps its gradients where they
are (a DDP communication hook that sends nothing); the votes of the engine are in both.

The second table has the medians over rounds, also for two processes that share the work of one; "exchange" is the time
of a step less that of a silent one. The third holds this against the closed form of `scale_model`, put together from
the silent step, the moments at which its buckets are ready, and what an all-reduce of each takes by itself.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from tests import conftest  # noqa: F401  no network, no login, one thread
from tests.benchmarks.paired import Row, ratio, table
from tests.benchmarks.saving import Resident, host, wait_for
from tests.benchmarks.scale import markdown, milliseconds
from tests.benchmarks.scale_model import Step
from tests.benchmarks.scale_simulation import Disturbance, simulate
from tests.ranks import run_ranks
from tuning import session
from tuning.cli.command_line import parse_command
from tuning.clipping import clipping
from tuning.data.sampling import TrainOrder
from tuning.engine import train_steps
from tuning.entering import enter_stage
from tuning.losses import cross_entropy
from tuning.plan import make_plan
from tuning.progress import Progress

CLASSES = 1000
STAGES = {
    "everything": ("--freeze-epochs", "0", "--epochs", "1"),
    "head": ("--freeze-epochs", "1", "--epochs", "0"),
}
BARS = {"everything": ">= 0.9", "head": ">= 0.98"}
WARM_UP = 2  # optimizer steps: DDP arranges its buckets anew after the first
VOTERS = (2, 4, 8)


@dataclass
class Counted:
    """A DDP communication hook that notes what is exchanged, and exchanges it unless `silent`.

    Attributes:
        sizes: bytes of every bucket since `begin`.
        ready: `time.perf_counter()` when each was.
    """

    silent: bool = False
    sizes: list[int] = field(default_factory=list)
    ready: list[float] = field(default_factory=list)

    def begin(self) -> None:
        """Forget the step before."""
        self.sizes, self.ready = [], []

    def hook(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """To be registered as ``lambda _, bucket: counted.hook(bucket)``."""
        self.sizes.append(bucket.buffer().nbytes)
        self.ready.append(time.perf_counter())
        if not self.silent:
            return allreduce_hook(dist.group.WORLD, bucket)  # type: ignore[arg-type]
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future


@dataclass
class Seen:
    """What one rank measured, in seconds.

    Attributes:
        steps: of every optimizer step with an exchange.
        silent: of every one without.
        sizes: bytes of the buckets of a step.
        ready: when they were, from the start of a silent step.
        reduces: all-reduce of each bucket, with nothing beside it.
    """

    world_size: int
    steps: list[float] = field(default_factory=list)
    silent: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    ready: list[float] = field(default_factory=list)
    reduces: list[float] = field(default_factory=list)


def train(name: str, stage: str, micro_batch: int, size: int, window: int) -> Seen:
    """Optimizer steps of a stage on this process and the others of its group, every other one silent."""
    accelerator = session.start("fp32", 1)
    world = accelerator.num_processes
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES)
    steps = WARM_UP + (window if world == 1 else 2 * window)
    batch = micro_batch * world
    flags = ["--data", ".", "--weights", "none", *STAGES[stage], "--batch-size", str(batch)]
    (asked,) = parse_command(flags, "", "", Path()).stages
    (planned,) = make_plan(
        [asked], model, train_images=steps * batch, world_size=world, micro_batch=micro_batch, image_size=size
    )
    entered = enter_stage(accelerator, model, planned)
    feed = Resident(TrainOrder(steps * batch, 0, planned.batch, accelerator.process_index), size, accelerator.device)
    seen, counted, ready = Seen(world), Counted(), []
    if world > 1:
        entered.wrapped.register_comm_hook(None, lambda _, bucket: counted.hook(bucket))  # type: ignore[operator]
    started = time.perf_counter()
    for step in train_steps(accelerator, entered, feed, cross_entropy(), clipping(1.0, None, None), Progress(), 0):
        wait_for(step.loss)
        ended = time.perf_counter()
        if step.step > WARM_UP:
            (seen.silent if counted.silent else seen.steps).append(ended - started)
        if counted.silent:
            ready.append([when - started for when in counted.ready])
        seen.sizes, counted.silent = counted.sizes, world > 1 and step.step >= WARM_UP and not counted.silent
        counted.begin()
        started = time.perf_counter()
    seen.ready = [statistics.median(times) for times in zip(*ready, strict=True)]
    seen.reduces = [alone(lambda size=size: dist.all_reduce(torch.zeros(size // 4))) for size in seen.sizes]  # type: ignore[misc]
    return seen


def alone(exchange: Callable[[], Any], times: int = 7) -> float:
    """Median seconds of something that all processes do together."""
    found = []
    for _ in range(times):
        dist.barrier()
        started = time.perf_counter()
        exchange()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def vote() -> float:
    """Seconds of the engine's vote on memory: four bytes through gloo."""
    return alone(lambda: dist.all_reduce(torch.zeros(1, dtype=torch.int32)), times=101)


@dataclass
class Rounds:
    """What every round of one stage measured on rank 0."""

    one: list[Seen] = field(default_factory=list)
    weak: list[Seen] = field(default_factory=list)
    strong: list[Seen] = field(default_factory=list)

    def run(self, name: str, stage: str, micro_batch: int, size: int, window: int) -> None:
        """One process, two with as much work each, two that share the work of one."""
        for found, world, micro in ((self.one, 1, 1), (self.weak, 2, 1), (self.strong, 2, 2)):
            first, *others = run_ranks(world, train, name, stage, micro_batch // micro, size, window)
            assert [first.world_size, *(other.world_size for other in others)] == [world] * world
            found.append(first)


def seconds(found: list[Seen], silent: bool = False) -> float:
    """Of a step: the median over rounds of the medians of their steps."""
    return statistics.median(statistics.median(seen.silent if silent else seen.steps) for seen in found)


def gain_rows(found: dict[str, Rounds], each: int) -> Iterator[list[str]]:
    """Images/s and what became of the second process."""
    shares = (each, each // 2)
    gains = [cell for share in shares for cell in (f"two, {share} each", "efficiency")]
    exchanges = [f"exchange, {share} each" for share in shares]
    yield ["open", "one process, images/s", *gains, "all-reduced a step", *exchanges]
    for stage, rounds in found.items():
        one, gains, exchanges = each / seconds(rounds.one), [], []
        for seen, share in zip((rounds.weak, rounds.strong), shares, strict=True):
            two = 2 * share / seconds(seen)
            gains += [f"{two:.1f}", f"{two / (2 * one):.2f}"]
            exchanges.append(milliseconds(seconds(seen) - seconds(seen, silent=True)))
        yield [stage, f"{one:.1f}", *gains, f"{sum(rounds.weak[0].sizes) / 1e6:.2f} MB", *exchanges]


def efficiency_rows(found: dict[str, Rounds]) -> Iterator[Row]:
    """Of two processes with as much work each as one alone, by rounds."""
    for stage, rounds in found.items():
        times = {
            "one": [statistics.median(seen.steps) for seen in rounds.one],
            "two": [statistics.median(seen.steps) for seen in rounds.weak],
            "silent": [statistics.median(seen.silent) for seen in rounds.weak],
        }
        figures = " : ".join(milliseconds(min(times[name])) for name in ("one", "two"))
        yield Row(f"{stage}: two processes : one", ratio(times, "one", "two"), BARS[stage], figures)
        figures = " : ".join(milliseconds(min(times[name])) for name in ("silent", "two"))
        yield Row(f"{stage}: two : two that exchange nothing", ratio(times, "silent", "two"), "", figures)


def on_paper(seen: Seen) -> Step:
    """The step of `scale_model` from what was measured of its parts."""
    silent, backward_ends = statistics.median(seen.silent), seen.ready[-1]
    return Step(backward_ends, tuple(seen.ready), tuple(seen.reduces), update=silent - backward_ends)


def played(seen: Seen) -> float:
    """Seconds of the same step by simulation, with the jitter of the silent steps."""
    jitter = statistics.stdev(seen.silent) / statistics.mean(seen.silent)
    return simulate(on_paper(seen), 2, 200, Disturbance(jitter=jitter))


def model_rows(found: dict[str, Rounds], each: int) -> Iterator[list[str]]:
    """The step of two processes as the closed form and the simulation have it, and as it was."""
    columns = [f"a step, {each} each", "one process", "two, silent", "all-reduce alone", "closed form", "simulated"]
    yield [*columns, "if nothing hides", "two, measured"]
    for stage, rounds in found.items():
        silent = seconds(rounds.weak, silent=True)
        reduces = statistics.median(sum(seen.reduces) for seen in rounds.weak)
        paper = statistics.median(on_paper(seen).seconds for seen in rounds.weak)
        simulated = statistics.median(played(seen) for seen in rounds.weak)
        unhidden = statistics.median(statistics.median(seen.silent) + sum(seen.reduces) for seen in rounds.weak)
        cells = (seconds(rounds.one), silent, reduces, paper, simulated, unhidden, seconds(rounds.weak))
        yield [stage, *map(milliseconds, cells)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--window", type=int, default=3, help="optimizer steps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round")
    given = parser.parse_args()
    given.rounds = 1 if given.quick else given.rounds
    warnings.simplefilter("ignore")  # in the processes, too: they are forked
    began, each = time.perf_counter(), given.micro_batch
    found = {stage: Rounds() for stage in STAGES}
    for _ in range(given.rounds):
        for stage, rounds in found.items():
            rounds.run(given.model, stage, each, given.image_size, given.window)
    what = f"{given.model}, {given.image_size} px, {each} images each, one thread a process"
    print(table(f"Two processes against one: {what}", efficiency_rows(found)) + "\n", flush=True)
    votes = [f"{processes}: {1e3 * run_ranks(processes, vote)[0]:.2f} ms" for processes in VOTERS]
    print(
        f"{given.model}, {CLASSES} classes, {given.image_size} px, fp32, one thread a process; {host()}, "
        f"{session.cpu_cores()} cores, torch {torch.__version__}; {given.rounds} rounds of {given.window} steps."
    )
    print(f"\n{markdown(gain_rows(found, each))}\n\n{markdown(model_rows(found, each))}")
    print(f"\nA vote of four bytes, by processes: {', '.join(votes)}.")
    print(f"\nTook {time.perf_counter() - began:.0f} s.")


if __name__ == "__main__":
    main()
