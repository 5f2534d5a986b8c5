"""What `recipes/evaluate.py` found out: metrics.json, predictions.parquet, and tables for a person."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from tuning.judging import bootstrap
from tuning.judging.final_metrics import calibration_error, final_metrics, per_class, probabilities
from tuning.judging.metrics import rank_classes
from tuning.tracking.run_folder import write_atomically

METRICS, PREDICTIONS = "metrics.json", "predictions.parquet"
HEADLINES = ("top1", "top5", "balanced_accuracy", "macro_f1", "roc_auc", "average_precision", "loss", "ece")
CLASSES_SHOWN = 12


def judge(logits: Tensor, labels: Tensor, temperature: float, resamples: int) -> dict[str, Any]:
    """Metrics, their intervals, and calibration with *temperature*, as `json` can write them.

    Args:
        logits: ``(N, K)``.
        labels: ``(N,)`` int64.
        resamples: of the bootstrap; 0 = no intervals.
    """
    found: dict[str, Any] = {**final_metrics(logits, labels), "images": len(labels)}
    found["temperature"] = temperature
    found["ece_after_temperature"] = calibration_error(logits, labels, temperature)
    found["loss_after_temperature"] = float(F.cross_entropy(logits.double() / temperature, labels))
    if resamples:
        found["intervals"] = bootstrap.intervals(logits, labels, resamples)
        found["bootstrap"] = {
            "level": bootstrap.LEVEL,
            "resamples": resamples,
            "seed": bootstrap.SEED,
            "method": "percentile",
        }
    return found


def details(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """What `metrics.json` says of every class; *classes* in the order of the outputs."""
    found: dict[str, Any] = {"classes": list(classes), "per_class": per_class(logits, labels, classes)}
    if len(classes) == 2:
        found["positive_class"] = classes[1]
    return found


def write(
    folder: Path,
    facts: Mapping[str, Any],
    ids: Sequence[str],
    logits: Tensor,
    labels: Tensor,
    rows: Tensor,
    classes: Sequence[str],
    temperature: float,
) -> None:
    """Write `predictions.parquet`, then `metrics.json`; each is complete or absent.

    Args:
        facts: the content of `metrics.json`.
        ids: names of the images, N of them; *rows* are theirs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = _table(ids, logits, labels, rows, classes, temperature)
    partial = folder / f".{PREDICTIONS}.partial"
    pq.write_table(table, partial)
    partial.replace(folder / PREDICTIONS)
    write_atomically(folder / METRICS, json.dumps(finite(facts), indent=1, ensure_ascii=False) + "\n")


def _table(
    ids: Sequence[str], logits: Tensor, labels: Tensor, rows: Tensor, classes: Sequence[str], temperature: float
) -> pa.Table:
    named, p = pa.array(classes, pa.string()), probabilities(logits, temperature).float()
    flat = pa.array(p.numpy().ravel(), pa.float32())
    columns = {
        "id": pa.array(ids, pa.string()),
        "row": pa.array(rows.numpy(), pa.int64()),
        "label": named.take(pa.array(labels.numpy())),
        "predicted": named.take(pa.array(rank_classes(logits)[:, 0].numpy())),
        "probabilities": pa.FixedSizeListArray.from_arrays(flat, len(classes)),
    }
    about = {"classes": json.dumps(list(classes), ensure_ascii=False), "temperature": repr(temperature)}
    return pa.table(columns).replace_schema_metadata(about)


def finite(value: Any) -> Any:
    """*value* as JSON can hold it: None in the place of NaN and infinity."""
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def metrics_table(judged: Mapping[str, Mapping[str, Any]]) -> Table:
    """A column for everything that was judged, with 95 % intervals where there are some."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("metric")
    for name in judged:
        table.add_column(escape(name), justify="right")
    for metric in HEADLINES:
        if any(metric in one for one in judged.values()):
            table.add_row(metric, *(_with_interval(one, metric) for one in judged.values()))
    if any(one["temperature"] != 1 for one in judged.values()):
        table.add_row("temperature", *(f"{one['temperature']:.3f}" for one in judged.values()))
        for metric in ("ece_after_temperature", "loss_after_temperature"):
            table.add_row(metric, *(f"{one[metric]:.4f}" for one in judged.values()))
    return table


def _with_interval(judged: Mapping[str, Any], metric: str) -> str:
    value, interval = judged.get(metric), judged.get("intervals", {}).get(metric)
    if value is None:
        return "-"
    return f"{value:.4f}" + (f"  {interval[0]:.4f} .. {interval[1]:.4f}" if interval else "")


def class_table(classes: Mapping[str, Mapping[str, Any]]) -> Table:
    """Precision, recall and F1 of the classes that occur, those with the lowest F1 first where there are many."""
    present = [(name, one) for name, one in classes.items() if one["support"]]
    shown = present if len(present) <= CLASSES_SHOWN else sorted(present, key=lambda c: c[1]["f1"])[:CLASSES_SHOWN]
    title = "Classes" if len(present) <= CLASSES_SHOWN else f"The {CLASSES_SHOWN} hardest of {len(present)} classes"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("class", "precision", "recall", "F1", "images"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for name, one in shown:
        numbers = (f"{one[key]:.4f}" for key in ("precision", "recall", "f1"))
        table.add_row(escape(name), *numbers, f"{one['support']:,}")
    return table
