"""What gradient checkpointing saves: bytes that a forward pass keeps for its backward pass, with and without.

    python -m tests.benchmarks.recomputing                         # some minutes
    python -m tests.benchmarks.recomputing --models convnext_tiny

Counted by torch's hooks on saved tensors, each memory once; weights and buffers don't count. Beside it by how much a
process grows beyond the model and the pictures in its first forward and backward pass, as the kernel says: gradients
and the block that is computed again are included there. Every figure comes from a process of its own. No times.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

import timm
import torch

from tests import conftest  # noqa: F401  no network
from tests.benchmarks.paired import hardware_line
from tuning.entering import Entered
from tuning.preflight.memory import counted_activations
from tuning.recomputing import recompute_blocks

MODELS = ("resnet50", "convnext_tiny", "vit_small_patch16_224")


def peak() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(name: str, images: int, recomputes: bool) -> dict[str, int]:
    """Bytes kept by one forward pass, and the growth of the process in it and its backward pass."""
    model = timm.create_model(name, num_classes=10).train()
    if recomputes:
        recompute_blocks(model, "--grad-checkpointing", "leave it out")
    entered = Entered.__new__(Entered)
    entered.model = model
    inputs, before = torch.randn(images, 3, 224, 224), peak()
    with counted_activations(entered) as kept:
        loss = model(inputs).float().logsumexp(1).sum()
        saved = kept()
    loss.backward()
    return {"kept": saved, "peak": peak() - before}


def in_a_process(name: str, images: int, recomputes: bool) -> dict[str, int]:
    """`measured`, where nothing else has been."""
    command = [sys.executable, "-m", "tests.benchmarks.recomputing", "--models", name, "--images", str(images)]
    done = subprocess.run([*command, "--one", str(int(recomputes))], capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--images", type=int, default=8, help="in the forward pass")
    parser.add_argument("--one", type=int, choices=(0, 1), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        print(json.dumps(measured(given.models[0], given.images, bool(given.one))))
        return
    print(f"{hardware_line()}, fp32, 224 px, {given.images} images, everything open; MB an image\n")
    print("| model | kept without | with | | peak without | with | |\n|---|---|---|---|---|---|---|")
    for name in given.models:
        plain, less = (in_a_process(name, given.images, recomputes) for recomputes in (False, True))
        cells = [name]
        for key in ("kept", "peak"):
            a, b = (found[key] / given.images / 1e6 for found in (plain, less))
            cells += [f"{a:.1f}", f"{b:.1f}", f"{b / a:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
