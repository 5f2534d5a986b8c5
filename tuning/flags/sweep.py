"""Flags of the group sweep."""

from dataclasses import dataclass
from typing import Optional


@dataclass(frozen=True)
class SweepFlags:
    space: Optional[str] = None
    """Search space of recipes/sweep.py: the name of a file in recipes/sweeps/, or the path of a W&B sweep file."""
    trials: Optional[int] = None
    """Trials after which recipes/sweep.py ends, those of earlier starts included. Default: 20; a grid: all of it."""
    launcher: str = ""
    """Words for accelerate launch in every trial of recipes/sweep.py, for example "--multi_gpu --num_processes 2"."""
