"""The fault campaign: strike runs of the real recipe, resume them, and compare with the run that was never struck.

    python -m tests.faults.campaign --runs 60      # a table; exit status 1 on any difference
    python -m tests.faults.campaign --seed 17      # one case again, its folders kept

A case is a function of its seed: what strikes, on how many processes, how often (up to three times in one run), under
which flags. What no seed can fix is how far the run has come at a moment: moments are shares of the CPU time that the
reference took, on its rank 0.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests import conftest  # noqa: F401  no network, no login, one thread
from tests.faults import sabotage
from tests.faults.attempts import LIMIT_SECONDS, Ended, Prepare, Ranks, Strike, attempt
from tests.faults.comparison import differences, logged_steps, newest_complete, tracked_twice
from tests.pictures import write_classes

# Everything that has a state, or draws, or changes between stages. New features belong here.
PRESET = """
model: test_efficientnet
weights: none
image_size: 32
batch_norm: train
batch_size: 8
micro_batch: 2
drop_rate: 0.2
drop_path_rate: 0.2
augment: medium
flip: both
label_smoothing: 0.1
mixup: 0.2
cutmix: 1.0
ema_decay: 0.9
warmup_epochs: 0.25
log_every: 3
tracker: none
timeout: 1
finder_steps: 10
finder_sweeps: 1
finder_race: 10
stages:
- {open: head, epochs: 1, lr: 1e-2}
- {open: 50%, epochs: 1, lr: auto, augment: light}
- {open: all, epochs: 2, lr: 1e-2, optimizer: sgd, schedule: one-cycle, warmup_epochs: 0, batch_size: 12}
"""
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": ("--save-every", "2", "--keep", "2", "--workers", "0"),
    "often": ("--save-every", "1", "--keep", "1", "--workers", "0", "--best-by", "loss", "--best-of", "raw"),
    "workers": ("--save-every", "3", "--keep", "1", "--workers", "1"),
    "fitted": ("--save-every", "2", "--keep", "1", "--workers", "0", "--head-init", "fitted"),
    "wandb": ("--save-every", "3", "--keep", "2", "--workers", "0", "--tracker", "wandb"),
}
CACHED = ("fitted",)  # variants whose first stage trains on cached features
SHORT = "short"  # three epochs of few steps, for a quick look
KINDS = ("kill", "kill-at", "signal", "kill-at", "stop-file", "mixed", "kill-at", "stop-after", "twice", "mixed")
GRACEFUL = ("signal", "stop-file", "stop-after")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAVE_SECONDS = 20  # a stop on request may take
REGRESSIONS = ()  # seeds of cases that once failed


@dataclass(frozen=True)
class Case:
    """One run and what strikes it."""

    seed: int
    kind: str
    processes: int
    variant: str
    strikes: int


@dataclass(frozen=True)
class Fault:
    """One strike.

    Attributes:
        ranks: those struck.
        moment: share of the reference's CPU time after which it strikes.
        number: the signal, or the number of the call.
        gap: seconds between two signals.
        watched: the launcher ends the other ranks when one fails.
        torn: half a line is left at the end of ``metrics.jsonl``.
    """

    kind: str
    ranks: tuple[int, ...]
    moment: float = 0.0
    number: int = 0
    call: str = ""
    when: str = ""
    gap: float = 0.0
    watched: bool = True
    torn: bool = False

    def __str__(self) -> str:
        ranks = "+".join(map(str, self.ranks))
        if self.kind == "kill-at":
            return f"kill {ranks} {self.when} {self.call} {self.number}"
        name = signal.Signals(self.number).name + " " if self.number else ""
        return (
            f"{self.kind} {name}{ranks} @{self.moment:.2f}{'' if self.watched else ' unwatched'}{' torn' * self.torn}"
        )


@dataclass(frozen=True)
class Reference:
    """The run that was never struck."""

    run: Path
    seconds: float
    cpu_seconds: float
    calls: dict[str, int]


@dataclass
class Result:
    """What became of a case."""

    case: Case
    faults: list[str] = field(default_factory=list)
    resumed_from: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


def case_of(seed: int) -> Case:
    """The case of a seed: kinds take turns, and so do processes and flags, out of step with them."""
    place = seed + seed // len(KINDS)
    variant = tuple(VARIANTS)[place % len(VARIANTS)]
    strikes = random.Random(seed).choice((1, 1, 2, 3))
    return Case(seed, KINDS[seed % len(KINDS)], 1 + place % 2, variant, strikes)


def fault_of(case: Case, attempt_number: int, reference: Reference) -> Fault:
    """The strike on the n-th attempt at a case."""
    draw = random.Random(f"{case.seed} {attempt_number}")
    kind = case.kind if case.kind != "mixed" else draw.choice(KINDS[:5])
    everyone = tuple(range(case.processes))
    ranks = draw.choice((everyone, *((rank,) for rank in everyone)))
    moment, watched = draw.uniform(0.05, 1.0), draw.random() < 0.7
    if kind == "kill-at":
        call = draw.choice([name for name in sabotage.CALLS if reference.calls.get(name)])
        # What is left of a resumed run makes fewer calls.
        number = draw.randint(1, max(1, reference.calls[call] // (attempt_number + 1)))
        return Fault(kind, (0,), number=number, call=call, when=draw.choice(sabotage.WHEN), watched=watched)
    if kind in ("signal", "twice"):
        return Fault(kind, ranks, moment, draw.choice(SIGNALS), gap=draw.choice((0.05, 1.2)), watched=watched)
    if kind == "kill":
        return Fault(kind, ranks, moment, signal.SIGKILL, watched=watched, torn=draw.random() < 0.5)
    return Fault(kind, everyone, moment)


class Campaign:
    """Plays cases in one folder; the references are run once each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_classes(folder / "photos" / "train", {"cat": 15, "dog": 12, "emu": 10})
        write_classes(folder / "photos" / "val", {"cat": 5, "dog": 4, "emu": 2})
        self._references: dict[tuple[str, int], Reference] = {}

    def flags(self, variant: str) -> tuple[str, ...]:
        """The command line of every attempt, the first one too."""
        preset = self.folder / f"{variant}.yaml"
        text = PRESET.replace("open: head,", "open: head, cache_features: true,") if variant in CACHED else PRESET
        preset.write_text(text.replace("epochs: 2", "epochs: 1") if variant == SHORT else text)
        chosen = VARIANTS["plain" if variant == SHORT else variant]
        data = ("--data", str(self.folder / "photos"), "--preset", str(preset))
        return (*data, "--output", "run", "--resume", "auto", *chosen)

    def reference(self, variant: str, processes: int) -> Reference:
        """The uninterrupted run, its seconds and how often it made each call."""
        key = (variant, processes)
        if key not in self._references:
            folder = self.folder / f"reference-{variant}-{processes}"
            ended = attempt(folder, self.flags(variant), processes=processes, prepare=partial(_counting, folder))
            assert ended.codes == [0] * processes, f"the uninterrupted run failed:\n{ended.stderr}"
            run, (cpu_seconds, calls) = folder / "run", json.loads((folder / "counted.json").read_text())
            world_size = json.loads((run / "summary.json").read_text())["world_size"]
            assert world_size == processes, f"{world_size} processes instead of {processes}"
            self._references[key] = Reference(run, ended.seconds, cpu_seconds, calls)
        return self._references[key]

    def play(self, case: Case) -> Result:
        """Strike, resume, strike again ..., finish, compare. The folder stays if there is a problem."""
        reference, result = self.reference(case.variant, case.processes), Result(case)
        folder, started = self.folder / f"case-{case.seed}", time.monotonic()
        run, flags = folder / "run", self.flags(case.variant)
        finished = False
        for number in range(case.strikes):
            fault, before = fault_of(case, number, reference), newest_complete(run)
            ended = self._strike(folder, flags, case.processes, fault, reference)
            result.faults.append(str(fault))
            found = [*resume_problems(ended, before), *strike_problems(fault, ended, run)]
            result.problems += [f"attempt {number + 1}: {problem}" for problem in found]
            # A stop in the last look at the mistakes leaves the report to the next start.
            finished = ended.codes == [0] * case.processes and (run / "report.html").exists()
            if finished:
                break
            if fault.torn:
                _tear(run / "metrics.jsonl")
            result.resumed_from.append(newest_complete(run) or 0)
        if not finished:
            before = newest_complete(run)
            ended = attempt(folder, flags, processes=case.processes)
            result.problems += resume_problems(ended, before)
            finished = ended.codes == [0] * case.processes
            if not finished:
                result.problems.append(f"lost: the resumed run ended with {ended.codes}: {ended.stderr[-2000:]}")
        if finished:
            result.problems += differences(run, reference.run)
            result.problems += tracked_twice(run)
        result.seconds = time.monotonic() - started
        if not result.problems:
            shutil.rmtree(folder)
        return result

    def _strike(self, folder: Path, flags: Sequence[str], processes: int, fault: Fault, reference: Reference) -> Ended:
        prepare: Prepare | None = None
        strike: Strike | None = None
        moment = fault.moment * reference.cpu_seconds
        if fault.kind == "kill-at":
            prepare = partial(_armed, fault)
        elif fault.kind == "stop-after":
            flags = (*flags, "--stop-after", f"{fault.moment * reference.seconds / 60:.5f}")
        elif fault.kind == "stop-file":
            strike = partial(_stop_file, folder / "run", moment)
        else:
            strike = partial(_send, fault, moment)
        return attempt(folder, flags, processes=processes, prepare=prepare, strike=strike, watched=fault.watched)


