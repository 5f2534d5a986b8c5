"""Finished runs to compare: what each was, how well it did, which differ in their seed alone. Imports no torch."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tuning.analysis.mistakes import losses, per_class
from tuning.cli.coerce import read_yaml, shown
from tuning.comparison.paired import Hits, Paired, paired
from tuning.errors import UserError
from tuning.judging import kept_predictions
from tuning.judging.kept_predictions import Kept
from tuning.tracking.run_folder import CONFIG, MAY_CHANGE, RunFolder

METRICS = ("balanced_accuracy", "top1", "loss")
DATA = "data.parquet"
# Runs that differ only in these are repetitions of one another; --max-steps does change what comes out.
REPETITION = {"seed"} | (MAY_CHANGE - {"max_steps"})
NAMED, VALUE_LENGTH = 3, 40


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        name: its folder as it was typed.
        config: its flags.
        kept: its predictions.
        sizes: encoded bytes of every image, None where that isn't known.
        metrics: `METRICS` of the weights in ``model/``, from the predictions.
    """

    name: str
    config: dict[str, Any]
    kept: Kept
    sizes: tuple[int | None, ...]
    metrics: dict[str, float]

    @property
    def seed(self) -> int:
        """``--seed``."""
        return int(self.config.get("seed", 0))

    @property
    def hits(self) -> Hits:
        """Whether each image was classified right."""
        return self.kept.predicted == self.kept.labels  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Group:
    """Runs whose flags differ in the seed alone.

    Attributes:
        name: the flags in which it differs from the other groups.
    """

    name: str
    runs: tuple[Run, ...]

    def mean(self, metric: str) -> float:
        """Over its runs."""
        return statistics.fmean(run.metrics[metric] for run in self.runs)

    def spread(self, metric: str) -> float | None:
        """Standard deviation over its runs (n - 1); None for one run."""
        return statistics.stdev(run.metrics[metric] for run in self.runs) if len(self.runs) > 1 else None


@dataclass(frozen=True)
class Match:
    """Two runs on the same images: one of the first group, and one of another."""

    group: Group
    first: Run
    second: Run
    result: Paired


def read_runs(names: Sequence[str]) -> list[Run]:
    """Open what was typed.

    Raises:
        UserError: fewer than two runs, one twice, or one that is no finished run with predictions.
    """
    if len(names) < 2:
        raise UserError(f"a comparison needs two or more runs, got {len(names)}.")
    places = [Path(name).expanduser().resolve() for name in names]
    twice = [name for name, place in zip(names, places, strict=True) if places.count(place) > 1]
    if twice:
        raise UserError(f"the same run is named twice: {', '.join(twice)}.")
    return [_read_run(name) for name in names]


def _read_run(name: str) -> Run:
    folder = RunFolder(Path(name).expanduser())
    if not (folder.path / CONFIG).is_file():
        raise UserError(f"{name} is no run: it has no {CONFIG}. Give the --output of runs of recipes/finetune.py.")
    try:
        status = json.loads(folder.summary.read_text(encoding="utf-8")).get("status")
    except (OSError, ValueError, AttributeError):
        status = "not there"
    if status != "done":
        raise UserError(f"the run {name} is not finished (status in summary.json: {status}). Go on by --resume auto.")
    if not folder.predictions.is_file():
        raise UserError(
            f"the run {name} has no {folder.predictions.name}: its last analysis failed, or it was made by an earlier "
            "version. The command of the run with --resume auto makes it."
        )
    kept = kept_predictions.read(folder.predictions)
    counts = per_class(kept.labels, kept.predicted, len(kept.classes))
    recalls = [recall for index in range(len(kept.classes)) if (recall := counts.recall(index)) is not None]
    metrics = {
        "balanced_accuracy": statistics.fmean(recalls),
        "top1": float((kept.predicted == kept.labels).mean()),
        "loss": float(losses(kept.probabilities, kept.labels).mean()),
    }
    return Run(name, read_yaml(folder.path / CONFIG, name), kept, _sizes(folder.path / DATA, kept), metrics)


def _sizes(path: Path, kept: Kept) -> tuple[int | None, ...]:
    """Encoded bytes of the images, from what the run noted of its data: a name may be no more than ``row 0``."""
    unknown: tuple[int | None, ...] = (None,) * len(kept.ids)
    try:
        table = pq.read_table(path, columns=["split", "name", "bytes"], memory_map=False)
    except (OSError, pa.ArrowException, KeyError):
        return unknown
    rows = zip(table["split"].to_pylist(), table["name"].to_pylist(), table["bytes"].to_pylist(), strict=True)
    known = {name: size for split, name, size in rows if split == "eval"}
    return tuple(known.get(name) for name in kept.ids)


