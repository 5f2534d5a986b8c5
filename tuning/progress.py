"""Where a run is: four integers and the best metric so far, readable as JSON before any model is built."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass
class Progress:
    """Counters of completed work; always at an optimizer-step boundary.

    Attributes:
        stage: index of the current stage.
        stage_step: optimizer steps completed in this stage.
        step: optimizer steps completed in the run.
        epoch: epochs completed in the run, the passes of a stage on cached features included.
        images: training images seen in the run.
        skipped: optimizer steps that the gradient scaler left out.
        best: best value of the metric that chooses ``model/``; None before the first evaluation.
        seconds: wall-clock time of the parts of the run before this one.
        tracker_id: id of the run in the tracker, so that a resumed run continues the same curves.
    """

    stage: int = 0
    stage_step: int = 0
    step: int = 0
    epoch: int = 0
    images: int = 0
    skipped: int = 0
    best: float | None = None
    seconds: float = 0.0
    tracker_id: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A dict that `json` can write."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Progress:
        """The inverse of `to_json`; keys of a newer version are ignored."""
        return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data})