def _counting(folder: Path, rank: int) -> Callable[[], None] | None:
    if rank:
        return None
    calls = sabotage.count_calls()

    def write() -> None:
        counted = [time.process_time(), dict(calls)]
        (folder / "counted.json").write_text(json.dumps(counted))

    return write


def _armed(fault: Fault, rank: int) -> None:
    if rank in fault.ranks:
        sabotage.kill_at(fault.call, fault.number, fault.when)


def _send(fault: Fault, moment: float, ranks: Ranks) -> None:
    if fault.number != signal.SIGKILL:  # before it listens, a process simply ends, and has lost nothing
        ranks.wait_for(lambda: all(ranks.listens(rank, fault.number) for rank in range(len(ranks.processes))), 10)
    ranks.wait_for(lambda: ranks.cpu_seconds(0) >= moment, LIMIT_SECONDS)
    for _ in range(2 if fault.kind == "twice" else 1):
        for rank in fault.ranks:
            ranks.send(rank, fault.number)
        if fault.kind == "twice":
            ranks.wait_for(lambda: False, fault.gap)


def _stop_file(run: Path, moment: float, ranks: Ranks) -> None:
    moved = ranks.wait_for(lambda: ranks.cpu_seconds(0) >= moment, LIMIT_SECONDS)
    if moved and ranks.wait_for((run / "config.yaml").exists):
        (run / "STOP").touch()
        ranks.struck = time.monotonic()


