"""PNG pictures of a run: the planned learning rates, and the curves that came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from tuning.plan import StagePlan
from tuning.tracking.figures import save
from tuning.tracking.records import number, read_records

LARGEST_NUMBER_OF_POINTS = 4000
LARGEST_VALUE = 1e100  # matplotlib's axes overflow beyond it


def draw_schedule(plan: Sequence[StagePlan], path: Path) -> None:
    """The planned learning rate of every open group over the optimizer steps of the run."""
    starts = [(sum(before.steps for before in plan[:n]), planned.stage.name) for n, planned in enumerate(plan)]
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for planned, (start, _) in zip(plan, starts, strict=True):
        every = -(-planned.steps // LARGEST_NUMBER_OF_POINTS)  # a long run has millions of steps
        for place, rates in enumerate(planned.lrs(every)):
            for name, rate in rates.items():
                steps, values = curves.setdefault(name, ([], []))
                steps.append(start + place * every)
                values.append(rate)
    figure, axes = plt.subplots(figsize=(8, 4))
    figure.subplots_adjust(left=0.1, right=0.98, bottom=0.13, top=0.9)  # a layout engine would draw everything twice
    colours = plt.get_cmap("viridis")
    for place, name in enumerate(sorted(curves)):
        steps, values = _thinned(*curves[name])
        axes.plot(steps, values, ".", markersize=2, color=colours(place / max(1, len(curves) - 1)), label=name)
    for start, name in starts:
        axes.axvline(start, color="grey", linewidth=0.8)
        axes.annotate(name, (start, 1), xycoords=("data", "axes fraction"), fontsize=8, va="bottom", parse_math=False)
    open_ended = any(p.stage.schedule == "plateau" or p.stage.may_end_early for p in plan)
    title = "as planned; evaluations may drop it or end a stage sooner" if open_ended else None
    axes.set(xlabel="optimizer step", ylabel="learning rate", title=title)
    if curves and all(v > 0 for _, values in curves.values() for v in values):
        axes.set_yscale("log")
    if len(curves) <= 12:
        axes.legend(fontsize=7, markerscale=4)
    save(figure, path)


def draw_curves(metrics: Path, path: Path) -> None:
    """Training loss, evaluation metrics, gradient norm and learning rates from ``metrics.jsonl``."""
    records = read_records(metrics)
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    _panel(axes[0, 0], records, ["train/loss", "eval/loss", "eval_ema/loss", "eval_swa/loss"], "loss")
    judged = ["eval/top1", "eval/balanced_accuracy", "eval/macro_f1", "eval/top5"]
    judged += ["eval_ema/balanced_accuracy", "eval_swa/balanced_accuracy"]
    _panel(axes[0, 1], records, judged, "evaluation, fraction")
    _panel(axes[1, 0], records, ["train/grad_norm"], "gradient norm before clipping")
    lrs = sorted({key for record in records for key in record if key.startswith("lr/")})
    _panel(axes[1, 1], records, [lrs[0], lrs[-1]] if len(lrs) > 1 else lrs, "learning rate, stem and head")
    save(figure, path)


def draw_bars(values: Mapping[str, float], title: str, path: Path) -> None:
    """One bar a name, with its value."""
    figure, axes = plt.subplots(figsize=(1.5 + 0.9 * len(values), 4), layout="constrained")
    axes.bar_label(axes.bar(list(values), list(values.values())), fmt="{:.3f}", fontsize=8)
    axes.set(title=title)
    axes.margins(y=0.15)
    save(figure, path)


def _panel(axes: Any, records: list[dict[str, Any]], keys: Sequence[str], title: str) -> None:
    for key in keys:
        drawn = ((record["step"], number(record.get(key))) for record in records)
        points = [(step, value) for step, value in drawn if value is not None and abs(value) < LARGEST_VALUE]
        if points:
            steps, values = _thinned([step for step, _ in points], [value for _, value in points])
            marker, label = "o" if key.startswith("eval") else "", key.replace("$", r"\$")  # no formula
            axes.plot(steps, values, marker=marker, linewidth=1, markersize=3, label=label)
    axes.set(title=title, xlabel="optimizer step")
    if axes.lines:
        axes.legend(fontsize=8)


def _thinned(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    stride = -(-len(steps) // LARGEST_NUMBER_OF_POINTS)
    return steps[::stride], values[::stride]
