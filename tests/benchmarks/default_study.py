"""What the defaults rest on (docs/defaults.md): beginnings and batches, on small sets of tens to hundreds of pictures.

    python -m tests.benchmarks.default_study --out study --images 200 --ways "head first, 64" "fitted head, 16"
    python -m tests.benchmarks.default_study --out study --table

A way is how the head begins and how many images an optimizer step has. tf_efficientnet_lite0 with its weights at 128
pixels; what no flag below says is a default. The seed draws the held-out quarter and the pictures that are trained on,
in the proportions of the classes. A study goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.short_budget import Line, read, run
from tests.benchmarks.small_sets import SETS, write_split

BEGINNINGS = {
    "head first": ("--head-init", "default", "--freeze-epochs", "3"),
    "fitted head": ("--head-init", "fitted", "--freeze-epochs", "0"),
}
FIXED = ("--model", "tf_efficientnet_lite0", "--image-size", "128", "--limit-eval", "300", "--tracker", "none")
FOUR = ("elpv", "digits", "letters", "patterns")  # need nothing beside the extra demo


def main() -> None:
    """Make the runs that are missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", nargs="*", default=FOUR, choices=SETS)
    parser.add_argument("--images", nargs="*", type=int, default=[200])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--ways", nargs="*", default=["head first, 64", "fitted head, 16"])
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    lines = given.out / "defaults.jsonl"
    wanted = [
        {"data": data, "images": images, "seed": seed, "way": way}
        for seed in given.seeds
        for images in given.images
        for data in given.data
        for way in given.ways
    ]
    for what in wanted if not given.table else ():
        if any(what.items() <= line.items() for line in read(lines)):
            continue
        photos = write_split(what["data"], given.out / f"{what['data']}-{what['seed']}", what["seed"])
        done = what | reached(photos, what)
        with lines.open("a") as file:
            file.write(json.dumps(done) + "\n")
        print(done, file=sys.stderr, flush=True)
    for images in sorted({line["images"] for line in read(lines)}):
        print(table([line for line in read(lines) if line["images"] == images]))


def reached(photos: Path, what: Line) -> Line:
    """Balanced accuracy of ``model/`` and of the last weights, on the held-out pictures."""
    beginning, _, batch = what["way"].partition(", ")
    flags = ["--data", str(photos), "--limit-train", str(what["images"]), "--seed", str(what["seed"]), *FIXED]
    with tempfile.TemporaryDirectory() as folder:
        way = (*BEGINNINGS[beginning], "--batch-size", batch)
        run([sys.executable, "recipes/finetune.py", *flags, *way, "--output", f"{folder}/run"])
        summary = json.loads(Path(folder, "run/summary.json").read_text())
    accuracy = {part: round(summary[part]["balanced_accuracy"], 4) for part in ("best", "final")}
    return {**accuracy, "seconds": summary["seconds"]}


def table(lines: list[Line]) -> str:
    """A row a set: `reached`, the last weights in brackets, means over the seeds that all ways have."""
    ways = list(dict.fromkeys(line["way"] for line in lines))
    head = f"{lines[0]['images']} images"
    rows = [f"| {head} | seeds | {' | '.join(ways)} |", "|---" * (len(ways) + 2) + "|"]
    for data in sorted({line["data"] for line in lines}):
        mine = {(line["way"], line["seed"]): line for line in lines if line["data"] == data}
        seeds = set.intersection(*({seed for way, seed in mine if way == wanted} for wanted in ways))
        if not seeds:
            continue
        means = [
            [statistics.mean(mine[way, seed][part] for seed in seeds) for part in ("best", "final")] for way in ways
        ]
        cells = [f"{best:.3f} ({final:.3f})" for best, final in means]
        rows.append(f"| `{data}` | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
