"""What was typed, as a `Job` and the options of its target; then shown, run or submitted."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import launch
from launch import engine, kubernetes, local, sky, slurm, variations
from launch.errors import LaunchError, did_you_mean
from launch.job import PRECISIONS, Job, check, parse_time

TARGETS = ("local", "slurm", "kubernetes", "sky")
USAGE = "python -m launch {local,slurm,kubernetes,sky} [options] -- recipes/X.py FLAGS"
NEXT = {
    "slurm": "Nothing was submitted. With --submit this goes to sbatch.",
    "kubernetes": "Nothing was submitted. Pipe this into `kubectl apply -f -`.",
    "sky": "Nothing was submitted. Write this to a file and run `sky jobs launch FILE`.",
}


class Parser(argparse.ArgumentParser):
    """Errors as `LaunchError`, with the nearest option where one is unknown."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split(" ")[0]
        near = did_you_mean(unknown, self._option_string_actions) if unknown != message.split(" ")[0] else ""
        raise LaunchError(f"{message}.{near} See python -m {self.prog} --help.")


def main(words: Sequence[str]) -> int:
    """Do what was typed; the exit status: 0, 2 after a mistake, or that of a local run."""
    try:
        _do(words)
    except LaunchError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    return 0


def _do(words: Sequence[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: {USAGE}\n\n{launch.__doc__}\nOptions of a target: python -m launch TARGET --help.")
        return
    if words[0] not in TARGETS:
        raise LaunchError(f"unknown target {words[0]!r}; choose {', '.join(TARGETS)}.{did_you_mean(words[0], TARGETS)}")
    own, recipe = _split(words[1:])
    options = _parser(words[0]).parse_args(own)
    if not recipe:
        raise LaunchError(f"there is nothing to run: put -- and the recipe at the end. {USAGE}")
    text, said = _rendered(words[0], options, _job(words[0], options, recipe))
    for sentence in said:
        print(f"launch: {sentence}", file=sys.stderr)
    if words[0] == "local" and not options.dry_run:
        local.run(text)
    elif words[0] == "slurm" and options.submit:
        print(slurm.submit(text))
    else:
        print(text, end="")
        if not options.dry_run:
            print(f"launch: {NEXT[words[0]]}", file=sys.stderr)


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options before the first ``--``, recipe and flags after it."""
    if "--" in words:
        at = list(words).index("--")
        return list(words[:at]), list(words[at + 1 :])
    for word in words:
        if word.endswith(".py"):
            raise LaunchError(f"put -- before {word}, so that its flags aren't read as those of launch. {USAGE}")
    return list(words), []


def _rendered(target: str, options: argparse.Namespace, job: Job) -> tuple[str, list[str]]:
    check(job)
    engine.check(job)
    if target == "local":
        place = local.Place(options.machine_rank, options.main_address, options.main_port)
        local.check(job, place)
        return local.render(job, place)
    if target == "slurm":
        queue = _queue(options)
        slurm.check(job, queue)
        return slurm.render(job, queue)
    if target == "kubernetes":
        names = ("image", "workdir", "claim", "claim_size", "shared_memory", "namespace")
        cluster = kubernetes.Cluster(**{name: getattr(options, name) for name in names})
        kubernetes.check(job, cluster)
        return kubernetes.render(job, cluster)
    cloud = sky.Cloud(options.bucket, options.gpu, options.infra, options.spot, options.setup)
    sky.check(job, cloud)
    return sky.render(job, cloud)


def _job(target: str, options: argparse.Namespace, recipe: list[str]) -> Job:
    gpus = options.gpus_per_node
    if gpus is None:
        if target != "local":
            raise LaunchError("--gpus-per-node is missing: GPUs of each machine, 0 for the CPU.")
        gpus = 0 if options.processes else local.count_gpus()
    return Job(
        recipe=recipe[0],
        flags=tuple(recipe[1:]),
        name=options.name if options.name is not None else Path(recipe[0]).stem.replace("_", "-"),
        nodes=options.nodes,
        gpus=gpus,
        processes=options.processes if options.processes is not None else gpus or 1,
        seconds=parse_time(options.time) if options.time is not None else None,
        environment=tuple(_pair(text) for text in options.env),
        restarts=options.restarts,
        precision=options.mixed_precision,
        config=options.config,
        python=options.python,
        cpus=options.cpus_per_node,
        memory=options.memory,
    )


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise LaunchError(f"--env {text}: write NAME=VALUE.")
    return name, value


def _queue(options: argparse.Namespace) -> slurm.Queue:
    if options.submit and options.dry_run:
        raise LaunchError("--submit and --dry-run clash: one submits, the other only prints. Leave one out.")
    names = ("partition", "account", "qos", "constraint", "warning", "requeue", "at_once")
    found = slurm.Queue(**{name: getattr(options, name) for name in names})
    tasks = variations.parse(options.vary, options.seeds)
    return replace(found, tasks=tasks, setup=tuple(options.setup), more=tuple(options.sbatch))


def _parser(target: str) -> Parser:
    parser = Parser(f"launch {target}", usage=USAGE.replace("{local,slurm,kubernetes,sky}", target), allow_abbrev=False)
    _common(parser, target)
    {"local": _local, "slurm": _slurm, "kubernetes": _kubernetes, "sky": _sky}[target](parser)
    return parser


def _common(parser: Parser, target: str) -> None:
    add = parser.add_argument
    python = {"local": sys.executable, "slurm": sys.executable}.get(target, "python")
    gpus = "default: those of this machine" if target == "local" else "0 = CPU"
    add("--nodes", type=int, default=1, help="machines (default: 1)")
    add("--gpus-per-node", type=int, help=f"GPUs of each machine, one process a GPU; {gpus}")
    add("--processes", type=int, help="processes of each machine without GPUs (default: 1)")
    add("--time", help="time limit: 90m, 2h30m, 1d, 12:00:00")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="variable for the recipe; may be repeated")
    add("--restarts", type=int, default=0, help="starts after a failure, at most (default: 0)")
    add("--mixed-precision", choices=PRECISIONS, help="overrides the accelerate config")
    add(
        "--config",
        metavar="YAML",
        help="accelerate config (default: the one of accelerate_configs/ for these machines)",
    )
    add("--name", help="of the job (default: the recipe's)")
    add("--python", default=python, help=f"interpreter on the machines (default: {python})")
    add("--dry-run", action="store_true", help="print what would run, or be submitted, and stop")
    if target != "local":
        add("--cpus-per-node", type=int, help="CPU cores of each machine")
        add("--memory", type=int, metavar="GB", help="memory of each machine")
    else:
        parser.set_defaults(cpus_per_node=None, memory=None)


def _local(parser: Parser) -> None:
    add = parser.add_argument
    add("--machine-rank", type=int, help="of this machine among --nodes, from 0")
    add("--main-address", help="name or address of machine 0, seen from the others")
    add("--main-port", type=int, default=29500, help="free port of machine 0 (default: 29500)")


def _slurm(parser: Parser) -> None:
    add = parser.add_argument
    add("--submit", action="store_true", help="hand the script to sbatch and print the number of the job")
    for name in ("partition", "account", "qos", "constraint"):
        add(f"--{name}", help="as sbatch takes it")
    add(
        "--warning",
        type=int,
        default=120,
        metavar="SECONDS",
        help="stop this long before the time limit (default: 120)",
    )
    add("--no-requeue", dest="requeue", action="store_false", help="a stopped job doesn't go back into the queue")
    add("--seeds", help="an array of jobs, one a seed: 0,1,2 or 0-4")
    add(
        "--vary",
        action="append",
        default=[],
        metavar="FLAG=A,B",
        help="an array over values of a flag; may be repeated",
    )
    add("--at-once", type=int, help="jobs of the array that run at the same time")
    add("--setup", action="append", default=[], metavar="LINE", help="shell line to begin with: 'module load cuda'")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="further option: --sbatch=--exclusive")


def _kubernetes(parser: Parser) -> None:
    add = parser.add_argument
    add("--image", required=True, help="container image with Python, this project and its packages")
    add("--workdir", default="/workspace", help="folder of this project in the image (default: /workspace)")
    add("--claim", default="runs", help=f"PersistentVolumeClaim for runs, mounted at {kubernetes.RUNS} (default: runs)")
    add("--claim-size", help="make the claim, of this size, such as 100Gi")
    add("--shared-memory", default="16Gi", help="size of /dev/shm (default: 16Gi)")
    add("--namespace", help="default: kubectl's own")


def _sky(parser: Parser) -> None:
    add = parser.add_argument
    add("--bucket", required=True, help=f"cloud bucket for runs, mounted at {sky.RUNS}; made if there is none")
    add("--gpu", help="kind of GPU, such as H100")
    add("--infra", help="cloud, region and zone, such as aws/us-east-1 (default: the cheapest)")
    add("--on-demand", dest="spot", action="store_false", help="machines that aren't taken away")
    add("--setup", default="pip install -e .", help="shell text on a new machine (default: pip install -e .)")
