"""From what was read of the pictures and their labels to findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tuning.data.folders import shorten
from tuning.data.sources import Data
from tuning.data.tables import label_array, names_of
from tuning.preflight.duplicates import Seen, near_pairs, same_files
from tuning.preflight.findings import Finding, Severity
from tuning.preflight.pictures import Facts
from tuning.stages import Stage

Split = Literal["train", "eval"]

IMBALANCE_NOTE, IMBALANCE_WARNING = 3.0, 20.0  # largest class / smallest
FEW_IMAGES = 5  # of a class, to train on
OTHERS_NAMED = 5


@dataclass(frozen=True)
class Limits:
    """From where on a picture is suspect.

    Attributes:
        min_side: of the shorter side, pixels.
        max_aspect: longer side / shorter side.
        max_megapixels: 10^6 pixels.
        near_bits: of 100, by which the perceptual hashes of almost the same picture differ at most.
    """

    min_side: int
    max_aspect: float
    max_megapixels: float
    near_bits: int


def picture_findings(data: Data, facts: Mapping[Split, Sequence[Facts]], limits: Limits) -> list[Finding]:
    """Everything about single pictures and pairs of them.

    Args:
        facts: of every picture of either part.
    """
    named = _Named(data)
    found = [f for split, all_facts in facts.items() for one in all_facts for f in _one(named, split, one, limits)]
    seen = [
        Seen(split, one.row, int(named.labels[split][one.row]), one.digest, None if one.blank else one.perceptual)
        for split, all_facts in facts.items()
        for one in all_facts
        if one.problem is None
    ]
    for group in same_files(seen):
        found += _same(named, group)
    for first, second in near_pairs(seen, limits.near_bits):
        found += _near(named, first, second)
    return found


class _Named:
    """Names and labels of the rows of both parts."""

    def __init__(self, data: Data) -> None:
        self._data = data
        self.labels = {"train": label_array(data.train), "eval": label_array(data.eval)}

    def finding(
        self, kind: str, severity: Severity, message: str, split: str, row: int, others: Sequence[Seen] = ()
    ) -> Finding:
        """What was found in a row, with its label and the names of the others."""
        label = self._data.classes[self.labels[split][row]]
        names = tuple(f"{other.split}: {self.name(other.split, other.row)}" for other in others[:OTHERS_NAMED])
        return Finding(kind, severity, message, self.name(split, row), split, row, label, names)

    def name(self, split: str, row: int) -> str:
        """By which a person finds it."""
        return names_of(self._data.train if split == "train" else self._data.eval, [row])[0]


def _one(named: _Named, split: Split, facts: Facts, limits: Limits) -> Iterator[Finding]:
    if facts.problem is not None:
        kind = "truncated" if facts.cut else "unreadable"
        yield named.finding(kind, "error", facts.problem, split, facts.row)
        return
    short, long = sorted((facts.width, facts.height))
    size = f"{facts.width} x {facts.height} pixels"
    if short < limits.min_side:
        yield named.finding("tiny", "warning", size, split, facts.row)
    if long > limits.max_aspect * short:
        yield named.finding("aspect", "warning", f"{size}, {long / max(short, 1):.1f} : 1", split, facts.row)
    if short * long > limits.max_megapixels * 1e6:
        yield named.finding("huge", "warning", f"{size}, {short * long / 1e6:.0f} megapixels", split, facts.row)
    if facts.blank:
        yield named.finding("blank", "warning", "all pixels are equal", split, facts.row)


def _same(named: _Named, group: Sequence[Seen]) -> Iterator[Finding]:
    """One finding a picture of a group with the same bytes, and one more where the labels differ."""
    splits, labels = {p.split for p in group}, {p.label for p in group}
    for picture in group:
        others = [other for other in group if other is not picture]
        across = [other for other in others if other.split != picture.split]
        if len(splits) > 1:
            message = f"the same bytes as {len(across)} in {'train' if picture.split == 'eval' else 'eval'}"
            yield named.finding("leak", "error", message, picture.split, picture.row, across)
        else:
            message = f"the same bytes as {len(others)} more"
            yield named.finding("duplicate", "warning", message, picture.split, picture.row, others)
        if len(labels) > 1:
            differing = [other for other in others if other.label != picture.label]
            message = f"the same bytes as {len(differing)} under another label"
            yield named.finding("label_conflict", "error", message, picture.split, picture.row, differing)


def _near(named: _Named, first: Seen, second: Seen) -> Iterator[Finding]:
    across, conflict = first.split != second.split, first.label != second.label
    for one, other in ((first, second), (second, first)):
        where = (one.split, one.row, [other])
        if conflict:
            yield named.finding("near_label_conflict", "warning", "almost the same, under another label", *where)
        if across:
            yield named.finding("near_leak", "warning", f"almost the same as one in {other.split}", *where)
        elif not conflict:
            yield named.finding("near_duplicate", "note", "almost the same as another", *where)


def is_balanced(class_weights: str, stages: Sequence[Stage]) -> bool:
    """The loss or the sampling of every stage makes up for the numbers of images."""
    return class_weights == "balanced" or all(stage.sampling != "shuffle" for stage in stages)


def class_findings(data: Data, balanced: bool) -> Iterator[Finding]:
    """About the number of pictures of each class.

    Args:
        balanced: from `is_balanced`.
    """
    train, judge = class_counts(data).values()
    unlearned = [name for name, t, e in zip(data.classes, train, judge, strict=True) if e and not t]
    unjudged = [name for name, t, e in zip(data.classes, train, judge, strict=True) if t and not e]
    absent = [name for name, t, e in zip(data.classes, train, judge, strict=True) if not t and not e]
    if unlearned:
        yield Finding("class_missing", "error", f"in eval, but without a training picture: {shorten(unlearned)}")
    if unjudged:
        yield Finding("class_missing", "warning", f"without a picture in eval: {shorten(unjudged)}")
    if absent:
        yield Finding("class_missing", "note", f"in the class map, but without any picture: {shorten(absent)}")
    few = [f"{name} ({n})" for name, n in zip(data.classes, train, strict=True) if 0 < n < FEW_IMAGES]
    if few:
        yield Finding("few_images", "warning", f"fewer than {FEW_IMAGES} training pictures: {shorten(few)}")
    present = train[train > 0]
    ratio = present.max() / present.min()
    if ratio >= IMBALANCE_NOTE:
        severity: Severity = "note" if balanced or ratio < IMBALANCE_WARNING else "warning"
        remedy = "; --class-weights or --sampling balanced counts rare classes as much, --best-by says by what"
        told = f"largest class {present.max():,}, smallest {present.min():,} pictures"
        yield Finding("imbalance", severity, told if balanced else told + remedy)


def size_findings(facts: Mapping[Split, Sequence[Facts]], image_size: int) -> Iterator[Finding]:
    """Whether the pictures have the pixels that the model is asked to look at."""
    sides = [min(one.width, one.height) for part in facts.values() for one in part if one.problem is None]
    if sides and np.median(sides) * 2 <= image_size:
        yield Finding(
            "small_pictures",
            "note",
            f"the median shorter side is {np.median(sides):g} pixels, the model's input {image_size}; a smaller "
            "--image-size would cost less and show as much",
        )


def class_facts(data: Data) -> dict[str, dict[Split, int]]:
    """Pictures of every class by name and part, as `json` can write them."""
    counts = class_counts(data)
    return {name: {split: int(part[i]) for split, part in counts.items()} for i, name in enumerate(data.classes)}


def class_counts(data: Data) -> dict[Split, np.ndarray]:
    """Pictures of every class in either part, ``(K,)`` each."""
    classes = len(data.classes)
    return {
        "train": np.bincount(label_array(data.train), minlength=classes),
        "eval": np.bincount(label_array(data.eval), minlength=classes),
    }
