"""The folder a run leaves behind: its name, its files, and whether another run is already there."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuning.cli.coerce import parse_yaml, read_yaml, shown
from tuning.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CONFIG, METRICS, SUMMARY, LOCK = "config.yaml", "metrics.jsonl", "summary.json", ".lock"
# What may differ when a run goes on: none of it changes the optimisation.
MAY_CHANGE = frozenset(
    {
        "workers",
        "threads",
        "micro_batch",
        "grad_checkpointing",
        "log_every",
        "tracker",
        "project",
        "timeout",
        "cache_folder",
    }
    | {"save_every", "save_errors", "keep", "max_steps", "stop_after", "max_skipped", "max_unreadable"}
    | {"overfit_target", "overfit_steps", "overfit_stage", "replay"}
    | {"stage"}  # of find_lr.py
    | {"format", "export_input", "tolerance", "check_images", "latency_repeats", "license"}
    | {"calibrate", "tta", "bootstrap", "top_k"}
    | {"decode", "check_steps", "min_side", "max_aspect", "max_megapixels", "near_bits"}
)
_locks: list[Any] = []  # a lock lasts while its file is open
LONGEST_NAME = 150  # bytes; file systems take 255, and W&B 128 characters


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / METRICS

    @property
    def model(self) -> Path:
        """The best weights as a timm folder."""
        return self.path / "model"

    @property
    def summary(self) -> Path:
        """How the run ended; absent while it runs."""
        return self.path / SUMMARY

    @property
    def predictions(self) -> Path:
        """What the weights in ``model/`` say about every evaluation image."""
        return self.path / "predictions.parquet"

    @property
    def report(self) -> Path:
        """The run on one page; written last."""
        return self.path / "report.html"

    @property
    def plots(self) -> Path:
        """PNG pictures."""
        return self.path / "plots"

    def create(self, config: str) -> None:
        """Make the folder and write ``config.yaml``."""
        self.plots.mkdir(parents=True, exist_ok=True)
        for earlier in (self.summary, self.report, self.predictions):  # of the part of the run before this one
            earlier.unlink(missing_ok=True)
        write_atomically(self.path / CONFIG, config)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``, replacing an earlier one as a whole."""
        write_atomically(self.summary, json.dumps(summary, indent=1) + "\n")


def choose(output: str | None, resume: str, model: str, data: str, now: float) -> RunFolder:
    """--output; the run that the checkpoint under --resume belongs to; or ``runs/<time>-<model>-<data>``.

    Args:
        now: seconds since the epoch, the same on every process.

    Raises:
        UserError: --resume without a run to go on with, or with a checkpoint of another run than --output.
    """
    if resume not in ("never", "auto"):
        return RunFolder(_run_of_checkpoint(Path(resume), output))
    if output is not None:
        return RunFolder(Path(output))
    if resume == "auto":
        raise UserError("--resume auto needs --output: the folder of the run to go on with.")
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
    name = re.sub(r"[^\w.+=@-]", "-", f"{stamp}-{model}-{data}")
    return RunFolder(Path("runs") / name.encode(errors="replace")[:LONGEST_NAME].decode(errors="ignore"))


def _run_of_checkpoint(checkpoint: Path, output: str | None) -> Path:
    if not checkpoint.is_dir():
        raise UserError(f"--resume {checkpoint}: there is no such checkpoint. Use --resume auto for the newest one.")
    run = checkpoint.resolve().parent.parent
    if output is not None and Path(output).resolve() != run:
        raise UserError(
            f"--resume {checkpoint} belongs to the run in {run}, not to --output {output}. Leave --output out to go on "
            "there, or start anew from its weights: --weights PATH of a model.safetensors."
        )
    return run if output is None else Path(output)


def refuse_other_run(folder: RunFolder, resume: str, config: str) -> None:
    """Refuse to write over a run, and to go on with one under flags that change its optimisation.

    Raises:
        UserError: names the folder, or the flags that differ.
    """
    path = folder.path
    if path.exists() and not path.is_dir():
        raise UserError(f"--output {path} is a file. Choose a folder.")
    if not (path / CONFIG).exists():
        _refuse_unwritable(path)
        return
    if resume == "never":
        raise UserError(
            f"--output {path} holds another run. Go on with it by --resume auto, or choose another --output."
        )
    old, new = _read_config(path / CONFIG), parse_yaml(config.encode())
    changed = [k for k in sorted({*old, *new}) if k not in MAY_CHANGE and old.get(k) != new.get(k)]
    if changed:
        told = "; ".join(f"{_flag(k)} was {shown(old.get(k))}, now {shown(new.get(k))}" for k in changed)
        raise UserError(
            f"--resume: the run in {path} was started otherwise: {told}. Give it its own values or a new --output. "
            f"These may change: {', '.join(map(_flag, sorted(MAY_CHANGE)))}."
        )


def lock(folder: RunFolder) -> None:
    """Hold the folder for this process until it ends, however it ends; one process of a run calls it.

    Does nothing where the file system has no locks.

    Raises:
        UserError: another run is training in the folder now.
    """
    if fcntl is None:
        return
    folder.path.mkdir(parents=True, exist_ok=True)
    file = (folder.path / LOCK).open("a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[attr-defined]
    except OSError as error:
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(f"--output {folder.path}: another run is training in it now. Choose another.") from None
        return
    _locks.append(file)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path, str(path))
    except UserError as error:
        raise UserError(f"--resume: not the config.yaml of a run. {error} Choose another --output.") from None
    if not content:
        raise UserError(f"--resume: {path} is not the config.yaml of a run. Choose another --output.")
    return content


def settled_hash(config: str) -> str:
    """SHA-256 of the flags in the text of a ``config.yaml`` that may not change when the run goes on."""
    settled = {key: value for key, value in parse_yaml(config.encode()).items() if key not in MAY_CHANGE}
    return hashlib.sha256(json.dumps(settled, sort_keys=True, default=str).encode()).hexdigest()


def _refuse_unwritable(path: Path) -> None:
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"--output {path}: {existing} can't be written. Choose another --output.")


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file as a whole: a reader sees the old one or the new one, after a power cut too."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def git_commit() -> str | None:
    """Commit of the checkout this library lies in; None outside one."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
