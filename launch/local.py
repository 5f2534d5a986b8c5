"""This machine, or this one of several that are started by hand."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from launch import engine
from launch.errors import LaunchError
from launch.job import Job

GRACE = 60  # seconds that the training processes have to save after a signal
NEVER = 2**31  # seconds
NOTHING_VISIBLE = ("", "-1")


@dataclass(frozen=True)
class Place:
    """This machine among several.

    Attributes:
        rank: its number, from 0; None with one machine.
        address, port: of machine 0.
    """

    rank: int | None = None
    address: str | None = None
    port: int = 29500


HERE = Place()


def count_gpus() -> int:
    """NVIDIA GPUs that a process started here would see."""
    if not shutil.which("nvidia-smi"):
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    found = sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    return 0 if visible in NOTHING_VISIBLE else min(found, len(visible.split(",")))


def check(job: Job, place: Place) -> None:
    """Refuse what this machine can't do.

    Raises:
        LaunchError: names the option, the value and the remedy.
    """
    if job.gpus > count_gpus() and not Path("/dev/kfd").exists() and sys.platform == "linux":
        raise LaunchError(f"--gpus-per-node is {job.gpus}; this machine has {count_gpus()} that a process may use.")
    if job.nodes == 1 and (place.rank is not None or place.address is not None):
        raise LaunchError("--machine-rank and --main-address need several machines: give --nodes, too.")
    if job.nodes > 1 and (place.rank is None or place.address is None):
        raise LaunchError(
            f"--nodes is {job.nodes}; run the same command on each machine with --machine-rank (0 on the first) and "
            "--main-address (of the first)."
        )
    if job.nodes > 1 and place.rank is not None and not 0 <= place.rank < job.nodes:
        raise LaunchError(f"--machine-rank is {place.rank}; with --nodes {job.nodes} it must be 0 to {job.nodes - 1}.")
    if not 0 < place.port < 65536:
        raise LaunchError(f"--main-port is {place.port}; it must be 1 to 65535.")
    if job.seconds is not None and not shutil.which("timeout"):
        raise LaunchError("--time needs the program `timeout` (coreutils), which this machine lacks; use --stop-after.")


def render(job: Job, place: Place = HERE) -> tuple[str, list[str]]:
    """Bash text that trains here, and a sentence for everything that was added to the recipe's flags."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in engine.variables(job, GRACE).items()]
    meeting = None
    if job.nodes > 1:
        meeting = engine.Meeting(str(place.rank), shlex.quote(str(place.address)), str(place.port))
    # What signals accelerate's launcher of one process ends it at once, while the recipe still saves; torch's waits.
    start = engine.launcher(job, supervised=bool(job.seconds or job.restarts), meeting=meeting)
    limit = f"timeout --foreground --signal=TERM --kill-after={GRACE + 30} " if job.seconds else ""
    if not job.restarts:
        once = f"{limit}{job.seconds} " if job.seconds else ""
        return "\n".join([*exports, f"exec {once}{start} {engine.recipe(job)}", ""]), []
    own = "runs/" + job.name + "-$(date +%Y%m%d-%H%M%S)" if job.nodes == 1 else f"runs/{job.name}"
    ready, output, said = engine.with_output(job, own)
    within = f"{limit}$(({job.seconds} - SECONDS)) " if job.seconds else ""
    loop = _LOOP.format(start=within + start, restarts=job.restarts, seconds=job.seconds or NEVER)
    return "\n".join([*exports, *engine.recipe_lines(ready, output), *engine.output_lines(output)]) + loop, said


# A launcher of its own for every start: torch's supervisor restarts its processes, too, but under gloo the new ones
# often look for the old ones and time out.
_LOOP = """
attempt=0 asked=
trap 'asked=yes' INT
trap 'asked=yes; kill -TERM $!' TERM
while true; do
    last=$(ending)
    {start} "${{recipe[@]}}" &
    while wait $!; kill -0 $! 2>/dev/null; do :; done  # a signal ends `wait`, not the recipe
    wait $!
    code=$?
    now=$(ending)
    if [[ $now == "$last" ]]; then now=; fi  # of an earlier part of the run
    if [[ $now == *'"status": "preempted"'* ]]; then asked=yes; fi
    if [[ $asked ]] || ((code == 0 || attempt == {restarts} || SECONDS >= {seconds})); then
        exit "$code"
    fi
    attempt=$((attempt + 1))
    echo "launch: failed (exit status $code): restart $attempt of {restarts}" >&2
done
"""


def run(text: str) -> None:
    """Become the rendered command: signals and exit status are its own."""
    if not shutil.which("bash"):
        raise LaunchError("there is no bash here; run what --dry-run prints by hand.")
    os.execvp("bash", ["bash", "-c", text])
