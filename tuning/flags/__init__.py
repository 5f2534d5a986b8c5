"""Every flag of every recipe: name, type, unit and default. Imports no torch, so `--help` is instant.

Precedence: defaults < preset or config file < command line. A preset, a `config.yaml` and the command line all use
the same flat names.

A module a group, each flag with its text under it: `cli.flag_parser` reads these when help is asked for. Types are
written as they are, not as texts (no ``from __future__ import annotations``): resolving those slows every command.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tuning.flags.averages import AveragesFlags
from tuning.flags.batch import BatchFlags
from tuning.flags.check import CheckFlags
from tuning.flags.data import DataFlags
from tuning.flags.evaluate import EvaluateFlags
from tuning.flags.export import ExportFlags
from tuning.flags.finder import FinderFlags
from tuning.flags.model import ModelFlags
from tuning.flags.names import (
    AugmentName,
    ColorName,
    ForwardName,
    InitName,
    LossName,
    SamplingName,
    ScheduleName,
    TrackerName,
)
from tuning.flags.opened import OpenedFlags
from tuning.flags.optimisation import OptimisationFlags
from tuning.flags.overfit import OverfitFlags
from tuning.flags.predict import PredictFlags
from tuning.flags.regularisation import RegularisationFlags
from tuning.flags.run import RunFlags
from tuning.flags.stage import StageFlags
from tuning.flags.sweep import SweepFlags

__all__ = [
    "AugmentName",
    "AveragesFlags",
    "BatchFlags",
    "CheckFlags",
    "ColorName",
    "DataFlags",
    "EvaluateFlags",
    "ExportFlags",
    "FinderFlags",
    "Flags",
    "ForwardName",
    "InitName",
    "LossName",
    "ModelFlags",
    "OpenedFlags",
    "OptimisationFlags",
    "OverfitFlags",
    "PredictFlags",
    "RegularisationFlags",
    "RunFlags",
    "SamplingName",
    "ScheduleName",
    "StageFlags",
    "SweepFlags",
    "TrackerName",
]


@dataclass(frozen=True)
class Flags:
    """All flags of a recipe, grouped as `--help` shows them."""

    data: DataFlags = field(default_factory=DataFlags)
    model: ModelFlags = field(default_factory=ModelFlags)
    batch: BatchFlags = field(default_factory=BatchFlags)
    optimisation: OptimisationFlags = field(default_factory=OptimisationFlags)
    staging: StageFlags = field(default_factory=StageFlags)
    regularisation: RegularisationFlags = field(default_factory=RegularisationFlags)
    averages: AveragesFlags = field(default_factory=AveragesFlags)
    overfit: OverfitFlags = field(default_factory=OverfitFlags)
    check: CheckFlags = field(default_factory=CheckFlags)
    export: ExportFlags = field(default_factory=ExportFlags)
    run: RunFlags = field(default_factory=RunFlags)
    finder: FinderFlags = field(default_factory=FinderFlags)
    opened: OpenedFlags = field(default_factory=OpenedFlags)
    evaluate: EvaluateFlags = field(default_factory=EvaluateFlags)
    predict: PredictFlags = field(default_factory=PredictFlags)
    sweep: SweepFlags = field(default_factory=SweepFlags)
