"""One job for each combination of flag values: seeds, learning rates ..."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from launch.errors import LaunchError
from launch.job import Job, value_of

FLAG = re.compile(r"[a-z][a-z0-9_-]*")
Task = tuple[tuple[str, str], ...]  # (flag, value) pairs


def parse(texts: Sequence[str], seeds: str | None) -> tuple[Task, ...]:
    """The tasks of ``--vary lr=1e-4,3e-4 --seeds 0,1,2``: every combination, the last one changing fastest.

    Raises:
        LaunchError: no ``flag=value,value``, a flag or value twice, or a seed that is no number.
    """
    axes = [text.partition("=") for text in texts] + ([("seed", "=", _seeds(seeds))] if seeds is not None else [])
    names = [name.strip().removeprefix("--").replace("_", "-") for name, _, _ in axes]
    for (name, equals, values), flag in zip(axes, names, strict=True):
        if not equals or not FLAG.fullmatch(flag) or not all(values.split(",")):
            raise LaunchError(
                f"--vary {name}{equals}{values}: write a flag and its values, such as --vary lr=1e-4,3e-4."
            )
        if len(set(values.split(","))) < len(values.split(",")) or names.count(flag) > 1:
            raise LaunchError(f"--vary {name}={values}: a flag or a value comes twice; the runs would be the same.")
    listed = [values.split(",") for _, _, values in axes]
    return tuple(tuple(zip(names, chosen, strict=True)) for chosen in itertools.product(*listed)) if axes else ()


def _seeds(text: str) -> str:
    """``0-4`` as ``0,1,2,3,4``; numbers and ranges may be mixed."""
    found: list[str] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise LaunchError(f"--seeds is {text!r}; write numbers and ranges, such as 0,1,2 or 0-4.")
        found += map(str, range(int(first), int(last or first) + 1))
    return ",".join(found)


def check(job: Job, tasks: Sequence[Task]) -> None:
    """Refuse a flag that is both fixed and varied.

    Raises:
        LaunchError: names it.
    """
    for flag, _ in tasks[0] if tasks else ():
        if (fixed := value_of(job.flags, flag)) is not None:
            raise LaunchError(
                f"--{flag} {fixed} is fixed in the recipe's flags and varied, too; leave one of the two out."
            )
        if flag in ("output", "resume"):
            raise LaunchError(
                f"--vary {flag}: every run has a folder of its own below --output, and goes on by itself."
            )


def folder(task: Task) -> str:
    """Name of the folder of one task, such as ``lr=1e-4,seed=0``; every task has another one."""
    name = ",".join(f"{flag}={value}" for flag, value in task)
    return re.sub(r"[^A-Za-z0-9=,._+-]", lambda match: f"%{ord(match[0]):x}", name)


def flags(task: Task) -> list[str]:
    """Command line of one task."""
    return [f"--{flag}={value}" for flag, value in task]
