"""``report.html``: one run on one page that needs no network, to read and to mail."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tuning.analysis.card import CLASS_ROWS, class_rows, data_facts
from tuning.analysis.overview import Case, Overview
from tuning.data.sources import Data
from tuning.tracking.pages import image_tag, plot_tag, render
from tuning.tracking.records import number, read_records
from tuning.tracking.run_folder import CONFIG, RunFolder, write_atomically
from tuning.tracking.summary import evaluations

EVALUATION_ROWS, NAME_LENGTH, CAPTION_LENGTH, CONFIG_LENGTH = 12, 80, 40, 50_000
PLOTS = {
    "curves": "loss, metrics, gradient norm and learning rates over the optimizer steps",
    "confusion": "confusion matrix: labels in rows, predictions in columns",
    "precision_recall": "precision over recall of single classes",
    "augmented_batch": "training pictures as the model sees them, after augmentation",
    "schedule": "planned learning rate of every group over the optimizer steps",
    "lr_finder": "loss over the learning rate, as the LR finder measured it",
}
SHARES = ("top1", "top5", "balanced_accuracy", "macro_f1")  # shown in per cent

WORDS = {
    "balanced_accuracy": "balanced accuracy",
    "top1": "accuracy (top 1)",
    "top5": "top 5",
    "macro_f1": "macro F1",
    "loss": "loss",
}


@dataclass(frozen=True)
class Told:
    """What only the recipe knows of a run.

    Attributes:
        model: as it was typed.
        plan: named sentences.
        headings, stages: the table of stages.
        source: what ``--data`` named.
        machine: named sentences about hardware.
        typed: the command line.
        launch: what stands before ``recipes/finetune.py`` to run it on the same processes.
    """

    model: str
    plan: Sequence[tuple[str, str]]
    headings: Sequence[str]
    stages: Sequence[Sequence[str]]
    source: str
    machine: Sequence[tuple[str, str]]
    typed: Sequence[str]
    launch: str


def write(
    folder: RunFolder, summary: Mapping[str, Any], told: Told, data: Data, overview: Overview | None, problem: str = ""
) -> None:
    """Write the page, replacing an earlier one as a whole.

    Args:
        summary: of the run, as `summary.make_summary` makes it.
        overview: None where the analysis failed.
        problem: what failed.
    """
    write_atomically(folder.report, page(folder, summary, told, data, overview, problem))


def page(
    folder: RunFolder, summary: Mapping[str, Any], told: Told, data: Data, overview: Overview | None, problem: str = ""
) -> str:
    """The page as text."""
    name = folder.path.resolve().name
    sections = {"curves": "Curves", "confusion": "Confusions", "mistakes": "Worst mistakes", "labels": "Label errors"}
    sections |= {"data": "Data", "plan": "Plan and stages", "repeat": "Repeat it"}
    shown = [one for one in sections.items() if overview or one[0] not in ("confusion", "mistakes", "labels")]
    values = {
        "title": _cut(f"{told.model} on {data.name}"),
        "subtitle": _cut(f"run {name}, {summary['status']}"),
        "sections": shown,
        "tiles": _tiles(summary, overview),
        "problem": problem,
        "plots": {kind: plot_tag(folder.plots / f"{kind}.png", alt) for kind, alt in PLOTS.items()},
        "evaluations": _evaluations(folder, summary),
        "analysis": _analysis(overview) if overview else None,
        "data": _data(data, told.source, overview),
        "plan": [*told.plan, *_chosen_lr(folder)],
        "stages": {"headings": told.headings, "rows": told.stages},
        "machine": [*told.machine, *_history(summary)],
        "typed": shlex.join(told.typed),
        "repeat": f"{told.launch} recipes/finetune.py --config {shlex.quote(str(folder.path / CONFIG))} --output NEW",
        "config": _config(folder.path / CONFIG),
        "footer": f"Written by fine-tuning at the end of the run {name}. {_files(folder)}",
    }
    return render("report.html", values)


def _cut(text: str, length: int = NAME_LENGTH) -> str:
    """*text* with its middle left out beyond *length* characters: names may have any length."""
    return text if len(text) <= length else f"{text[: length // 2]}…{text[-(length // 2) + 1 :]}"


def _metric(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if name in SHARES else f"{value:.4g}"


def _tiles(summary: Mapping[str, Any], overview: Overview | None) -> list[dict[str, str]]:
    best, by = summary["best"] or {}, summary["best_by"]
    names = [by, *(name for name in WORDS if name != by and name in best)]
    chosen = f"best of the run, epoch {best.get('epoch') or 0:g}"
    tiles = [
        {"name": WORDS[name], "value": _metric(name, number(best.get(name))), "note": chosen if name == by else ""}
        for name in names
    ]
    if overview:
        wrong = {
            "name": "mistakes",
            "value": f"{overview.wrong:,}",
            "note": f"of {overview.images:,} evaluation images",
        }
        tiles.append(wrong)
    speed = number(summary.get("images_per_second"))
    note = "" if speed is None else f"{speed:,.0f} training images/s"
    return [*tiles, {"name": "time", "value": _duration(summary["seconds"]), "note": note}]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _evaluations(folder: RunFolder, summary: Mapping[str, Any]) -> dict[str, Any]:
    judged = evaluations(folder.metrics, summary["best_of"])
    names = [name for name in WORDS if any(name in one for one in judged)]
    best = (summary["best"] or {}).get("step")
    before = [one for one in judged[:-EVALUATION_ROWS] if one["step"] == best]
    shown = [*before[:1], *judged[-EVALUATION_ROWS:]]
    rows = [
        [
            f"{one['epoch'] or 0:g}" + (" (best)" if one["step"] == best else ""),
            f"{one['step']:,}",
            *(_metric(n, one.get(n)) for n in names),
        ]
        for one in shown
    ]
    whose = "weights" if summary["best_of"] == "eval" else "averaged weights"
    note = f"Of the {whose}. The same images chose which are the best, which flatters those a little."
    if len(judged) > EVALUATION_ROWS:
        note = f"The last {EVALUATION_ROWS} of {len(judged):,}; all are in metrics.jsonl. {note}"
    return {"headings": ["epoch", "step", *(n.replace("_", " ") for n in names)], "rows": rows, "note": note}


def _analysis(overview: Overview) -> dict[str, Any]:
    names = overview.classes

    def case(one: Case, other: int, probability: float) -> dict[str, Any]:
        return {
            "picture": image_tag(one.picture),
            "label": _cut(names[one.label], CAPTION_LENGTH),
            "own": one.own,
            "other": _cut(names[other], CAPTION_LENGTH),
            "probability": probability,
            "name": _cut(one.name, CAPTION_LENGTH),
        }

    pairs = [
        {"label": _cut(names[p.actual]), "other": _cut(names[p.predicted]), "count": p.count, "share": p.share}
        for p in overview.pairs
    ]
    return {
        "sentence": f"{overview.wrong:,} of {overview.images:,} evaluation images are classified otherwise than their "
        "label says, by the weights in model/.",
        "drawn": len(overview.drawn),
        "pairs": pairs,
        "more_pairs": overview.pair_count - len(pairs),
        "worst": [case(one, one.predicted, one.top) for one in overview.worst],
        "suspects": [case(one, one.suggested, one.of_suggested) for one in overview.suspects],
        "doubt": _doubt(overview),
    }


def _doubt(overview: Overview) -> str:
    if not overview.doubtful:
        return "None was found among the evaluation images."
    shown = f"; the {len(overview.suspects)} likeliest are shown" if overview.doubtful > len(overview.suspects) else ""
    return (
        f"{overview.doubtful:,} evaluation images look more like another class than that class's own images do on "
        f"average{shown}. Each is either a wrong label or a hard picture: look before you change one. Confident "
        "learning, Northcutt et al. 2021; training images are not judged."
    )


def _data(data: Data, source: str, overview: Overview | None) -> dict[str, Any]:
    rows = class_rows(data, overview.counts if overview else None)
    cut = len(data.classes) > CLASS_ROWS
    heading = f"The {CLASS_ROWS} classes of the lowest recall, of {len(data.classes):,}" if cut else "Classes"
    facts = [(name, _cut(value, 400)) for name, value in data_facts(data, source)]
    return {"facts": facts, "heading": heading, "classes": [replace(row, name=_cut(row.name)) for row in rows]}


def _chosen_lr(folder: RunFolder) -> list[tuple[str, str]]:
    chosen = [number(record.get("lr_finder/chosen")) for record in read_records(folder.metrics)]
    return [("learning rate", f"{lr:.3g}, found by --lr auto") for lr in chosen if lr is not None]


def _history(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    unreadable = summary.get("unreadable") or {}
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items() if version)
    facts = [("versions", versions), ("git commit", summary["git_commit"] or "unknown")]
    if summary.get("skipped_steps"):
        facts.append(("left out", f"{summary['skipped_steps']:,} optimizer steps that were not finite"))
    if any(unreadable.values()):
        told = ", ".join(f"{count:,} of {part}" for part, count in unreadable.items())
        facts.append(("unreadable pictures", f"{told}; see unreadable.txt"))
    return facts


def _config(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return f"{path} can't be read: {error.strerror}"
    return text if len(text) <= CONFIG_LENGTH else f"{text[:CONFIG_LENGTH]}\n... cut; see {CONFIG}"


def _files(folder: RunFolder) -> str:
    return f"Weights: {folder.model}; every number: {folder.metrics}."


def processor() -> str:
    """The name of this machine's CPU, and how many cores of it there are."""
    name = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name or platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"
