"""What runs, and on what: the one description that every target renders."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from launch.errors import LaunchError

NAME = re.compile(r"[a-z]([-a-z0-9]{0,48}[a-z0-9])?")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
PRECISIONS = ("no", "bf16", "fp16")
RESERVED = (
    "PET_NNODES",
    "PET_NPROC_PER_NODE",
    "PET_NODE_RANK",
    "PET_MASTER_ADDR",
    "PET_MASTER_PORT",
    "ACCELERATE_USE_CPU",
)
# Recipes that leave checkpoints: stopped by a queue, they go on. The others begin anew.
RESUMABLE = ("finetune.py",)
_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_WITH_UNITS = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_CLOCK = re.compile(r"(?:(\d+)-)?(\d{1,2}):(\d{2})(?::(\d{2}))?")


@dataclass(frozen=True)
class Job:
    """A recipe with its flags, and the machines it runs on.

    Attributes:
        recipe: path of the script.
        flags: its command line, as typed.
        name: of the job; letters, digits and dashes.
        nodes: machines.
        gpus: GPUs a machine; 0 = CPU.
        processes: training processes a machine; one a GPU.
        seconds: time limit; None = the target's own.
        environment: variables for the recipe.
        restarts: starts after a failure, at most.
        precision: overrides that of the accelerate config; None leaves it.
        config: accelerate config; None = the one for these machines.
        python: interpreter on the machines.
        cpus: CPU cores a machine; None = the target's default.
        memory: GB a machine; None = the target's default.
    """

    recipe: str
    flags: tuple[str, ...] = ()
    name: str = "recipe"
    nodes: int = 1
    gpus: int = 0
    processes: int = 1
    seconds: int | None = None
    environment: tuple[tuple[str, str], ...] = ()
    restarts: int = 0
    precision: str | None = None
    config: str | None = None
    python: str = "python"
    cpus: int | None = None
    memory: int | None = None

    @property
    def world_size(self) -> int:
        """Training processes on all machines."""
        return self.nodes * self.processes

    @property
    def resumes(self) -> bool:
        """Whether the recipe leaves checkpoints to go on from."""
        return Path(self.recipe).name in RESUMABLE


def check(job: Job) -> None:
    """Refuse a job that can't run.

    Raises:
        LaunchError: names the option, the value and the remedy.
    """
    for option, number, least in (
        ("--nodes", job.nodes, 1),
        ("--gpus-per-node", job.gpus, 0),
        ("--processes", job.processes, 1),
        ("--restarts", job.restarts, 0),
        ("--cpus-per-node", job.cpus, 1),
        ("--memory", job.memory, 1),
    ):
        if number is not None and number < least:
            raise LaunchError(f"{option} is {number}; it must be at least {least}.")
    if job.gpus and job.processes != job.gpus:
        raise LaunchError(
            f"--processes {job.processes} and --gpus-per-node {job.gpus} clash: a GPU belongs to one process. Leave "
            "--processes out, or ask for as many GPUs."
        )
    _check_words(job)
    _check_files(job)
    if not NAME.fullmatch(job.name):
        raise LaunchError(
            f"--name is {job.name!r}; it must be small letters, digits and dashes, 50 at most, a letter first."
        )


def _check_words(job: Job) -> None:
    for name, value in job.environment:
        if not VARIABLE.fullmatch(name):
            raise LaunchError(f"--env {name}={value}: {name!r} can't be the name of a variable.")
        if name in RESERVED:
            raise LaunchError(f"--env {name}={value} clashes with launch, which says this itself; leave it out.")
    for word in (job.recipe, job.python, *job.flags, *(value for _, value in job.environment)):
        if "\0" in word or any("\ud800" <= letter <= "\udfff" for letter in word):
            raise LaunchError(f"{word!r} holds bytes that no script can carry; only UTF-8 text without NUL can.")


def _check_files(job: Job) -> None:
    recipe = Path(job.recipe)
    if recipe.suffix != ".py":
        raise LaunchError(
            f"{job.recipe!r} is no recipe; the first word after -- must be one, such as recipes/finetune.py."
        )
    if not recipe.is_file():
        near = sorted(str(path) for path in recipe.parent.glob("*.py")) if recipe.parent.is_dir() else []
        known = f" In {recipe.parent}: {', '.join(near)}." if near else ""
        raise LaunchError(f"there is no recipe {job.recipe!r} in {Path.cwd()}.{known}")
    if job.config is not None and not Path(job.config).is_file():
        raise LaunchError(f"--config {job.config!r} is no file; accelerate_configs/ has those of this project.")


def parse_time(text: str) -> int:
    """Seconds of ``90m``, ``2h30m``, ``1d``, ``12:00:00`` or ``1-12:00:00``.

    Raises:
        LaunchError: it is no time, or none at all.
    """
    seconds = 0
    if match := _CLOCK.fullmatch(text):
        days, hours, minutes, rest = (int(part or 0) for part in match.groups())
        seconds = days * 86400 + hours * 3600 + minutes * 60 + rest
    elif text and (match := _WITH_UNITS.fullmatch(text)):
        seconds = sum(int(part or 0) * size for part, size in zip(match.groups(), _UNITS.values(), strict=True))
    if seconds <= 0:
        raise LaunchError(f"--time is {text!r}, which is no time; write 90m, 2h30m, 1d, or 12:00:00 (hours first).")
    return seconds


def clock(seconds: int) -> str:
    """``D-HH:MM:SS``."""
    days, rest = divmod(seconds, 86400)
    hours, rest = divmod(rest, 3600)
    return f"{days}-{hours:02d}:{rest // 60:02d}:{rest % 60:02d}"


def value_of(flags: tuple[str, ...], flag: str) -> str | None:
    """The last value of ``--flag`` in a recipe's command line; - and _ are the same. None = not given."""
    found = None
    for index, word in enumerate(flags):
        name, equals, value = word.partition("=")
        if name.startswith("--") and name.replace("_", "-") == f"--{flag}":
            found = value if equals else (flags[index + 1] if index + 1 < len(flags) else "")
    return found


def without(flags: tuple[str, ...], flag: str) -> tuple[str, ...]:
    """*flags* without ``--flag`` and its value."""
    kept: list[str] = []
    words = iter(flags)
    for word in words:
        name, equals, _ = word.partition("=")
        if not (name.startswith("--") and name.replace("_", "-") == f"--{flag}"):
            kept.append(word)
        elif not equals:
            next(words, None)
    return tuple(kept)


def made_resumable(job: Job, output: str) -> tuple[Job, list[str]]:
    """*job* with ``--resume auto`` and ``--output``, where they are missing, and a sentence for each.

    Raises:
        LaunchError: the flags say that a second start must not go on from the newest checkpoint.
    """
    if not job.resumes:
        return job, [f"{job.recipe} leaves no checkpoints: after an interruption it begins anew."]
    said = []
    resume = value_of(job.flags, "resume")
    if resume not in (None, "auto"):
        raise LaunchError(
            f"--resume {resume} clashes with a job that may be interrupted: it must go on from its newest checkpoint. "
            "Use --resume auto with the --output of that run."
        )
    if resume is None:
        job = replace(job, flags=(*job.flags, "--resume", "auto"))
        said.append("added --resume auto: the run goes on where it was interrupted.")
    if value_of(job.flags, "output") is None:
        job = replace(job, flags=(*job.flags, "--output", output))
        said.append(f"added --output {output}: one folder for all parts of the run.")
    return job, said
