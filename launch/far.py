"""Machines that have a copy of the project, and a volume that outlives them."""

from __future__ import annotations

from pathlib import PurePosixPath

from launch import engine
from launch.errors import LaunchError
from launch.job import Job, value_of


def check(job: Job, runs: str) -> None:
    """Refuse what such a machine would not find, and a run that would vanish with it.

    Args:
        runs: where the volume is mounted.

    Raises:
        LaunchError: names the option, the value and the remedy.
    """
    output = value_of(job.flags, "output")
    if job.resumes and output is not None and not PurePosixPath(output).is_relative_to(runs):
        raise LaunchError(f"--output {output} would vanish with the machine; name a folder below {runs}.")
    for what, path in (("the recipe", job.recipe), ("the accelerate config", engine.config_of(job, supervised=True))):
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise LaunchError(
                f"{what} {path} isn't below this folder, the one that the machines get; run this in the project's root."
            )
