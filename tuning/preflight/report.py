"""What was found, for a person and for programs: a table, findings.json, and a page with the suspects' pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from tuning.data.sources import Data
from tuning.errors import UserError
from tuning.preflight.findings import KINDS, SEVERITIES, Finding, count
from tuning.tracking.pages import image_tag, render, thumbnail
from tuning.tracking.run_folder import write_atomically

FINDINGS, FACTS, PAGE = "findings.json", "check.json", "check.html"
NAMED = 3  # of a kind on the console
PICTURED = 24  # pictures of a kind on the page


def prepare(folder: Path) -> None:
    """Make the folder, and take away what an earlier check left in it: it would pass for this one's.

    Raises:
        UserError: a file of that name is in the way.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file. Choose a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    for name in (FINDINGS, FACTS, PAGE):
        (folder / name).unlink(missing_ok=True)


def write(folder: Path, findings: Sequence[Finding], facts: Mapping[str, Any], data: Data) -> None:
    """Write the three files into *folder*, each replaced as a whole.

    Args:
        findings: in order.
        facts: what was measured, as `json` can write it; the page shows it as a table.
    """
    write_atomically(folder / FINDINGS, json.dumps([f.to_json() for f in findings], indent=1) + "\n")
    write_atomically(folder / FACTS, json.dumps(_finite(facts), indent=1) + "\n")
    write_atomically(folder / PAGE, _page(findings, facts, data))


def table(findings: Iterable[Finding]) -> Table:
    """One row a kind and severity: how many, and what it means for the run."""
    shown = Table(title="Findings", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("severity", "kind", "count", "meaning"):
        shown.add_column(heading, justify="right" if heading == "count" else "left")
    colours = {"error": "red", "warning": "yellow", "note": "dim"}
    for severity, kind, members in _by_kind(findings):
        shown.add_row(f"[{colours[severity]}]{severity}[/]", kind, f"{len(members):,}", KINDS[kind])
    return shown


def examples(findings: Iterable[Finding]) -> Iterator[str]:
    """The first few of every kind, one a line."""
    for severity, kind, members in _by_kind(findings):
        for finding in members[:NAMED]:
            yield f"{severity}: {kind}: {_line(finding)}"
        if len(members) > NAMED:
            yield f"{severity}: {kind}: and {len(members) - NAMED:,} more"


def verdict(findings: Sequence[Finding]) -> str:
    """One line."""
    errors, warnings, notes = (count(findings, severity) for severity in SEVERITIES)
    told = f"{errors:,} errors, {warnings:,} warnings, {notes:,} notes"
    return f"FAIL: {told}. Repair the errors first." if errors else f"PASS: {told}."


def closing(findings: Sequence[Finding], facts: Mapping[str, Any], folder: str) -> Iterator[str]:
    """The last lines: what was measured in short, the verdict, and where the rest is."""
    if "stages" in facts:
        rates = ", ".join(f"{stage['stage']} {stage['images_per_second']:g}" for stage in facts["stages"])
        yield f"time     {_duration(facts['hours'] * 3600)} for {facts['steps']:,} steps; images/s: {rates}"
        loss = facts["first_loss"]
        yield f"loss     {loss['seen']:.3f} at first; equal probabilities give {loss['equal_probabilities']:.3f}"
    if "memory" in facts:
        memory = facts["memory"]
        how = "measured" if memory["measured"] else "estimated"
        needed = "" if memory["needed"] is None else f"; the planned one needs {memory['needed'] / 2**30:.2f} GiB"
        free = f"{memory['free'] / 2**30:.1f} GiB free"
        yield f"memory   micro-batches up to {memory['largest']} fit, {how}{needed} of {free}"
    yield f"pictures {facts['readable']:,} readable, looked at in {facts['reading_seconds']:.1f} s"
    yield f"details  {folder}/{PAGE}, {FINDINGS}, {FACTS}"
    yield verdict(findings)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} minutes" if seconds < 7200 else f"about {seconds / 3600:.1f} hours"


def _finite(value: Any) -> Any:
    """*value* with NaN and infinities, which JSON lacks, as words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(content) for key, content in value.items()}
    return [_finite(content) for content in value] if isinstance(value, list | tuple) else value


def _by_kind(findings: Iterable[Finding]) -> Iterator[tuple[str, str, list[Finding]]]:
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.kind), []).append(finding)
    for (severity, kind), members in groups.items():
        yield severity, kind, members


def _line(finding: Finding) -> str:
    where = f"{finding.split}: {finding.path}: " if finding.path else ""
    others = f" ({finding.others[0]})" if finding.others else ""
    return f"{where}{finding.message}{others}"


def _page(findings: Sequence[Finding], facts: Mapping[str, Any], data: Data) -> str:
    groups = [
        {
            "severity": severity,
            "kind": kind,
            "meaning": KINDS[kind],
            "count": len(members),
            "figures": [_figure(finding, data) for finding in members[:PICTURED]],
        }
        for severity, kind, members in _by_kind(findings)
    ]
    told = [(k, v if isinstance(v, str) else json.dumps(_finite(v), ensure_ascii=False)) for k, v in facts.items()]
    values = {
        "title": f"Check of {data.name}",
        "verdict": verdict(findings),
        "colour": "error" if count(findings, "error") else "note",
        "groups": groups,
        "facts": told,
        "list_of_all": FINDINGS,
    }
    return render("check.html", values)


def _figure(finding: Finding, data: Data) -> dict[str, Any]:
    """What the page shows of a finding; its picture is None for one that is about no picture."""
    tag = None
    if finding.row is not None:
        rows = data.train if finding.split == "train" else data.eval
        tag = image_tag(thumbnail(rows[finding.row]))
    return {"picture": tag, "finding": finding}
