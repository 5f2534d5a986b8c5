"""The fastest way to run closed layers on this hardware that says the same: timed, chosen once, kept in the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tuning import sharding
from tuning.data.sources import Data
from tuning.data.tables import spread, take
from tuning.depth import head_modules
from tuning.errors import UserError
from tuning.feeds import judging_feed
from tuning.flags import Flags, ForwardName
from tuning.frozen import LAST, casting, lay_back, lay_out
from tuning.models.build import ModelInfo
from tuning.plan import StagePlan
from tuning.precision import level_of
from tuning.progress import Progress
from tuning.session import same_everywhere

FORWARDS: tuple[str, ...] = get_args(ForwardName)[1:]
PICTURES = {"cpu": 8}  # in a timed pass; elsewhere a micro-batch, at most:
MOST_PICTURES = 128
PASSES = 3  # of each candidate, after one that warms up; the fastest counts
SHARE = 0.02  # of the stage's pictures that may go through the model for it
LAYOUT_GAIN, PRECISION_GAIN = 1.1, 1.2  # how many times as fast
DIFFERENCE = 0.05  # of what the head gets, as a fraction of how much that differs between pictures
HOPELESS = 2.0  # times fp32's time on one picture


@dataclass(frozen=True)
class Timed:
    """One candidate: seconds a picture, and how far what the head gets is from fp32's (`difference`)."""

    seconds: float
    difference: float


def check_forward(accelerator: Accelerator, flags: Flags) -> None:
    """Refuse a ``--frozen-forward`` that this run can't have.

    Raises:
        UserError: names both flags and the remedy.
    """
    asked, level = flags.staging.frozen_forward, level_of(accelerator)
    if asked == "auto":
        return
    if level != "fp32":
        raise UserError(
            f"--frozen-forward {asked}: training is in {level}, and so is what is closed. Leave one of the two out."
        )
    if sharding.asked():
        raise UserError(f"--frozen-forward {asked} is not for a model that is split over processes. Leave it out.")
    on_gpu = accelerator.device.type == "cuda"
    if asked.startswith("bf16") and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"--frozen-forward {asked}: {torch.cuda.get_device_name()} has no bf16. Leave it out.")


def settle_forward(
    accelerator: Accelerator,
    model: nn.Module,
    planned: StagePlan,
    data: Data,
    info: ModelInfo,
    flags: Flags,
    progress: Progress,
    say: Callable[[str], None],
) -> None:
    """Before a stage that trains the head alone: choose how it runs the rest, once a run. All processes take part.

    The choice is rank 0's and kept in *progress*, so that a run that goes on makes none of its own. Stages for which
    timing would take more than it can save (`SHARE`) choose nothing, and so do runs with a given precision: neither
    depends on a clock.
    """
    if planned.stage.open != "head" or progress.frozen_forward is not None or progress.stage_step > 0:
        return
    asked = flags.staging.frozen_forward
    if asked != "auto":
        progress.frozen_forward = asked
        return
    given = flags.run.precision is not None or level_of(accelerator) != "fp32" or sharding.asked()
    each = pictures_a_pass(accelerator.device, planned)
    if given or timed_pictures(each) > SHARE * stage_pictures(planned, len(data.train)):
        return
    images = _some_pictures(accelerator, planned, data, info, each)
    timed = time_candidates(model, images) if len(images) > 1 else {}
    progress.frozen_forward, told = same_everywhere((chosen(timed), described(timed)))
    say(f"{planned.stage.name:>10}  {told}")


def pictures_a_pass(device: torch.device, planned: StagePlan) -> int:
    """Pictures in a timed pass."""
    return min(planned.batch.micro_batch, PICTURES.get(device.type, MOST_PICTURES))


def timed_pictures(each: int) -> int:
    """Pictures that go through the model when every candidate is timed with *each* a pass."""
    return len(FORWARDS) * (1 + PASSES) * each


def stage_pictures(planned: StagePlan, train_images: int) -> int:
    """Pictures that go through the closed layers in the stage, over all processes, however many these are."""
    return train_images * (planned.stage.feature_views if planned.stage.cache_features else planned.stage.epochs)


def chosen(timed: Mapping[str, Timed]) -> str:
    """The name of the candidate to take: each step away from plain fp32 must be clearly faster, and bf16 the same."""
    full = _better_layout("fp32", timed)
    same = {name: one for name, one in timed.items() if one.difference <= DIFFERENCE}
    low = _better_layout("bf16", same)
    if low is None or full is None:
        return full or "fp32"
    return low if timed[full].seconds >= PRECISION_GAIN * timed[low].seconds else full