def _tear(metrics: Path) -> None:
    if metrics.exists() and not metrics.with_name("summary.json").exists():  # a run that is done writes no more
        with metrics.open("a") as file:
            file.write('{"step": 9, "epoch": 1.8, "stage": 1, "train/lo')


def resume_problems(ended: Ended, newest: int | None) -> list[str]:
    """Whether the attempt went on from the newest complete checkpoint, as far as it came to say so."""
    said = re.search(r"Going on from \S+: step ([\d,]+)", ended.stdout)
    if said is None:
        return []
    step = int(said[1].replace(",", ""))
    return [] if step == newest else [f"went on from step {step}, the newest complete checkpoint is {newest}"]


def strike_problems(fault: Fault, ended: Ended, run: Path) -> list[str]:
    """How the struck attempt should have ended, and didn't."""
    found = [f"ranks {ended.hung} did not end ({fault}): {ended.stderr[-2000:]}"] if ended.hung else []
    if fault.kind == "twice" and ended.after_strike is not None and ended.after_strike > SAVE_SECONDS / 2:
        found.append(f"{ended.after_strike:.1f} s from the second signal to the end")
    if fault.kind not in GRACEFUL or all(code == 0 for code in ended.codes):
        return found
    if any(code != 75 for code in ended.codes):
        return [*found, f"{fault}: exit status {ended.codes} instead of 75: {ended.stderr[-2000:]}"]
    if ended.after_strike is not None and ended.after_strike > SAVE_SECONDS:
        found.append(f"{fault}: {ended.after_strike:.1f} s to save and stop")
    steps, saved = logged_steps(run), newest_complete(run)
    if (steps[-1] if steps else None) != saved:
        found.append(f"{fault}: stopped at step {steps[-1:]}, saved step {saved}")
    summary = run / "summary.json"
    status = json.loads(summary.read_text())["status"] if summary.exists() else None
    if steps and status != "preempted":
        found.append(f"{fault}: summary.json says {status}")
    return found


def shown(result: Result) -> str:
    """One row of the table."""
    case = result.case
    faults, steps = "; ".join(result.faults), ",".join(map(str, result.resumed_from)) or "-"
    return (
        f"{case.seed:>5}  {case.kind:<10} {case.processes:>9}  {case.variant:<8} {steps:>14} "
        f"{len(result.problems):>11} {result.seconds:>7.1f}  {faults}"
    )


HEADING = (
    f"{'seed':>5}  {'kind':<10} {'processes':>9}  {'flags':<8} {'resumed from':>14} "
    f"{'differences':>11} {'seconds':>7}  faults"
)


def play_all(cases: Iterable[Case], folder: Path) -> list[Result]:
    """Play the cases and print the table; the problems follow their row."""
    campaign, results = Campaign(folder), []
    print(HEADING, flush=True)
    for case in cases:
        result = campaign.play(case)
        results.append(result)
        print(shown(result), flush=True)
        for problem in result.problems:
            print(f"       {problem}\n       again: python -m tests.faults.campaign --seed {case.seed}", flush=True)
    return results


def main() -> None:
    """Play the campaign and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60, help="number of cases, besides those that once failed")
    parser.add_argument("--first", type=int, default=0, help="seed of the first")
    parser.add_argument("--seed", type=int, nargs="+", help="these cases alone")
    parser.add_argument("--folder", type=Path, help="where to run; default: a temporary folder")
    options = parser.parse_args()
    seeds = options.seed or [*REGRESSIONS, *range(options.first, options.first + options.runs)]
    folder = options.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    results = play_all(map(case_of, seeds), folder)
    failed = [result for result in results if result.problems]
    struck = sum(len(result.faults) for result in results)
    print(f"{len(results)} runs, {struck} faults, {len(failed)} runs with differences")
    if failed:
        print(f"their folders: {', '.join(str(folder / f'case-{r.case.seed}') for r in failed)}")
    elif options.folder is None:
        shutil.rmtree(folder)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
