"""What was typed, as a `Job` and the options of its target; then shown, run or submitted."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import launch
from launch import engine, kubernetes, local, sky, slurm, variations
from launch.errors import LaunchError, did_you_mean
from launch.job import PRECISIONS, Job, check, parse_time

Rendered = tuple[str, list[str]]  # the text, and what was added to what was typed


class Parser(argparse.ArgumentParser):
    """Errors as `LaunchError`, with the nearest option where one is unknown."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split(" ")[0]
        near = did_you_mean(unknown, self._option_string_actions) if unknown != message.split(" ")[0] else ""
        raise LaunchError(f"{message}.{near} See python -m {self.prog} --help.")


@dataclass(frozen=True)
class Target:
    """A place where recipes run, as one word of the command line.

    Attributes:
        options: adds its own to the parser.
        render: checks and renders a job with the options that were typed.
        hint: what to do with a text that was only printed.
        act: what to do with it instead, where the options ask for that; True when it was done.
        python: interpreter on its machines where none is named.
    """

    options: Callable[[Parser], None]
    render: Callable[[Job, argparse.Namespace], Rendered]
    hint: str = ""
    act: Callable[[str, argparse.Namespace], bool] = lambda text, options: False
    python: str = "python"


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
        print(f"usage: {_usage()}\n\n{launch.__doc__}\nOptions of a target: python -m launch TARGET --help.")
        return
    if words[0] not in TARGETS:
        raise LaunchError(f"unknown target {words[0]!r}; choose {', '.join(TARGETS)}.{did_you_mean(words[0], TARGETS)}")
    own, recipe = _split(words[1:])
    options = _parser(words[0]).parse_args(own)
    if not recipe:
        raise LaunchError(f"there is nothing to run: put -- and the recipe at the end. {_usage()}")
    job, target = _job(words[0], options, recipe), TARGETS[words[0]]
    check(job)
    engine.check(job)
    text, said = target.render(job, options)
    for sentence in said:
        print(f"launch: {sentence}", file=sys.stderr)
    if not options.dry_run and target.act(text, options):
        return
    print(text, end="")
    if not options.dry_run:
        print(f"launch: {target.hint}", file=sys.stderr)


def _usage(target: str | None = None) -> str:
    return f"python -m launch {target or '{' + ','.join(TARGETS) + '}'} [options] -- recipes/X.py FLAGS"


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options before the first ``--``, recipe and flags after it."""
    if "--" in words:
        at = list(words).index("--")
        return list(words[:at]), list(words[at + 1 :])
    for word in words:
        if word.endswith(".py"):
            raise LaunchError(f"put -- before {word}, so that its flags aren't read as those of launch. {_usage()}")
    return list(words), []


def _on_local(job: Job, options: argparse.Namespace) -> Rendered:
    place = local.Place(options.machine_rank, options.main_address, options.main_port)
    local.check(job, place)
    return local.render(job, place)


def _on_slurm(job: Job, options: argparse.Namespace) -> Rendered:
    queue = _queue(options)
    slurm.check(job, queue)
    return slurm.render(job, queue)


def _on_kubernetes(job: Job, options: argparse.Namespace) -> Rendered:
    names = ("image", "workdir", "claim", "claim_size", "shared_memory", "namespace")
    cluster = kubernetes.Cluster(**{name: getattr(options, name) for name in names})
    kubernetes.check(job, cluster)
    return kubernetes.render(job, cluster)


def _on_sky(job: Job, options: argparse.Namespace) -> Rendered:
    cloud = sky.Cloud(options.bucket, options.gpu, options.infra, options.spot, options.setup)
    sky.check(job, cloud)
    return sky.render(job, cloud)


def _run(text: str, _: argparse.Namespace) -> bool:
    local.run(text)
    return True


def _submit(text: str, options: argparse.Namespace) -> bool:
    if options.submit:
        print(slurm.submit(text))
    return bool(options.submit)


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
    parser = Parser(f"launch {target}", usage=_usage(target), allow_abbrev=False)
    _common(parser, target)
    TARGETS[target].options(parser)
    return parser


def _common(parser: Parser, target: str) -> None:
    add = parser.add_argument
    python = TARGETS[target].python
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


TARGETS = {
    "local": Target(_local, _on_local, act=_run, python=sys.executable),
    "slurm": Target(
        _slurm,
        _on_slurm,
        "Nothing was submitted. With --submit this goes to sbatch.",
        act=_submit,
        python=sys.executable,
    ),
    "kubernetes": Target(_kubernetes, _on_kubernetes, "Nothing was submitted. Pipe this into `kubectl apply -f -`."),
    "sky": Target(_sky, _on_sky, "Nothing was submitted. Write this to a file and run `sky jobs launch FILE`."),
}
