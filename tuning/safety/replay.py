"""The file in which a run that met only losses or gradients that are not finite leaves the images of that step."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuning.cli.coerce import shown
from tuning.data.tables import Table, names_of
from tuning.errors import UserError


@dataclass(frozen=True)
class Replay:
    """The images of a step that could not be trained, from ``faults/step-XXXXXXXX.json``.

    Attributes:
        rows: of the training data of that run.
        stage: index of its stage.
    """

    rows: tuple[int, ...]
    stage: int


def read_replay(path: Path, train: Table) -> Replay:
    """Read a replay file and check that its rows still hold the images that it names.

    Raises:
        UserError: no such file, not a replay file, or other data.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--replay {path} can't be read: {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise UserError(f"--replay {path} is not JSON; give a file faults/step-*.json of a run.") from None
    rows, names, stage = _replay_fields(path, content)
    there = [row for row in rows if row < len(train)]
    found = dict(zip(there, names_of(train, there), strict=True))
    for row, name in zip(rows, names, strict=True):
        now = found.get(row, f"nothing (it has {len(train):,} rows)")
        if now != name:
            raise UserError(
                f"--replay {path} names {shown(name)} as row {row} of the training data, now {shown(now)}. "
                "Give --data, --seed, --val-fraction and --limit-train as in that run, by --config RUN/config.yaml."
            )
    return Replay(tuple(rows), stage)


def _replay_fields(path: Path, content: Any) -> tuple[list[int], list[str], int]:
    fields = content if isinstance(content, dict) else {}
    rows, names, stage = fields.get("rows"), fields.get("images"), fields.get("stage")
    whole = isinstance(rows, list) and rows and all(type(row) is int and row >= 0 for row in rows)
    named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not whole or not named or len(rows) != len(names) or type(stage) is not int:  # type: ignore[arg-type]
        raise UserError(
            f"--replay {path} doesn't list rows, images and stage; give a file faults/step-*.json of a run."
        )
    return rows, names, stage  # type: ignore[return-value]
