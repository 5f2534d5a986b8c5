"""What two run folders differ in, bit by bit, and what a run folder must never hold."""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests import offline_wandb

TIMED = ("seconds", "tracker_id")  # in a checkpoint's progress: differ between any two runs
SUMMARY = ("status", "best", "best_by", "final", "skipped_steps", "train_images", "eval_images", "world_size")


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


def logged_steps(run: Path) -> list[int]:
    """The optimizer steps in ``metrics.jsonl``, in its order; lines that can't be read are left out."""
    steps = []
    try:
        lines = (run / "metrics.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "train/loss" in record:
            steps.append(record["step"])
    return steps


def checkpoints(run: Path) -> list[Path]:
    """Folders of checkpoints, oldest first, complete or not."""
    return sorted((run / "checkpoints").glob("step-*"))


def is_complete(checkpoint: Path) -> bool:
    """Whether every file is there with the digest of the manifest (read here, not by the library under test)."""
    try:
        files = json.loads((checkpoint / "manifest.json").read_text())["files"]
        return all(
            hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() == facts["sha256"]
            for name, facts in files.items()
        )
    except (OSError, ValueError, KeyError):
        return False


def newest_complete(run: Path) -> int | None:
    """Step of the newest complete checkpoint."""
    return max((int(c.name.removeprefix("step-")) for c in checkpoints(run) if is_complete(c)), default=None)


def differences(run: Path, reference: Path) -> list[str]:
    """Everything in which the finished *run* is not the run that was never interrupted."""
    found = [f"leftover {path}" for path in leftovers(run, reference)]
    steps = logged_steps(run)
    twice = [step for step, count in Counter(steps).items() if count > 1]
    if twice:
        found.append(f"logged twice: steps {twice}")
    mine, theirs = records(run), records(reference)
    if mine != theirs:
        pairs = itertools.zip_longest(mine, theirs)
        line, (one, other) = next((n, pair) for n, pair in enumerate(pairs, start=1) if pair[0] != pair[1])
        found.append(f"metrics.jsonl from line {line}: {one} for {other}")
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (run, reference)]
    for key in SUMMARY:
        if summaries[0].get(key) != summaries[1].get(key):
            found.append(f"summary.json {key}: {summaries[0].get(key)} for {summaries[1].get(key)}")
    last = [checkpoints(folder)[-1] if checkpoints(folder) else None for folder in (run, reference)]
    if last[0] is None or last[1] is None or last[0].name != last[1].name:
        return [*found, f"last checkpoint: {last[0]} for {last[1]}"]
    for folder, other in ((last[0], last[1]), (run / "model", reference / "model")):
        found += [f"{folder.name}/{difference}" for difference in folder_differences(folder, other)]
    return found


def leftovers(run: Path, reference: Path) -> list[str]:
    """Files that the uninterrupted run doesn't have, missing ones, and checkpoints that are incomplete or too many."""

    def files(folder: Path) -> set[str]:
        paths = (path.relative_to(folder) for path in folder.rglob("*"))
        return {str(path) for path in paths if path.parts[0] != "wandb" and not _in_checkpoint(path)}

    mine, theirs = files(run), files(reference)
    incomplete = [f"{path.name} (incomplete)" for path in checkpoints(run) if not is_complete(path)]
    # A stop on request saves between the regular saves, so the older ones kept may be others, but not more.
    extra = [f"{len(checkpoints(run))} checkpoints"] if len(checkpoints(run)) > len(checkpoints(reference)) + 1 else []
    return [*sorted(mine - theirs), *(f"{path} (missing)" for path in sorted(theirs - mine)), *incomplete, *extra]


def _in_checkpoint(path: Path) -> bool:
    return path.parts[0] == "checkpoints" and len(path.parts) > 1 and path.parts[1].startswith("step-")


CARD = ("README.md", "curves.png")  # of a model: they tell seconds, too


def folder_differences(folder: Path, other: Path) -> list[str]:
    """Names of what differs between two checkpoints, or two model folders: every tensor and every number."""
    names = {path.name for path in folder.iterdir()} | {path.name for path in other.iterdir()}
    found = []
    for name in sorted(names):
        a, b = folder / name, other / name
        if not a.is_file() or not b.is_file():
            found.append(f"{name} in one of the two only")
        elif name not in CARD:
            found += [f"{name}: {where}" for where in unequal(_content(a), _content(b))]
    return found


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix in (".pt", ".pth"):
        return torch.load(path, map_location="cpu", weights_only=True)
    if path.name == "manifest.json":
        manifest = json.loads(path.read_text())
        progress = {key: value for key, value in manifest["progress"].items() if key not in TIMED}
        return {"progress": progress, "world_size": manifest["world_size"]}
    if path.suffix == ".json":
        return json.loads(path.read_text())
    return path.read_bytes()


def unequal(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """Places at which two nested structures of tensors and numbers are not the same bits."""
    if type(a) is not type(b):
        yield f"{where} {type(a).__name__} for {type(b).__name__}"
    elif isinstance(a, dict):
        if list(map(str, sorted(a, key=str))) != list(map(str, sorted(b, key=str))):
            yield f"{where} keys"
        for key in a.keys() & b.keys():
            yield from unequal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            yield f"{where} length"
        for number, (one, two) in enumerate(zip(a, b, strict=False)):
            yield from unequal(one, two, f"{where}/{number}")
    elif isinstance(a, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or _bits(a) != _bits(b):
            yield f"{where} tensor"
    elif isinstance(a, float):
        if struct.pack("d", a) != struct.pack("d", b):
            yield f"{where} {a} for {b}"
    elif a != b:
        yield f"{where} {a} for {b}"


def _bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def tracked_twice(run: Path) -> list[str]:
    """Optimizer steps that W&B was handed more than once, over all parts of the run."""
    steps: Counter[int] = Counter()
    for folder in sorted((run / "wandb").glob("offline-run-*")) if (run / "wandb").exists() else ():
        for entry in offline_wandb.entries(folder, whole=False):
            if entry["type"] == "history" and "train/loss" in entry["history"]["item"]:
                steps[entry["history"]["item"]["step"]] += 1
    twice = [step for step, count in steps.items() if count > 1]
    return [f"handed to W&B twice: steps {twice}"] if twice else []
