"""A SkyPilot task: a managed job on spot machines that goes on elsewhere when they are taken away."""

from __future__ import annotations

import re
from dataclasses import dataclass

from launch import engine, far
from launch.errors import LaunchError
from launch.job import Job, made_resumable
from launch.yaml_text import Value, dump

RUNS = "/runs"  # where the bucket of runs is mounted
GRACE = 60
PORT = 29500  # every cluster is the task's own
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_GPU = re.compile(r"[A-Za-z0-9_.-]+")
_CLOUD = re.compile(r"[a-z0-9]+(/[a-z0-9*-]+){0,2}")


@dataclass(frozen=True)
class Cloud:
    """What only SkyPilot needs.

    Attributes:
        bucket: cloud bucket for runs; made if there is none of that name.
        gpu: kind of GPU, such as H100; None with no GPUs.
        infra: where, such as aws or aws/us-east-1; None = wherever it is cheapest.
        spot: spot machines, or the dearer ones that are not taken away.
        setup: shell lines on a new machine.
    """

    bucket: str
    gpu: str | None = None
    infra: str | None = None
    spot: bool = True
    setup: str = "pip install -e ."


def check(job: Job, cloud: Cloud) -> None:
    """Refuse what SkyPilot would refuse, and what would lose a run.

    Raises:
        LaunchError: names the option, the value and the remedy.
    """
    if not _BUCKET.fullmatch(cloud.bucket):
        raise LaunchError(f"--bucket is {cloud.bucket!r}; it must be 3 to 63 small letters, digits, dots and dashes.")
    if (cloud.gpu is None) == (job.gpus > 0):
        raise LaunchError(
            f"--gpu {cloud.gpu} and --gpus-per-node {job.gpus} clash; SkyPilot needs both, or neither for a CPU."
        )
    if cloud.gpu is not None and not _GPU.fullmatch(cloud.gpu):
        raise LaunchError(f"--gpu is {cloud.gpu!r}; it must be one word, such as H100.")
    if cloud.infra is not None and not _CLOUD.fullmatch(cloud.infra):
        raise LaunchError(f"--infra is {cloud.infra!r}; write a cloud, region and zone, such as aws or aws/us-east-1.")
    far.check(job, RUNS)


def render(job: Job, cloud: Cloud) -> tuple[str, list[str]]:
    """The task, and a sentence for everything that was added to the recipe's flags."""
    ready, said = made_resumable(job, f"{RUNS}/{job.name}")
    task: dict[str, Value] = {
        "name": job.name,
        "workdir": ".",
        "num_nodes": job.nodes,
        "resources": _resources(job, cloud),
        "envs": engine.variables(job, GRACE),
        # Cached, because runs append to files and rename folders, which a plain mounted bucket can't.
        "file_mounts": {RUNS: {"name": cloud.bucket, "mode": "MOUNT_CACHED"}},
        "setup": cloud.setup,
        "run": _run(ready),
    }
    return dump(task), said


def _resources(job: Job, cloud: Cloud) -> dict[str, Value]:
    found: dict[str, Value] = {"accelerators": f"{cloud.gpu}:{job.gpus}"} if job.gpus else {}
    found |= {"infra": cloud.infra} if cloud.infra else {}
    found |= {"cpus": f"{job.cpus}+"} if job.cpus else {}
    found |= {"memory": f"{job.memory}+"} if job.memory else {}
    return {
        **found,
        "use_spot": cloud.spot,
        "job_recovery": {"strategy": "EAGER_NEXT_REGION", "max_restarts_on_errors": job.restarts},
    }


def _run(job: Job) -> str:
    """Bash that every machine runs."""
    meeting = engine.Meeting('"$SKYPILOT_NODE_RANK"', "\"${SKYPILOT_NODE_IPS%%$'\\n'*}\"", str(PORT))
    start = engine.launcher(job, supervised=True, meeting=meeting if job.nodes > 1 else None)
    limit = f"timeout --foreground --signal=TERM --kill-after={GRACE + 30} {job.seconds} " if job.seconds else ""
    return f"{limit}{start} {engine.recipe(job)}\n"
