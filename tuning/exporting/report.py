"""What an export says about itself: on the console, in its JSON files and in its model card."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.table import Table

from tuning.exporting.comparison import Comparison
from tuning.exporting.formats import PACKAGES, Format


def comparison_facts(
    kind: Format, comparison: Comparison, tolerance: float, data: str, weights: str, hardware: str
) -> dict[str, Any]:
    """The content of ``comparison.json``; a difference that isn't finite is null."""
    found = {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in vars(comparison).items()}
    return {
        "format": kind,
        "accepted": comparison.within(tolerance),
        "tolerance": tolerance,
        "data": data,
        **found,
        "original": weights,
        "hardware": hardware,
        "versions": _versions(kind),
    }


def latency_facts(rows: Sequence[Mapping[str, Any]], threads: int, hardware: str, kind: Format) -> dict[str, Any]:
    """The content of ``latency.json``."""
    return {
        "unit": "milliseconds, median of a forward pass, networks in turns",
        "hardware": hardware,
        "threads": threads,
        "rows": list(rows),
        "versions": _versions(kind),
    }


def comparison_line(comparison: Comparison, tolerance: float) -> str:
    """One sentence on the comparison."""
    c = comparison
    return (
        f"Compared on {c.images:,} pictures: largest logit difference {c.largest_logit_difference:.2g} (tolerance "
        f"{tolerance:g}), top-1 accuracy {c.export_top1:.4f} (original {c.original_top1:.4f}), same class "
        f"{c.same_class:.2%}."
    )


def pillow_line(comparison: Comparison) -> str:
    """One sentence on the way that the example takes: pictures read by Pillow."""
    c = comparison
    return (
        f"With preprocessing.py (Pillow) on {c.pillow_images:,} of them: logits differ by at most "
        f"{c.pillow_largest_logit_difference:.2g}, top-1 accuracy {c.pillow_top1:.4f}, same class "
        f"{c.pillow_same_class:.2%}."
    )


def latency_table(rows: Sequence[Mapping[str, Any]], threads: int, hardware: str) -> Table:
    """Milliseconds a forward pass, for the console."""
    table = Table(title=f"Latency, ms a forward pass (median, {threads} threads, {hardware})", title_justify="left")
    names = [name for name in rows[0] if name not in ("batch", "repeats")]
    for column in ("batch", *names, f"{names[0]} / {names[-1]}", "repeats"):
        table.add_column(column, justify="right")
    for row in rows:
        first, last = row[names[0]], row[names[-1]]
        ratio = f"{first / last:.2f}" if last else ""
        table.add_row(str(row["batch"]), *(f"{row[name]:.2f}" for name in names), ratio, str(row["repeats"]))
    return table


def card_section(kind: Format, facts: Mapping[str, Any], latency: Mapping[str, Any] | None, temperature: float) -> str:
    """What the model card says about the export, as Markdown."""
    difference = facts["largest_logit_difference"]
    lines = [
        f"Format `{kind}`. Compared with the original on {facts['images']:,} pictures: largest logit difference "
        f"{'not finite' if difference is None else f'{difference:.2g}'}, top-1 accuracy {facts['export_top1']:.4f} "
        f"(original {facts['original_top1']:.4f}); see `comparison.json`.",
        f"Probabilities are the softmax of the logits / {temperature:g}"
        + (" (temperature fitted on evaluation pictures)." if temperature != 1 else "; no temperature was fitted."),
    ]
    if latency:
        names = [name for name in latency["rows"][0] if name not in ("batch", "repeats")]
        lines.append(f"Milliseconds a forward pass, {latency['threads']} threads, {latency['hardware']}:")
        head = ["batch", *names]
        table = [head, ["---"] * len(head), *([row[name] for name in head] for row in latency["rows"])]
        lines.append("\n".join(f"| {' | '.join(map(str, row))} |" for row in table))
    return "\n\n".join(lines)


def _versions(kind: Format) -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "timm", *PACKAGES[kind]):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
