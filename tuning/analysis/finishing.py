"""The last act of a run: pictures of its mistakes and ``report.html``. What fails here fails no run."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from tuning.analysis import drawing, report
from tuning.analysis.last_look import LastLook
from tuning.cli.command_line import Command
from tuning.data.sources import Data
from tuning.models.build import ModelInfo
from tuning.plan import StagePlan
from tuning.session import precision_name
from tuning.tracking.console import STAGE_HEADINGS, plan_facts, stage_rows
from tuning.tracking.run_folder import RunFolder


def write_report(
    accelerator: Accelerator,
    command: Command,
    folder: RunFolder,
    data: Data,
    plan: Sequence[StagePlan],
    info: ModelInfo,
    summary: Mapping[str, Any],
    look: LastLook,
) -> None:
    """Draw the mistakes and write the page; rank 0 only. What goes wrong is said, and nothing is raised.

    Args:
        plan: the stages as they were trained.
        look: what the last evaluation showed; without it the page says why that is missing.
    """
    if look.problem:
        _warn(look.problem)
    if look.stopped:  # --resume auto finds no report, and makes it
        return
    try:
        if look.overview:
            drawing.draw_all(look.overview, folder.plots)
        told = _told(accelerator, command, folder, data, plan, info)
        report.write(folder, summary, told, data, look.overview, look.problem)
    except Exception as error:
        traceback.print_exc()
        _warn(f"report.html could not be made: {type(error).__name__}: {error}")


def _told(
    accelerator: Accelerator,
    command: Command,
    folder: RunFolder,
    data: Data,
    plan: Sequence[StagePlan],
    info: ModelInfo,
) -> report.Told:
    flags = command.flags
    return report.Told(
        model=info.name,
        plan=plan_facts(plan, data, info, accelerator, folder, flags.run.best_by),
        headings=STAGE_HEADINGS,
        stages=stage_rows(plan),
        source=flags.data.data,
        machine=_machine(accelerator),
        typed=sys.argv,
        launch=_launch(accelerator),
    )


def _machine(accelerator: Accelerator) -> list[tuple[str, str]]:
    count, kind = accelerator.num_processes, accelerator.device.type
    processes = f"{count} {'process' if count == 1 else 'processes'} on {kind}, {precision_name(accelerator)}"
    facts = [("processes", processes), ("processor", report.processor())]
    if kind == "cuda":
        facts.append(("GPU", torch.cuda.get_device_name(accelerator.device)))
    return facts


def _launch(accelerator: Accelerator) -> str:
    """What starts as many processes of the same precision; a CPU needs words of its own for more than one."""
    count, precision = accelerator.num_processes, accelerator.mixed_precision
    several = f" --multi_gpu --num_processes {count} --num_machines 1" if count > 1 else ""
    before = "ACCELERATE_USE_CPU=true " if several and accelerator.device.type == "cpu" else ""
    mixed = "" if precision == "no" else f" --mixed_precision {precision}"
    return f"{before}accelerate launch{several}{mixed}"


def _warn(text: str) -> None:
    remedy = "The run itself is complete; without a report.html, --resume auto tries again."
    print(f"warning: {text} {remedy}", file=sys.stderr, flush=True)
