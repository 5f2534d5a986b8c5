"""Evaluation against its ceiling, the forward pass alone.

    python -m tests.benchmarks.evaluation       # about a minute on two idle cores

The ceiling is the model in evaluation mode on one normalised batch in memory, in the better of two layouts of its
weights. In turns with it `judging.evaluation.evaluate`, metrics included, over as many such batches (bar: >= 0.9 of the
ceiling's speed), and over JPEGs of 500 x 375 pixels through the loader that a run has by itself, against t_forward /
(t_forward + t_load) with the loader's own time when nothing else runs.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch

from tests.benchmarks import ceiling
from tests.benchmarks.ceiling import shown
from tests.benchmarks.paired import Row, paired, ratio, table
from tests.benchmarks.photos import write_photos
from tests.benchmarks.steps import RECIPE, ROOT, flags
from tuning import session
from tuning.cli.command_line import parse_command
from tuning.data.loader import Micro
from tuning.feeds import EVAL_BATCH, judging_feed
from tuning.judging.evaluation import evaluate
from tuning.preparing import data_and_model


def resident(batch: Micro, count: int) -> Iterator[Micro]:
    """The same batch as often, as if the images were others."""
    for number in range(count):
        yield batch._replace(rows=torch.arange(EVAL_BATCH) + number * EVAL_BATCH)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=4, help=f"of {EVAL_BATCH} images, when it is a loop's turn")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        print(measure(given, Path(scratch), 2 if given.quick else given.pairs))


def measure(given: argparse.Namespace, scratch: Path, pairs: int) -> str:
    """All comparisons, as a table."""
    photos = write_photos(scratch, EVAL_BATCH, EVAL_BATCH * given.batches)
    command = parse_command(flags(photos, given.model, given.image_size, 32), RECIPE, "", ROOT / "recipes" / "presets")
    accelerator = session.start("fp32", "auto")
    data, model, info = data_and_model(accelerator, command.flags, command.stages)
    workers = session.loader_workers(accelerator, "auto")
    feed = judging_feed(accelerator, data.eval, info.input_size, info, workers)
    batch = next(iter(feed))

    def evaluating(batches: Callable[[], Iterable[Micro]]) -> float:
        began = time.perf_counter()
        evaluate(accelerator, model, batches(), len(data.eval), len(data.classes))
        return (time.perf_counter() - began) / given.batches

    def loading() -> float:
        began = time.perf_counter()
        assert sum(1 for _ in feed) == given.batches
        return (time.perf_counter() - began) / given.batches

    ceilings = {name: ceiling.forwards(model, layout, batch.inputs) for name, layout in ceiling.LAYOUTS.items()}
    jobs = {name: partial(run, given.batches) for name, run in ceilings.items()}
    jobs |= {"ours": partial(evaluating, partial(resident, batch, given.batches))}
    jobs |= {"loading": loading, "from files": partial(evaluating, lambda: feed)}
    times = paired(jobs, pairs)
    best = min(ceilings, key=lambda name: sum(times[name]))
    times["bound"] = [forward + load for forward, load in zip(times[best], times["loading"], strict=True)]
    rows = [
        Row(
            *("evaluation of batches in memory : forward alone", ratio(times, best, "ours"), ">= 0.9"),
            f"{shown(times, best)} with {best}, {shown(times, 'ours')}",
        ),
        *ceiling.other_layouts(times, best),
        Row(
            *("evaluation of files : t_forward / (t_forward + t_load)", ratio(times, "bound", "from files"), ""),
            f"{shown(times, 'from files')}; t_load {shown(times, 'loading')}",
        ),
    ]
    what = f"{given.model}, {given.image_size} px, batch {EVAL_BATCH}, fp32, {torch.get_num_threads()} threads"
    return table(f"Evaluation against its ceiling: {what}", rows)


if __name__ == "__main__":
    main()
