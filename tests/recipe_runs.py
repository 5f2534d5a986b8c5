"""Run the real recipes: in a forked child that has torch imported already, or as a process of their own."""

from __future__ import annotations

import contextlib
import importlib
import io
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
TIMEOUT_SECONDS = 240

# The first backward of a process decides whether autograd has threads, which no fork survives. Without a GPU it has
# none, unless a fake tensor mode (an export) came first and left a device guard of a GPU: so here, before any test.
torch.ones(1, requires_grad=True).sum().backward()


@dataclass
class Finished:
    """How a recipe ended."""

    returncode: int | None
    stdout: str
    stderr: str


Run = Callable[..., Finished]


def run_forked(
    folder: Path, *flags: str, environment: dict[str, str | None] | None = None, limit: float = TIMEOUT_SECONDS
) -> Finished:
    """`recipes/finetune.py` with *flags*, in *folder*, in a forked child: a second instead of a launch."""
    import_once()
    log = folder / ".output"
    log.mkdir(exist_ok=True)
    context: Any = multiprocessing.get_context("fork")
    child = context.Process(target=_child, args=(folder, flags, environment or {}))
    child.start()
    child.join(limit)
    if child.exitcode is None:
        child.kill()
    texts = [(log / name).read_text() for name in ("stdout", "stderr")]
    for name in ("stdout", "stderr"):
        (log / name).unlink()
    log.rmdir()
    return Finished(child.exitcode, *texts)


def import_once() -> None:
    ours = ("feeds", "tracking.console", "tracking.plots", "tracking.track")
    for module in ("wandb", *(f"tuning.{name}" for name in ours)):
        importlib.import_module(module)


def finetune_here(*flags: str) -> int:
    """`recipes/finetune.py` with *flags* in this process; its exit status."""
    import finetune as recipe

    from tuning.cli.command_line import run_recipe

    sys.argv = ["finetune.py", *flags, "--threads", "1"]
    try:
        run_recipe(recipe.finetune, "recipes/finetune.py", presets=ROOT / "recipes" / "presets")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1


AFTER = (
    "tracking.console",
    "judging.judgement",
    "judging.ensembles",
    "judging.calibration",
    "judging.views",
    "judging.judged_data",
    "judging.predicting",
    "judging.picture_files",
    "judging.top_classes",
)


def import_after() -> None:
    """What recipes that open a run import, once, so that forked processes have it."""
    for module in AFTER:
        importlib.import_module(f"tuning.{module}")


def recipe_here(folder: Path, name: str, *flags: str) -> Finished:
    """``recipes/<name>.py`` with *flags*, in *folder*, in this process, which is a fork and ends soon."""
    from tuning.cli.command_line import run_recipe

    os.chdir(folder)
    sys.argv = [f"{name}.py", *flags, "--threads", "1"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            function = getattr(importlib.import_module(name), name)
            run_recipe(function, f"recipes/{name}.py", presets=ROOT / "recipes" / "presets")
        except SystemExit as end:
            return Finished(end.code if isinstance(end.code, int) else 1, out.getvalue(), err.getvalue())
    raise AssertionError("a recipe ends its process")


def run_in_turn(folder: Path, runs: Sequence[Sequence[str]], limit: float = TIMEOUT_SECONDS) -> list[Finished]:
    """`recipes/finetune.py` once for each list of flags, in *folder*, one after the other in one forked child.

    Half the time of `run_forked` a run, for runs that train nothing: the child imports the recipe once.
    """
    import_once()
    import_after()
    context: Any = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_in_turn, args=(theirs, folder, runs))
    child.start()
    theirs.close()
    try:
        assert ours.poll(limit), f"no answer in {limit:g} s"
        answers: list[Finished] = ours.recv()
        return answers
    finally:
        child.kill()
        child.join()


def _in_turn(answer: Any, folder: Path, runs: Sequence[Sequence[str]]) -> None:
    done = []
    for flags in runs:
        forget_parent()
        done.append(recipe_here(folder, "finetune", *flags))
    answer.send(done)


def _child(folder: Path, flags: tuple[str, ...], environment: dict[str, str | None]) -> None:
    os.chdir(folder)
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    forget_parent()
    with _captured(folder / ".output"):
        try:
            code = finetune_here(*flags)
        except BaseException:
            traceback.print_exc()
            code = 1
    os._exit(code)


def forget_parent() -> None:
    """Start without what the forking process had begun: a fork inherits its number of processes."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextlib.contextmanager
def _captured(log: Path) -> Iterator[None]:
    with (log / "stdout").open("w") as out, (log / "stderr").open("w") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = out, err
        yield
        out.flush()
        err.flush()
