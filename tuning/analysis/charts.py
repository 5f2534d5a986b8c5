"""The error analysis as tables that a tracker can show."""

from __future__ import annotations

from collections.abc import Sequence

from tuning.analysis.overview import Case, Overview
from tuning.tracking.weights_and_biases import Chart


def charts(overview: Overview | None) -> list[Chart]:
    """Classes, worst mistakes, likely label errors, confused pairs, confusion matrix and precision-recall curves."""
    if overview is None:
        return []
    names = overview.classes
    pairs = [[names[p.actual], names[p.predicted], p.count, p.share] for p in overview.pairs]
    tables = [
        _cases("analysis/mistakes", overview.worst, names, "predicted"),
        _cases("analysis/label_errors", overview.suspects, names, "suggested"),
        Chart("analysis/confused_pairs", ("label", "predicted", "images", "share of the label"), pairs),
        *([_confusion(overview)] if overview.drawn else []),
        _precision_recall(overview),
        _classes(overview),
    ]
    return [table for table in tables if table.rows]


def _cases(name: str, cases: Sequence[Case], classes: Sequence[str], second: str) -> Chart:
    suggested = second == "suggested"
    rows = [
        [
            one.picture,
            one.name,
            classes[one.label],
            classes[one.suggested if suggested else one.predicted],
            one.own,
            one.of_suggested if suggested else one.top,
        ]
        for one in cases
    ]
    return Chart(name, ("picture", "id", "label", second, "probability of the label", f"probability {second}"), rows)


def _classes(overview: Overview) -> Chart:
    counts = overview.counts
    rows = [
        [name, int(counts.images[n]), counts.recall(n), counts.precision(n), counts.f1(n)]
        for n, name in enumerate(overview.classes)
    ]
    return Chart("analysis/classes", ("class", "images", "recall", "precision", "F1"), rows)


def _confusion(overview: Overview) -> Chart:
    names = [overview.classes[index] for index in overview.drawn]
    matrix = overview.confusion.tolist()
    if len(names) < len(overview.classes):
        names.append("all others")
    rows = [
        [actual, taken, matrix[i][j]]
        for i, actual in enumerate(names)
        for j, taken in enumerate(names)
        if overview.drawn
    ]
    columns = ("Actual", "Predicted", "nPredictions")
    fields = {name: name for name in columns}
    return Chart("analysis/confusion", columns, rows, "wandb/confusion_matrix/v1", fields, "Confusion matrix")


def _precision_recall(overview: Overview) -> Chart:
    rows = [
        [overview.classes[curve.index], recall, precision]
        for curve in overview.curves
        for recall, precision in zip(curve.recall, curve.precision, strict=True)
    ]
    fields = {"x": "recall", "y": "precision", "class": "class"}
    columns = ("class", "recall", "precision")
    return Chart("analysis/precision_recall", columns, rows, "wandb/area-under-curve/v0", fields, "Precision, recall")
