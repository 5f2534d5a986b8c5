"""The metrics that a model card shows: those of recipes/evaluate.py with their intervals, else those of the run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from tuning.errors import UserError
from tuning.tracking.records import number

# Name in our metrics: (name on the hub, what people call it)
METRICS = {
    "top1": ("accuracy", "top-1 accuracy"),
    "top5": ("top_5_accuracy", "top-5 accuracy"),
    "balanced_accuracy": ("balanced_accuracy", "balanced accuracy"),
    "macro_f1": ("f1", "macro F1"),
    "roc_auc": ("roc_auc", "ROC-AUC"),
    "average_precision": ("average_precision", "average precision"),
    "loss": ("loss", "cross-entropy"),
    "ece": ("ece", "expected calibration error"),
}


def judged_metrics(asked: str | None, run: Path | None, classes: Sequence[str]) -> dict[str, Any]:
    """The ``metrics.json`` of recipes/evaluate.py: *asked*, or that in ``evaluation/`` of the run; empty without one.

    Args:
        asked: ``--metrics``: the file, or the folder that it lies in.
        classes: of the model.

    Raises:
        UserError: what was asked for is no such file, or is about another model.
    """
    if asked is None:
        found = read_json(run / "evaluation" / "metrics.json") if run else {}
        return {} if _misfit(found, classes) else found
    path = Path(asked).expanduser()
    path = path / "metrics.json" if path.is_dir() else path
    found = read_json(path)
    reason = _misfit(found, classes)
    if reason:
        raise UserError(
            f"--metrics {asked}: {reason} Give the metrics.json of recipes/evaluate.py on this model alone."
        )
    return found


def _misfit(found: Mapping[str, Any], classes: Sequence[str]) -> str:
    """Why *found* can't be the metrics of a model with these classes; empty if it can."""
    if number(found.get("top1")) is None:
        return "there are no metrics to read."
    if found.get("classes") != list(classes):
        return "it is about a model with other classes."
    if found.get("members"):
        return "it is about an ensemble."
    return ""


def shown(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Those of the metrics that a card shows."""
    return {key: value for key in METRICS if (value := number(evaluation.get(key))) is not None}


def results(evaluation: Mapping[str, Any], dataset: str, dataset_type: str) -> list[EvalResult]:
    """The metrics for the header of a card; the hub's format has no place for intervals."""
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset_type,
            dataset_name=dataset,
            metric_type=METRICS[key][0],
            metric_name=METRICS[key][1],
            metric_value=round(value, 6),
        )
        for key, value in shown(evaluation).items()
    ]


def metrics_text(evaluation: Mapping[str, Any], best_by: str | None) -> str:
    """The metrics as Markdown: a table with intervals, and what they were measured on.

    Args:
        best_by: metric that chose the weights, where the run chose them.
    """
    metrics = shown(evaluation)
    if not metrics:
        return "No evaluation is known of this model."
    intervals = evaluation.get("intervals")
    intervals = intervals if isinstance(intervals, Mapping) else {}
    rows = [(METRICS[key][1], f"{value:.4f}", _interval(intervals.get(key))) for key, value in metrics.items()]
    images, own = number(evaluation.get("images")), evaluation.get("own_data", True)
    text = [table(("metric", "value", "95 % interval"), rows)]
    if images is not None:
        of = "the evaluation part of the data" if own else f"other data ({Path(str(evaluation.get('data'))).name})"
        text.append(f"On {images:,.0f} images of {of}.")
    if evaluation.get("tta", "none") != "none":
        text.append(f"Probabilities were averaged over the views `{evaluation['tta']}` of every picture.")
    if best_by and own:
        text.append(
            f"The weights are those of the evaluation with the best `{best_by}`; numbers on the images that chose them "
            "are a little flattering."
        )
    if not intervals:
        text.append("`recipes/evaluate.py --run RUN` computes intervals.")
    return "\n\n".join(text)


def _interval(value: Any) -> str:
    low, high = (number(end) for end in value) if isinstance(value, list | tuple) and len(value) == 2 else (None, None)
    return "unknown" if low is None or high is None else f"{low:.4f} to {high:.4f}"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none to read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
