"""An sbatch script that survives a queue: warned, it saves, goes back into the queue, and goes on."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from launch import engine, variations
from launch.errors import LaunchError
from launch.job import Job, clock
from launch.variations import Task

CPUS_A_PROCESS = 8  # where --cpus-per-node says nothing; Slurm's own answer, one, starves the loader
OWN, OWN_OF_ARRAY = "runs/$SLURM_JOB_NAME-$SLURM_JOB_ID", "runs/$SLURM_JOB_NAME-$SLURM_ARRAY_JOB_ID"
SHORTEST = 60  # seconds; Slurm counts time limits in minutes
_WORD = re.compile(r"[\w./:@%+,=&|*\[\]()-]+", re.ASCII)


@dataclass(frozen=True)
class Queue:
    """What only Slurm needs.

    Attributes:
        partition, account, qos, constraint: as sbatch takes them; None = the cluster's default.
        warning: seconds before the time limit at which the run saves and stops.
        requeue: whether a stopped job goes back into the queue.
        tasks: flags of each job of an array; empty = one job.
        at_once: jobs of the array that run at the same time; None = all.
        setup: shell lines before everything else, such as ``module load cuda``.
        more: further ``#SBATCH`` options.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    warning: int = 120
    requeue: bool = True
    tasks: tuple[Task, ...] = ()
    at_once: int | None = None
    setup: tuple[str, ...] = ()
    more: tuple[str, ...] = ()


def check(job: Job, queue: Queue) -> None:
    """Refuse what Slurm would refuse, and what would end a run without its checkpoint.

    Raises:
        LaunchError: names the option, the value and the remedy.
    """
    for name in ("partition", "account", "qos", "constraint"):
        value = getattr(queue, name)
        if value is not None and not _WORD.fullmatch(value):
            raise LaunchError(f"--{name} is {value!r}; it must be one word.")
    for option in queue.more:
        if not re.fullmatch(r"--[a-z][^\n\r]*", option):
            raise LaunchError(f"--sbatch is {option!r}; write one option of sbatch, such as --sbatch=--exclusive.")
    if queue.warning < 1:
        raise LaunchError(f"--warning is {queue.warning}; it must be at least 1 second.")
    if job.seconds is not None and job.seconds < SHORTEST:
        raise LaunchError(f"--time is {job.seconds} s; Slurm counts minutes: at least 1m.")
    if job.seconds is not None and queue.warning >= job.seconds:
        raise LaunchError(
            f"--warning {queue.warning} (seconds) clashes with --time {clock(job.seconds)}: the run would stop "
            "before it begins. Give more time."
        )
    if queue.at_once is not None and (queue.at_once < 1 or not queue.tasks):
        raise LaunchError(f"--at-once is {queue.at_once}; it must be at least 1, and needs --vary or --seeds.")
    variations.check(job, queue.tasks)