def _better_layout(numbers: str, timed: Mapping[str, Timed]) -> str | None:
    last = f"{numbers}{LAST}"
    if numbers not in timed or last not in timed:
        return numbers if numbers in timed else None
    return last if timed[numbers].seconds >= LAYOUT_GAIN * timed[last].seconds else numbers


def described(timed: Mapping[str, Timed]) -> str:
    """The choice and what it rests on, in a sentence."""
    if not timed:
        return "closed layers run in fp32: there were no pictures to time them with."
    took = ", ".join(f"{name} {1e3 * one.seconds:.2f}" for name, one in timed.items())
    name = chosen(timed)
    apart = f", {timed[name].difference:.1%} from fp32" if name.startswith("bf16") else ""
    left = ", ".join(f"{n} {one.difference:.1%}" for n, one in timed.items() if not one.difference <= DIFFERENCE)
    apart += f", as {left} from fp32 is beyond {DIFFERENCE:.0%}" if left else ""
    return f"closed layers run in {name}{apart} (timed, ms a picture: {took}); --frozen-forward {name} repeats it."


def time_candidates(model: nn.Module, images: Tensor) -> dict[str, Timed]:
    """Time every candidate on *images*; the model is left as it was, in evaluation mode.

    bf16 that one picture shows to be emulated is left out, and channels-last where no weight would change.
    """
    model.eval()
    timed: dict[str, Timed] = {}
    with _kept_layout(model, f"fp32{LAST}") as moved:
        layouts = ("", LAST) if moved else ("",)
    full, _ = _time(model, images, "fp32", passes=0)
    one = {numbers: _time(model, images[:1], numbers, passes=2)[1] for numbers in ("fp32", "bf16")}
    hopeless = one["bf16"] > HOPELESS * one["fp32"]
    for numbers in ("fp32",) if hopeless else ("fp32", "bf16"):
        for layout in layouts:
            got, seconds = _time(model, images, f"{numbers}{layout}", PASSES)
            timed[f"{numbers}{layout}"] = Timed(seconds / len(images), difference(full, got))
    return timed


def difference(full: Tensor, got: Tensor) -> float:
    """How far *got* is from *full*, both ``(B, ...)``, by how far pictures are from one another; NaN if not finite.

    That is the noise over the signal that any head has to work with.
    """
    return float((got - full).norm() / (full - full.mean(0)).norm())


def _time(model: nn.Module, images: Tensor, forward: str, passes: int) -> tuple[Tensor, float]:
    """What the head gets, and the seconds of the fastest of *passes*."""
    times = [float("inf")]
    with _kept_layout(model, forward):
        got = _head_inputs(model, images, forward)
        for _ in range(passes):
            _wait(images.device)
            began = time.perf_counter()
            with torch.inference_mode(), casting(images.device, forward):  # anew: autocast keeps copies of weights
                model(images)
            _wait(images.device)
            times.append(time.perf_counter() - began)
    return got, min(times)


@contextmanager
def _kept_layout(model: nn.Module, forward: str) -> Iterator[bool]:
    """The layout of *forward* in the body, which learns whether that is another one."""
    moved = lay_out(model, forward)
    try:
        yield bool(moved)
    finally:
        lay_back(moved)


def _head_inputs(model: nn.Module, images: Tensor, forward: str) -> Tensor:
    """What reaches the classifier, or the first of several, ``(B, ...)`` float32."""
    seen: list[Tensor] = []
    head = next(iter(head_modules(model).values()))
    hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().float()))
    try:
        with torch.inference_mode(), casting(images.device, forward):
            model(images)
    finally:
        hook.remove()
    return seen[0].flatten(1)


def _some_pictures(accelerator: Accelerator, planned: StagePlan, data: Data, info: ModelInfo, each: int) -> Tensor:
    """Up to *each* training pictures of this process, with the evaluation crop."""
    rows = take(data.train, spread(data.train, each * accelerator.num_processes))
    feed = judging_feed(accelerator, rows, planned.image_size, info, workers=0, batch_size=each)
    micro = next(iter(feed))
    return micro.inputs[micro.weights > 0]


def _wait(device: torch.device) -> None:
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()
