"""What an LR finder found, for the terminal, for ``summary.json`` and as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from rich.table import Table

from tuning import figures, plots
from tuning.lr_curve import smoothed, smoothing
from tuning.lr_finder import Found
from tuning.lr_race import Candidate
from tuning.records import number as finite

SHOWN_UP_TO = 2.0  # times the first loss


def facts(found: Found) -> dict[str, Any]:
    """The answer for ``summary.json``: ``chosen``, ``reason``, ``band``, what every sweep and the race said."""
    pairs = zip(found.sweeps, found.band.suggestions, strict=True)
    sweeps = [{**vars(said), "steps": len(swept.losses), "ended": swept.ended} for swept, said in pairs]
    return {
        "chosen": found.lr,
        "reason": found.reason,
        "band": [found.band.low, found.band.high],
        "steps": found.steps,
        "sweeps": sweeps,
        "race": [_facts_of(candidate) for candidate in found.race],
        "whole_race": found.whole,
    }


def _facts_of(candidate: Candidate) -> dict[str, Any]:
    ends = {"loss": finite(candidate.score), "reached": finite(candidate.reached)}
    return {"lr": candidate.lr, "steps": candidate.steps, **ends}


def table(found: Found) -> Table:
    """One row a sweep: how far it came, and the learning rate that every rule says."""
    shown = Table(title="Sweeps, learning rate of the head", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("sweep", "steps", "ended", "lowest loss", "valley", "steep", "minimum/10", "chosen"):
        shown.add_column(heading, justify="right")
    for number, (swept, said) in enumerate(zip(found.sweeps, found.band.suggestions, strict=True), start=1):
        losses = [loss for loss in swept.losses if math.isfinite(loss)]
        rules = ["-" if lr is None else f"{lr:.1e}" for lr in (said.valley, said.steep, said.minimum)]
        chosen = said.reason if said.chosen is None else f"{said.chosen:.1e}"
        lowest = f"{min(losses):.3f}" if losses else "-"
        shown.add_row(str(number), str(len(swept.losses)), swept.ended, lowest, *rules, chosen)
    return shown


def draw(found: Found, path: Path) -> None:
    """Losses over the learning rate: of every sweep, measured and smoothed, and of the race; the band, the answer."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for number, swept in enumerate(found.sweeps):
        smooth = smoothed(swept.losses, smoothing(swept.lrs))
        colour = f"C{number % 10}"
        axes.plot(swept.lrs, _drawable(swept.losses), ".", markersize=2, color=colour, alpha=0.5)
        axes.plot(swept.lrs, _drawable(smooth), linewidth=1, color=colour, label=f"sweep {number + 1}, {swept.ended}")
    if found.race:
        lrs, scores = [c.lr for c in found.race], _drawable(c.score for c in found.race)
        axes.plot(
            lrs,
            scores,
            "D--",
            color="black",
            markersize=4,
            label=f"evaluation, after {found.race[0].steps} steps at it",
        )
    low, high = found.band.low, found.band.high
    if low is not None and high is not None:
        axes.axvspan(low, high, color="grey", alpha=0.2, label="choices of the sweeps")
    if found.lr is not None:
        axes.axvline(found.lr, color="black", linewidth=1, label=f"chosen {found.lr:.2e}")
    title = "" if found.lr is not None else f"no confident answer: {found.reason.partition(':')[0]}"
    firsts = [swept.losses[0] for swept in found.sweeps if math.isfinite(swept.losses[0])]
    if firsts:
        axes.set_ylim(0, SHOWN_UP_TO * max(firsts))  # what diverges would flatten all else
    axes.set(xscale="log", xlabel="learning rate of the head", ylabel="loss of a step", title=title)
    axes.legend(fontsize=7)
    figures.save(figure, path)


def race_table(found: Found) -> Table:
    """One row a candidate: the evaluation loss where it ended, at its best temperature, and the metric there."""
    shown = Table(title="Race, learning rate of the head", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("learning rate", "steps", "evaluation loss", "--best-by"):
        shown.add_column(heading, justify="right")
    for candidate in found.race:
        ends = ("diverged", "-")
        if math.isfinite(candidate.score):
            ends = (f"{candidate.score:.4f}", f"{abs(candidate.reached):.4f}")
        shown.add_row(f"{candidate.lr:.1e}", str(candidate.steps), *ends)
    return shown


def _drawable(losses: Iterable[float]) -> list[float]:
    return [loss if math.isfinite(loss) and abs(loss) < plots.LARGEST_VALUE else math.nan for loss in losses]
