"""`recipes/finetune.py`, with a fault in one process at one optimizer step of its first start.

    faulty_rank.py RANK STEP KIND FLAGS...

KIND is ``raise``, ``hang`` or the name of a signal that the process sends itself.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

import finetune  # noqa: E402
import torch  # noqa: E402

from tuning import engine  # noqa: E402
from tuning.cli.command_line import run_recipe  # noqa: E402

FAULT = "injected fault"


def main(rank: str, step: int, kind: str) -> None:
    """Run the recipe with the fault in `engine._update`."""
    update, made = engine._update, 0

    def faulty(*args: Any, **named: Any) -> Any:
        nonlocal made
        made += 1
        if made == 1:
            print(f"world size {torch.distributed.get_world_size()}, pid {os.getpid()}", flush=True)
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if made == step and first and os.environ["RANK"] == rank:
            _fail(kind)
        return update(*args, **named)

    engine._update = faulty
    run_recipe(finetune.finetune, "recipes/finetune.py", presets=ROOT / "recipes" / "presets")


def _fail(kind: str) -> None:
    print(f"fault at {time.time()}", flush=True)
    if kind == "raise":
        raise ValueError(FAULT)
    if kind == "hang":
        time.sleep(3600)
    os.kill(os.getpid(), getattr(signal, kind))


if __name__ == "__main__":
    asked = sys.argv[1:4]
    sys.argv[1:4] = []
    main(asked[0], int(asked[1]), asked[2])
