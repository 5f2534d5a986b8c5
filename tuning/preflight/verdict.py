"""From what a trial of the model showed to findings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from tuning.data.folders import shorten
from tuning.plan import StagePlan
from tuning.preflight.findings import Finding, Severity
from tuning.preflight.memory import MARGIN, Memory
from tuning.preflight.trial import StageTrial

SMALLEST_RATIO = 1e-3  # of two learning rates of one stage


def trial_findings(trials: Sequence[StageTrial], world_size: int, fitted: bool) -> Iterator[Finding]:
    """About the optimizer steps of every stage, and the first loss of the run.

    Args:
        fitted: the run fits its head before the first step, so that the first loss of the trial is not its own.
    """
    for trial in trials:
        yield from _stage_findings(trial, world_size)
    if trials and not fitted:
        yield from _first_loss_findings(trials[0].losses[0], trials[0].expected_loss)


def _stage_findings(trial: StageTrial, world_size: int) -> Iterator[Finding]:
    stage = f"stage {trial.stage!r}: "
    if trial.grouped:
        listed = shorten(f"{name} in {times} groups" for name, times in trial.grouped.items())
        yield Finding("grouping", "error", f"{stage}{listed}")
    if trial.wrong_lrs:
        yield Finding("learning_rate", "error", f"{stage}not the peak of the plan, or 0: {shorten(trial.wrong_lrs)}")
    rates = trial.peak_lrs.values()
    if rates and 0 < min(rates) < SMALLEST_RATIO * max(rates):
        lowest = min(trial.peak_lrs, key=trial.peak_lrs.__getitem__)
        message = f"{stage}{lowest} peaks at {min(rates):.1e}, {max(rates) / min(rates):,.0f} times below the highest"
        yield Finding("learning_rate", "note", f"{message}; it will hardly move (--lr-ratio, --layer-decay)")
    if trial.missing:
        severity: Severity = "error" if world_size > 1 else "warning"
        remedy = "with several processes training ends with an error"
        yield Finding(
            "no_gradient", severity, f"{stage}open, but not part of the output: {_some(trial.missing)}; {remedy}"
        )
    if trial.zero:
        message = f"{stage}the gradient is exactly 0 in {len(trial.losses)} steps: {_some(trial.zero)}"
        yield Finding("no_gradient", "warning", message)
    broken = [number for number, loss in enumerate(trial.losses, start=1) if not math.isfinite(loss)]
    if broken:
        message = f"{stage}the loss is not finite in step {broken[0]}: check --lr, --precision and the weights"
        yield Finding("initial_loss", "error", message)
    if trial.drifted:
        yield Finding("batch_norm_drift", "error", f"{stage}closed, but moved: {_some(trial.drifted)}")


def _first_loss_findings(first: float, expected: float) -> Iterator[Finding]:
    told = f"{first:.3f} in the first step; equal probabilities give {expected:.3f}"
    if first > 1.5 * expected + 0.3:
        severity: Severity = "warning" if first > 4 * expected + 3 else "note"  # some families draw their head wide
        yield Finding("initial_loss", severity, f"{told}: the head (--head-init) or the inputs are far off")
    elif first < 0.5 * expected:
        yield Finding("initial_loss", "note", f"{told}: the model knows these classes already")


def statistics_findings(mean: Sequence[float], spread: Sequence[float]) -> Iterator[Finding]:
    """About the model's input, whose channels should have mean 0 and standard deviation 1, roughly."""
    seen = (
        f"the channels of the model's input have mean {', '.join(f'{m:.2f}' for m in mean)} and standard deviation "
        f"{', '.join(f'{s:.2f}' for s in spread)}"
    )
    if max(spread) < 0.1 or max(spread) > 4:
        remedy = "the model's mean and std don't fit pixels of 0 ... 1, or the pictures are nearly of one colour"
        yield Finding("statistics", "warning", f"{seen}: {remedy}")
    elif max(map(abs, mean)) > 1 or min(spread) < 0.5 or max(spread) > 2:
        yield Finding("statistics", "note", f"{seen}: these pictures differ from those the model was trained on")


def memory_findings(memory: Memory, planned: StagePlan) -> Iterator[Finding]:
    """Whether the planned micro-batch fits; a run would halve it where a GPU says that it doesn't."""
    micro = planned.batch.micro_batch
    between = micro < 2 * memory.largest and memory.needed is not None and memory.needed <= MARGIN * memory.free
    if micro <= max(1, memory.largest) or between:
        return
    severity: Severity = "warning" if not memory.measured else "note" if memory.largest else "error"
    how = "measured" if memory.measured else "estimated"
    message = f"micro-batches of {micro} don't fit, the largest power of two that does is {memory.largest} ({how})"
    yield Finding(
        "memory", severity, f"{message}; give --micro-batch {max(1, memory.largest)}: the result stays the same"
    )


def schedule_findings(plan: Sequence[StagePlan]) -> Iterator[Finding]:
    """Stages that end in the middle of a cycle."""
    for planned in plan:
        warning = planned.stage.cut_cycle(planned.steps_per_epoch)
        if warning:
            yield Finding("schedule", "note", warning)


def _some(names: Sequence[str]) -> str:
    return f"{len(names):,} ({shorten(names, 3)})"