def groups(runs: Sequence[Run]) -> list[Group]:
    """The runs by their flags, in the order in which each was first named."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(json.dumps(_flags(run), sort_keys=True, default=str), []).append(run)
    every = [_flags(members[0]) for members in found.values()]
    keys = sorted({key for flags in every for key in flags})
    differing = [key for key in keys if len({json.dumps(f.get(key), default=str) for f in every}) > 1]
    return [
        Group(_name(flags, differing), tuple(members)) for flags, members in zip(every, found.values(), strict=True)
    ]


def _flags(run: Run) -> dict[str, Any]:
    return {key: value for key, value in run.config.items() if key not in REPETITION}


def _name(flags: dict[str, Any], differing: Sequence[str]) -> str:
    told = [f"{key.replace('_', '-')} {_cut(shown(flags.get(key)))}" for key in differing]
    return ", ".join(told) or "all flags alike"


def _cut(text: str) -> str:
    return text if len(text) <= VALUE_LENGTH else f"{text[:VALUE_LENGTH]}..."


def matches(found: Sequence[Group]) -> list[Match]:
    """Every group but the first against the first: runs of the same seed or, without a common one, the first of each.

    Raises:
        UserError: two that would be compared were judged on different images.
    """
    first, *others = found
    pairs = [
        (group, one, other) for group in others for one, other in (_same_seed(first, group) or [_heads(first, group)])
    ]
    for _, one, other in pairs:
        refuse_different_images(one, other)
    return [Match(group, one, other, paired(one.hits, other.hits, one.kept.labels)) for group, one, other in pairs]


def _same_seed(first: Group, second: Group) -> list[tuple[Run, Run]]:
    by_seed = {run.seed: run for run in reversed(second.runs)}
    seeds = {run.seed: run for run in reversed(first.runs)}
    return [(run, by_seed[seed]) for seed, run in sorted(seeds.items()) if seed in by_seed]


def _heads(first: Group, second: Group) -> tuple[Run, Run]:
    return first.runs[0], second.runs[0]


def same_images(one: Run, other: Run) -> bool:
    """Whether both were judged on the same images under the same labels."""
    return _difference(one, other) == ""


def refuse_different_images(one: Run, other: Run) -> None:
    """Refuse a paired test that would pair different images.

    Raises:
        UserError: says how the images differ.
    """
    reason = _difference(one, other)
    if reason:
        raise UserError(
            f"{one.name} and {other.name} can't be compared image by image: {reason}. Give runs on the same --data, "
            "--limit-eval and split; without a split of its own in the data, --seed draws it, so give the same seeds."
        )


def _difference(one: Run, other: Run) -> str:
    if one.kept.classes != other.kept.classes:
        apart = sorted({*one.kept.classes} ^ {*other.kept.classes})
        return f"they have other classes ({_named(apart)})" if apart else "their classes have another order"
    if one.kept.ids != other.kept.ids:
        only = [sorted({*a.kept.ids} - {*b.kept.ids}) for a, b in ((one, other), (other, one))]
        if not any(only):
            return "their images come in another order"
        return "; ".join(
            f"{len(names):,} of the {len(run.kept.ids):,} images of {run.name} are not in the other ({_named(names)})"
            for names, run in zip(only, (one, other), strict=True)
            if names
        )
    relabelled = [name for name, a, b in zip(one.kept.ids, one.kept.labels, other.kept.labels, strict=True) if a != b]
    if relabelled:
        return f"{len(relabelled):,} images have another label ({_named(relabelled)})"
    sized = zip(one.kept.ids, one.sizes, other.sizes, strict=True)
    resized = [name for name, a, b in sized if a is not None and b is not None and a != b]
    return f"{len(resized):,} images have another size in bytes ({_named(resized)})" if resized else ""


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def judged_alike(group: Group) -> bool:
    """Whether all runs of a group were judged on the same images."""
    return all(same_images(group.runs[0], run) for run in group.runs[1:])


def rounded(value: float | None) -> float | None:
    """*value* as JSON can hold it."""
    return None if value is None or not math.isfinite(value) else round(value, 6)
