"""Flags of the group opened."""

from dataclasses import dataclass
from typing import Optional


@dataclass(frozen=True)
class OpenedFlags:
    run: Optional[str] = None
    """What was trained, for recipes/evaluate.py, predict.py and export.py: the folder of a run, one of its checkpoints,
    or a folder in timm's format. Default: --model with its --weights; export.py has none."""
