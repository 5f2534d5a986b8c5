"""The folder a run leaves behind: its name, its files, and whether another run is already there."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tuning.errors import UserError

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
# What may differ when a run goes on: none of it changes the optimisation.
MAY_CHANGE = frozenset(
    {"workers", "save_every", "keep", "log_every", "tracker", "project", "max_steps", "threads", "micro_batch"}
)


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
    def plots(self) -> Path:
        """PNG pictures."""
        return self.path / "plots"

    def create(self, config: str) -> None:
        """Make the folder and write ``config.yaml``."""
        self.plots.mkdir(parents=True, exist_ok=True)
        self.summary.unlink(missing_ok=True)  # of the part of the run before this one
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
    name = re.sub(r"[/\\:]", "-", f"{stamp}-{model}-{data}")
    return RunFolder(Path("runs") / name)


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
    old, new = _read_config(path / CONFIG), yaml.safe_load(config)
    changed = [k for k in sorted({*old, *new}) if k not in MAY_CHANGE and old.get(k) != new.get(k)]
    if changed:
        told = "; ".join(f"--{k.replace('_', '-')} was {old.get(k)!r}, now {new.get(k)!r}" for k in changed)
        raise UserError(
            f"--resume: the run in {path} was started otherwise: {told}. Give it its own values or a new --output."
        )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"--resume: {path} is not the config.yaml of a run. Choose another --output.")
    return content


def _refuse_unwritable(path: Path) -> None:
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"--output {path}: {existing} can't be written. Choose another --output.")


def forget_lines_after(metrics: Path, step: int) -> None:
    """Drop the lines of ``metrics.jsonl`` that a resumed run will write again, and a torn last line."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    write_atomically(metrics, "".join(line + "\n" for line in kept))


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file as a whole: a reader sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def git_commit() -> str | None:
    """Commit of the checkout this library lies in; None outside one."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
