"""Flags of the group finder."""

from dataclasses import dataclass
from typing import Literal, Optional


@dataclass(frozen=True)
class FinderFlags:
    finder_start: Optional[float] = None
    """Lowest learning rate of the head that the LR finder tries. Default: 1e-6; SGD 1e-5, Lion 1e-7."""
    finder_end: Optional[float] = None
    """Highest learning rate of the head that the LR finder tries; it ends a sweep earlier when the loss is 4 times its
    best. Default: 1; SGD 10, Lion 0.1."""
    finder_steps: int = 100
    """Optimizer steps of one sweep of the LR finder, from 10."""
    finder_sweeps: int = 3
    """Sweeps of the LR finder, each over other images; their agreement is its confidence."""
    finder_race: Optional[int] = None
    """Optimizer steps that every learning rate around the sweeps' answer then trains, from the same start on the same
    images; the one that ends best is the answer. 0 = the sweeps alone decide; else from 10. A stage with no more steps
    is raced whole. Default: 100 for a stage that has no more, else 50."""
    finder_at: Literal["start", "stages", "sizes"] = "start"
    """When --lr auto searches: at the start of the first stage that takes --lr; of each; or of each with another image
    size than the one before."""
    finder_share: float = 0.1
    """Share of the run's optimizer steps that one search of --lr auto may cost, in (0, 1]; 270 steps it may always,
    and a whole race."""
    stage: Optional[str] = None
    """Stage that recipes/find_lr.py sweeps: its name, or its number from 1. Default: the first of those in which most
    is open."""
