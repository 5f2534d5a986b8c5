"""Make a chosen system call of saving and pruning kill its own process, before, half-way or after doing its work.

`install` replaces the calls wherever they were imported; it runs in the forked child, so nothing has to be undone.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import pkgutil
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

CALLS: dict[str, tuple[Any, str]] = {
    "fsync": (os, "fsync"),
    "rename": (os, "rename"),
    "replace": (os, "replace"),
    "unlink": (os, "unlink"),
    "rmtree": (shutil, "rmtree"),
    "save_file": (safetensors.torch, "save_file"),
    "torch.save": (torch, "save"),
    "write_text": (Path, "write_text"),
}
WHEN = ("before", "half", "after")

Hook = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def import_everything() -> None:
    """Import the whole library, so that forks are quick and `install` finds every place that holds one of the calls."""
    import wandb  # noqa: F401

    import tuning

    for module in pkgutil.walk_packages(tuning.__path__, "tuning."):
        importlib.import_module(module.name)


def install(hook: Hook) -> None:
    """Send every call of `CALLS` in this process to ``hook(name, original, args, keywords)``."""
    import_everything()
    owner = os.getpid()
    for name, (home, attribute) in CALLS.items():
        original = getattr(home, attribute)

        @functools.wraps(original)
        def hooked(*args: Any, _name: str = name, _original: Any = original, **keywords: Any) -> Any:
            if os.getpid() != owner:  # a loader worker forked from here
                return _original(*args, **keywords)
            return hook(_name, _original, args, keywords)

        for holder in (home, *(m for n, m in sys.modules.items() if n.startswith("tuning."))):
            for key, value in list(vars(holder).items()):
                if value is original:
                    setattr(holder, key, hooked)


def count_calls() -> Counter[str]:
    """Count the calls of this process from now on."""
    counted: Counter[str] = Counter()

    def hook(name: str, original: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        counted[name] += 1
        return original(*args, **keywords)

    install(hook)
    return counted


def kill_at(call: str, number: int, when: str) -> None:
    """Let the *number*-th *call* of this process end it by SIGKILL."""
    counter = itertools.count(1)

    def hook(name: str, original: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if name != call or next(counter) != number:
            return original(*args, **keywords)
        if when == "half":
            _half(name, original, args, keywords)
        elif when == "after":
            original(*args, **keywords)
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    install(hook)


def _half(name: str, original: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """What a crash inside the call may leave: a part of the file, or a part of the folder. Else nothing is done."""
    if name in ("save_file", "torch.save", "write_text"):
        original(*args, **keywords)
        target = args[0] if name == "write_text" else args[1]
        if isinstance(target, str | Path):
            os.truncate(target, Path(target).stat().st_size // 2)
    elif name == "rmtree" and Path(args[0]).is_dir():
        files = sorted(Path(args[0]).iterdir())
        for path in files[: len(files) // 2]:
            path.unlink()