def render(job: Job, queue: Queue) -> tuple[str, list[str]]:
    """The script, and a sentence for everything that was added to the recipe's flags."""
    ready, output, said = engine.with_output(job, OWN_OF_ARRAY if queue.tasks else OWN)
    if queue.tasks and output:
        said.append("every job of the array has a folder of its own below --output, named after its flags.")
    exports = [f"export {k}={shlex.quote(v)}" for k, v in engine.variables(job, max(1, queue.warning * 3 // 4)).items()]
    parts = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in _options(job, queue)),
        "",
        *queue.setup,
        *exports,
        *engine.recipe_lines(ready, output),
        *_choice(queue.tasks),
        *engine.output_lines(output),
        *_supervision(job, queue),
    ]
    return "\n".join(parts) + "\n", said


def _options(job: Job, queue: Queue) -> list[str]:
    cpus = job.cpus or (CPUS_A_PROCESS if job.gpus else 1) * job.processes
    options = [f"--job-name={job.name}", f"--nodes={job.nodes}", "--ntasks-per-node=1", f"--cpus-per-task={cpus}"]
    options += [f"--gres=gpu:{job.gpus}"] if job.gpus else []
    options += [f"--mem={job.memory}G"] if job.memory else []
    options += [f"--time={clock(job.seconds)}"] if job.seconds else []
    options += [f"--signal=B:USR1@{queue.warning}", "--requeue" if queue.requeue else "--no-requeue"]
    options += ["--open-mode=append"]  # a job that comes back keeps its log
    options += ["--output=%x-%A_%a.log" if queue.tasks else "--output=%x-%j.log"]
    if queue.tasks:
        throttle = f"%{queue.at_once}" if queue.at_once else ""
        options.append(f"--array=0-{len(queue.tasks) - 1}{throttle}")
    for name in ("partition", "account", "qos", "constraint"):
        value = getattr(queue, name)
        options += [f"--{name}={value}"] if value is not None else []
    return [*options, *queue.more]


def _choice(tasks: Sequence[Task]) -> list[str]:
    """What differs between the jobs of an array."""
    if not tasks:
        return []
    lines = ['case "$SLURM_ARRAY_TASK_ID" in']
    for number, task in enumerate(tasks):
        chosen = f"recipe+=({shlex.join(variations.flags(task))}); "
        lines.append(f"  {number}) {chosen}output+=/{shlex.quote(variations.folder(task))} ;;")
    return [*lines, "esac"]


def _supervision(job: Job, queue: Queue) -> list[str]:
    meeting = engine.Meeting('"$SLURM_NODEID"', '"$LAUNCH_ADDRESS"', '"$LAUNCH_PORT"')
    start = engine.launcher(
        job, supervised=True, meeting=meeting if job.nodes > 1 else None, logs='"$LAUNCH_LOGS/$SLURM_NODEID"'
    )
    cpus = job.cpus or (CPUS_A_PROCESS if job.gpus else 1) * job.processes
    return _SUPERVISION.format(
        start=shlex.quote(f'exec {start} "$@"'),
        srun=f"srun --ntasks={job.nodes} --ntasks-per-node=1 --cpus-per-task={cpus} --export=ALL --kill-on-bad-exit=0",
        restarts=job.restarts,
        requeue="yes" if queue.requeue else "",
    ).splitlines()


# Warned by USR1 the shell hands TERM to the launchers, which save within their grace. A preemption sends TERM to them
# itself; a shell that ends then would end the job for good, so it asks for the queue. A cancelled job is not RUNNING.
_SUPERVISION = """
# All machines meet at the first one; the port is the job's own, below those that systems give away.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export LAUNCH_ADDRESS=${{nodes%%$'\\n'*}}
export PET_RDZV_ID=$SLURM_JOB_ID
requeues=${{SLURM_RESTART_COUNT:-0}}

say() {{ echo "launch: $*" >&2; }}
known() {{ scontrol --oneliner show job "$SLURM_JOB_ID" | grep -o "$1=[^ ]*"; }}
saved() {{ ls "${{output:-.}}/checkpoints" 2>/dev/null; }}

attempt=0 warned=
warn() {{
    warned=yes
    say "the time limit is near: the recipe saves and stops"
    scancel --signal=TERM "$SLURM_JOB_ID.$attempt"
}}
trap warn USR1
trap 'say "Slurm ends the job"' TERM

before=$(saved) asked=$(known PreemptTime)
while true; do
    export LAUNCH_PORT=$((15000 + (SLURM_JOB_ID + attempt) % 15000))
    export LAUNCH_LOGS="logs/$SLURM_JOB_NAME-$SLURM_JOB_ID/$requeues.$attempt"
    last=$(ending)
    {srun} bash -c {start} launch "${{recipe[@]}}" &
    while wait $!; kill -0 $! 2>/dev/null; do :; done  # a signal ends `wait`, not the recipe
    wait $!
    code=$?
    if ((code == 0)); then
        exit 0
    fi
    now=$(ending)
    if [[ $now == "$last" ]]; then now=; fi  # of an earlier part of the run
    if [[ $(known JobState) != JobState=@(RUNNING|SIGNALING) ]]; then
        say "the job was cancelled, or Slurm takes it back itself"
        exit "$code"
    fi
    if [[ $warned || $(known PreemptTime) != "$asked" || $now == *'"reason": "SIG'* ]]; then
        break
    fi
    if [[ $now == *'"status": "preempted"'* ]]; then
        say "stopped on request, resumable"
        exit 75
    fi
    if ((attempt == {restarts})); then
        say "failed (exit status $code) after $attempt restarts; logs of every process: $LAUNCH_LOGS"
        exit "$code"
    fi
    attempt=$((attempt + 1))
    say "failed (exit status $code): restart $attempt of {restarts}"
done

if [[ $warned && $(saved) == "$before" ]]; then
    say "no checkpoint was made within the time limit, so another round would end like this one: give it more --time"
    exit 1
fi
if [[ "{requeue}" ]]; then
    say "back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60  # Slurm ends this shell
fi
exit 75
"""


def submit(text: str) -> str:
    """Hand the script to sbatch; the number of the job.

    Raises:
        LaunchError: sbatch is missing or refuses, with its words.
    """
    if not shutil.which("sbatch"):
        raise LaunchError("--submit needs sbatch, which this machine lacks; run it on a login node of the cluster.")
    done = subprocess.run(["sbatch", "--parsable"], input=text, capture_output=True, text=True)
    if done.returncode:
        raise LaunchError(f"sbatch refuses the job: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]
