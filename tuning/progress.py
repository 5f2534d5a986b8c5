"""Where a run is: a few integers and the best metric so far, readable as JSON before any model is built."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tuning.cli.coerce import field_types


@dataclass
class Progress:
    """Counters of completed work; always at an optimizer-step boundary.

    Attributes:
        stage: index of the current stage.
        stage_step: optimizer steps completed in this stage.
        step: optimizer steps completed in the run.
        epoch: epochs completed in the run, the passes of a stage on cached features included.
        images: training images seen in the run.
        due: the model of this step is still to be evaluated: it is saved first, so that nothing is lost meanwhile.
        skipped: optimizer steps that were left out because the loss or a gradient was not finite.
        skipped_in_a_row: those of them that directly precede this point.
        best: best value of the metric that chooses ``model/``; None before the first evaluation.
        best_step: optimizer steps completed when that was reached.
        seconds: wall-clock time of the parts of the run before this one.
        searched: index of the stage at whose start the LR finder ran last; None before that.
        lr: what it found, the head's peak learning rate; None without a confident answer.
        tracker_id: id of the run in the tracker, so that a resumed run continues the same curves.
        stage_best: best value of that metric at the ends of this stage's epochs; None before the first.
        waiting: such evaluations in a row since then without a better one.
        plateau: those of them since the learning rate fell last (`tuning.patience`).
        lr_factor: what a plateau has left of the stage's learning rate.
        stage_over: evaluations have ended the stage before its last step.
        frozen_forward: how head-only stages run what is closed (``--frozen-forward``); None = nothing was chosen.
        micro_batch: images per forward pass since memory ran out in this stage; None as long as it is the planned one.
    """

    stage: int = 0
    stage_step: int = 0
    step: int = 0
    epoch: int = 0
    images: int = 0
    due: bool = False
    skipped: int = 0
    skipped_in_a_row: int = 0
    best: float | None = None
    best_step: int | None = None
    seconds: float = 0.0
    searched: int | None = None
    lr: float | None = None
    tracker_id: str | None = None
    micro_batch: int | None = None
    stage_best: float | None = None
    waiting: int = 0
    plateau: int = 0
    lr_factor: float = 1.0
    stage_over: bool = False
    frozen_forward: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A dict that `json` can write."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Progress:
        """The inverse of `to_json`; keys of a newer version are ignored.

        Raises:
            TypeError: a value of another type than `to_json` writes.
        """
        types = field_types(cls)
        for name, value in data.items():
            if name in types and not isinstance(value, types[name]):
                raise TypeError(f"{name} is {value!r}")
        return cls(**{name: data[name] for name in types if name in data})
