"""The command that starts training on one machine: `accelerate launch`, the same for every target."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from launch.errors import LaunchError
from launch.job import Job, made_resumable, value_of, without

CONFIGS = Path(__file__).parents[1] / "accelerate_configs"
MODULE = "accelerate.commands.launch"
# Without it SIGUSR1 ends the launcher at once and leaves its processes without one.
SIGNALS = ("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # seconds that the launcher gives its processes to save


@dataclass(frozen=True)
class Meeting:
    """Where several machines meet, as shell text: words that the target's shell expands.

    Attributes:
        rank: number of this machine.
        address, port: of the first machine.
    """

    rank: str
    address: str
    port: str


def check(job: Job) -> None:
    """Refuse to start without an accelerate config.

    Raises:
        LaunchError: there is none.
    """
    if job.config is None and not CONFIGS.is_dir():
        raise LaunchError(f"there is no folder {CONFIGS}; run this in a checkout of the project, or give --config.")


def config_of(job: Job, supervised: bool) -> str:
    """Path of the accelerate config for *job*. Without one, accelerate would read the user's own in silence."""
    if job.config is not None:
        return job.config
    if job.nodes > 1:
        name = "several_machines.yaml" if job.gpus else "cpu_several_machines.yaml"
    elif job.processes > 1 or supervised:
        name = "ddp_bf16.yaml" if job.gpus else "cpu_ddp.yaml"
    else:
        name = "one_gpu.yaml" if job.gpus else "cpu.yaml"
    path = CONFIGS / name
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def variables(job: Job, grace: int) -> dict[str, str]:
    """Environment of the launcher.

    Args:
        grace: seconds that the training processes have to save after a signal.
    """
    own = {} if job.gpus else {"ACCELERATE_USE_CPU": "true"}  # no key of the config does this for several processes
    return {**own, SIGNALS[0]: SIGNALS[1], SHUTDOWN: str(grace), **dict(job.environment)}


def launcher(job: Job, supervised: bool, meeting: Meeting | None = None, logs: str | None = None) -> str:
    """Shell text of the launcher without the recipe.

    Args:
        supervised: under torch's supervisor, also with one process: it passes signals on and waits for what they do.
        meeting: of several machines.
        logs: folder for a file a process, as shell text.
    """
    words = [shlex.quote(job.python), "-m", MODULE, "--config_file", shlex.quote(config_of(job, supervised))]
    words += ["--num_processes", str(job.world_size)]
    if supervised or job.world_size > 1:
        words += ["--num_machines", str(job.nodes)]
        place = meeting or Meeting(rank="", address="", port="0")  # one machine: a free port
        if meeting:
            words += ["--machine_rank", place.rank, "--main_process_ip", place.address]
        words += ["--main_process_port", place.port]
        if logs is not None:
            words += ["--log_dir", logs, "--tee", "3"]
    if job.precision is not None:
        words += ["--mixed_precision", job.precision]
    return " ".join(words)


def with_output(job: Job, own: str) -> tuple[Job, str, list[str]]:
    """A job that goes on when it is started again, the folder of its run as shell text, and what was added.

    Args:
        own: the folder, as text in double quotes, of a job without --output.
    """
    ready, said = made_resumable(job, own)
    if not job.resumes:
        return ready, "", said
    given = value_of(job.flags, "output")
    return (
        replace(ready, flags=without(ready.flags, "output")),
        f'"{own}"' if given is None else shlex.quote(given),
        said,
    )


def recipe_lines(job: Job, output: str) -> list[str]:
    """Shell text that sets ``recipe``, still without its --output, and ``output``."""
    return [f"recipe=({recipe(job)})", f"output={output}"]


def output_lines(output: str) -> list[str]:
    """Shell text that completes ``recipe``, and ``ending``: how the recipe says that it ended."""
    if not output:
        return ["ending() { :; }"]
    return ['recipe+=(--output "$output")', 'ending() { cat "$output/summary.json" 2>/dev/null; }']


def recipe(job: Job) -> str:
    """Shell text of the recipe and its flags."""
    return shlex.join([job.recipe, *job.flags])
