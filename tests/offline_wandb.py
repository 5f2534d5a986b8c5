"""What an offline W&B run holds, read by W&B's own command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def entries(folder: Path, *, whole: bool = True) -> list[dict[str, Any]]:
    """Everything in the offline run in *folder*, such as ``wandb/latest-run``: ``history``, ``config`` ...

    Args:
        whole: False where the run was killed: what can't be read at its end is left out.
    """
    wandb = Path(sys.executable).parent / "wandb"
    command = [str(wandb), "leet", "inspect", "--json", str(folder)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=whole)
    return [json.loads(line) for line in shown.stdout.splitlines()]
