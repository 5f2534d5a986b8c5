"""What a preflight found: one entry a fault, with how bad it is. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

# Every kind, and what it means for the run. The order is that of the table and the page.
KINDS = {
    "unreadable": "can't be decoded: training takes another picture instead",
    "truncated": "the file ends early: training takes another picture instead",
    "leak": "the same file in train and eval: the evaluation flatters the model",
    "label_conflict": "the same file under two labels: one of them is wrong",
    "class_missing": "a class without pictures in one part",
    "trial_failed": "the model could not make one step on this data",
    "grouping": "a parameter in no optimizer group, or in several",
    "learning_rate": "a learning rate that is not what the flags ask for, or 0",
    "no_gradient": "open parameters that get no gradient",
    "batch_norm_drift": "running statistics of closed layers that move",
    "initial_loss": "the first loss is far from that of a model that knows nothing",
    "statistics": "inputs that are not normalised as the model expects",
    "memory": "the micro-batch doesn't fit into memory",
    "near_leak": "almost the same picture in train and eval",
    "near_label_conflict": "almost the same picture under two labels",
    "duplicate": "the same file twice in one part: it counts twice",
    "near_duplicate": "almost the same picture twice in one part",
    "blank": "one colour all over",
    "tiny": "fewer pixels than --min-side",
    "aspect": "longer than --max-aspect times its width: the crop sees little of it",
    "huge": "more pixels than --max-megapixels: slow to decode at every epoch",
    "imbalance": "classes of very different size",
    "few_images": "a class with very few training pictures",
    "small_pictures": "most pictures are much smaller than the model's input",
    "schedule": "a stage ends in the middle of a cycle",
    "data": "what was left out when the data was opened",
}


@dataclass(frozen=True)
class Finding:
    """One thing that a person should know before GPU hours are spent.

    Attributes:
        kind: one of `KINDS`.
        severity: ``error`` = repair it first; ``warning`` = look at it; ``note`` = good to know.
        message: what was seen, with the value.
        path: the picture's name; empty where the finding is not about one picture.
        split: ``train`` or ``eval``; empty as above.
        row: of that part of the data; None as above.
        label: name of the picture's class; empty as above.
        others: names of the pictures that it equals or resembles.
    """

    kind: str
    severity: Severity
    message: str
    path: str = ""
    split: str = ""
    row: int | None = None
    label: str = ""
    others: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A dict that `json` can write, the names first."""
        values = asdict(self)
        return {key: values.pop(key) for key in ("path", "kind", "severity")} | values


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """By severity, then kind as in `KINDS`, then part and row."""
    kinds = list(KINDS)
    return sorted(
        findings,
        key=lambda f: (SEVERITIES.index(f.severity), kinds.index(f.kind), f.split != "train", f.row or 0, f.path),
    )


def count(findings: Iterable[Finding], severity: Severity) -> int:
    """How many have this severity."""
    return sum(finding.severity == severity for finding in findings)
