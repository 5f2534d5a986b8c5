"""What was found, for a person and for programs: a table, findings.json, and a page with the suspects' pictures."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.table import Table

from tuning.data.images import UnreadableImage, decode
from tuning.data.sources import Data
from tuning.errors import UserError
from tuning.preflight.findings import KINDS, SEVERITIES, Finding, count
from tuning.run_folder import write_atomically

FINDINGS, FACTS, PAGE = "findings.json", "check.json", "check.html"
NAMED = 3  # of a kind on the console
PICTURED = 24  # pictures of a kind on the page
THUMBNAIL = 128  # pixels

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .2em 1.2em .2em 0; vertical-align: top; }
h2 { margin-top: 2em; } .error { color: #b00020; } .warning { color: #9a5b00; } .note { color: #456; }
.suspects { display: flex; flex-wrap: wrap; gap: 1em; } figure { margin: 0; width: 13em; }
figure img, .none { height: 128px; max-width: 100%; background: #eee; display: block; }
.none { width: 128px; } figcaption { font-size: 12px; overflow-wrap: anywhere; }
"""


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
    write_atomically(folder / PAGE, "\n".join(_page(findings, facts, data, THUMBNAIL)) + "\n")


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


def _page(findings: Sequence[Finding], facts: Mapping[str, Any], data: Data, side: int) -> Iterator[str]:
    title = html.escape(f"Check of {data.name}")
    yield f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
    colour = "error" if count(findings, "error") else "note"
    yield f"<h1>{title}</h1><p class={colour}>{html.escape(verdict(findings))}</p>"
    yield "<table><tr><th>severity<th>kind<th>count<th>meaning"
    for severity, kind, members in _by_kind(findings):
        link = f"<a href='#{severity}-{kind}'>{kind}</a>"
        yield f"<tr><td class={severity}>{severity}<td>{link}<td>{len(members):,}<td>{html.escape(KINDS[kind])}"
    yield "</table><h2>Measured</h2><table>"
    for name, value in facts.items():
        told = value if isinstance(value, str) else json.dumps(_finite(value), ensure_ascii=False)
        yield f"<tr><th>{html.escape(name)}<td>{html.escape(told)}"
    yield "</table>"
    for severity, kind, members in _by_kind(findings):
        yield f"<h2 id='{severity}-{kind}' class={severity}>{severity}: {kind} ({len(members):,})</h2>"
        yield f"<p>{html.escape(KINDS[kind])}</p><div class=suspects>"
        for finding in members[:PICTURED]:
            yield _figure(finding, data, side)
        yield "</div>"
        if len(members) > PICTURED:
            yield f"<p>and {len(members) - PICTURED:,} more, in {FINDINGS}</p>"


def _figure(finding: Finding, data: Data, side: int) -> str:
    if finding.row is None:
        return f"<p>{html.escape(finding.message)}</p>"
    others = "".join(f"<br>{html.escape(other)}" for other in finding.others)
    caption = f"<b>{html.escape(finding.split)}</b> {html.escape(finding.path)} [{html.escape(finding.label)}]"
    return (
        f"<figure>{_thumbnail(finding, data, side)}<figcaption>{caption}<br>{html.escape(finding.message)}{others}"
        "</figcaption></figure>"
    )


def _thumbnail(finding: Finding, data: Data, side: int) -> str:
    """The picture itself inside the page; a grey square where it can't be read."""
    assert finding.row is not None
    row = (data.train if finding.split == "train" else data.eval)[finding.row]["image"]
    try:
        picture = Image.fromarray(decode(row["bytes"] or row["path"], min_side=side).numpy())
    except (UnreadableImage, TypeError):
        return "<div class=none></div>"
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return f"<img alt='' src='data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"
