"""Images a second of the recipe against loops that people run: the same work, each at its own best practice.

    python -m tests.benchmarks.peers            # a quarter of an hour on two idle cores; --quick: some five minutes

tf_efficientnet_lite0 at 128 px, batch 32, JPEGs of 500 x 375, random crop and flip, AdamW, float32, two epochs of which
the second counts. Every loop runs in a process of its own (`tests.benchmarks.peer_loops`, a few lines each), with its
default allocator and a loader process a core; the recipe runs as it starts by itself, with W&B offline. All take turns.
Bars, full fine-tuning: >= 1.25 times timm's loader and step at their best flags, 1.9 times a plain PyTorch loop, 1.9
times the loop and data path of Hugging Face's example, 2 times fastai; a head on a frozen backbone: 4 times an
Accelerate example, 7 times fastai's frozen stage. fastai is an optional package (`pip install fastai`); without it its
rows are missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from tests.benchmarks.paired import Row, paired, ratio, table
from tests.benchmarks.photos import write_photos
from tests.benchmarks.steps import ROOT, of_recipe

FULL, HEAD = "ours", "ours, the head alone"
PEERS = {  # name in `peer_loops`: what it is, which of ours does the same work, the bar
    "timm": ("timm's loader and step", FULL, ">= 1.25"),
    "pytorch": ("plain PyTorch loop", FULL, ">= 1.9"),
    "hugging-face": ("Hugging Face example", FULL, ">= 1.9"),
    "fastai": ("fastai", FULL, ">= 2"),
    "frozen-accelerate": ("Accelerate example, frozen backbone", HEAD, ">= 4"),
    "frozen-fastai": ("fastai's frozen stage", HEAD, ">= 7"),
}


def of_peer(name: str, argv: list[str]) -> float:
    """Run one in its own process; seconds of a step in its second epoch."""
    # A benchmark's own settings are not theirs: they get the threads and the allocator that come by themselves.
    env = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "MALLOC_"))}
    command = [sys.executable, "-m", "tests.benchmarks.peer_loops", name, *argv]
    done = subprocess.run(command, cwd=ROOT, env=env | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of an epoch")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=PEERS, help="some of the loops")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    peers = [name for name in given.only or PEERS if "fastai" not in name or importlib.util.find_spec("fastai")]
    with tempfile.TemporaryDirectory() as scratch:
        print(measure(given, Path(scratch), peers, 1 if given.quick else given.pairs))


def measure(given: argparse.Namespace, scratch: Path, peers: list[str], pairs: int) -> str:
    """All comparisons, as a table."""
    batch = given.batch_size
    photos = write_photos(scratch / "photos", given.steps * batch, batch)
    common = ["--data", str(photos), "--model", given.model, "--image-size", str(given.image_size)]
    common += ["--batch-size", str(batch)]
    ours = [*common, "--micro-batch", str(batch), "--weights", "none", "--precision", "fp32", "--augment", "light"]
    ours += ["--log-every", str(given.steps)]
    epochs = {FULL: ("--freeze-epochs", "0", "--epochs", "2"), HEAD: ("--freeze-epochs", "2", "--epochs", "0")}
    needed = {PEERS[name][1] for name in peers}
    jobs = {name: partial(of_recipe, [*ours, *epochs[name]], scratch, batch) for name in epochs if name in needed}
    jobs |= {name: partial(of_peer, name, common) for name in peers}
    times = paired(jobs, pairs)
    speeds = {name: f"{batch / min(seconds):.0f} images/s" for name, seconds in times.items()}
    rows = [
        Row(f"{who} : {what}", ratio(times, name, who), bar, f"{speeds[who]} : {speeds[name]}")
        for name, (what, who, bar) in PEERS.items()
        if name in peers
    ]
    title = f"Images/s of the recipe by those of others: {given.model}, {given.image_size} px, batch {batch}, fp32"
    return table(title, rows)


if __name__ == "__main__":
    main()
