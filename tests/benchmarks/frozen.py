"""Frozen stages against the forward pass: the head alone on live pictures, and on features computed once.

    python -m tests.benchmarks.frozen            # some five minutes on two idle cores; --quick: two
    python -m tests.benchmarks.frozen --cached   # the part on cached features

The ceiling is the closed network's forward pass alone, in evaluation mode, in fp32, over normalised batches that lie in
memory, in the better of two layouts of its weights. Against it in turns

- live: the training loop of `recipes/finetune.py` (`train_steps`, clipping, Accelerate) in a stage with the head open,
  over a folder of JPEGs of 500 x 375 pixels with random crops and flips. Bar: >= 0.85 of the ceiling's speed; the same
  with decoded pictures in memory (``--cache ram``); and over one batch in memory, which is what the loop itself costs;
- cached: ``--cache-features``, all epochs of the head, from the pictures on: features, then optimizer steps. Against a
  pass of the network over the same pictures, loading included. Bar: <= 1.15 passes for 20 epochs;
- upper half: an epoch of the layers above half of the depth, on what the others make of every image, against the same
  epoch on decoded pictures in memory.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from tests import conftest  # noqa: F401  no network
from tests.benchmarks import ceiling
from tests.benchmarks.paired import Row, paired, ratio, table
from tests.benchmarks.photos import write_photos
from tests.benchmarks.saving import Resident
from tuning import session
from tuning.caching import with_cache
from tuning.cli.command_line import parse_command
from tuning.data.loader import Feed, Micro
from tuning.engine import train_steps
from tuning.entering import Entered, enter_stage
from tuning.feeds import StageFeeds, judging_feed, stage_feeds
from tuning.preparing import data_and_model, objective, plan_stages
from tuning.progress import Progress
from tuning.safety.unreadable import UnreadablePictures

PRESETS = Path(__file__).parents[2] / "recipes" / "presets"


class Frozen:
    """A run whose only stage trains the head, live or cached, as far as it is asked."""

    def __init__(self, argv: list[str]) -> None:
        self._command = parse_command(argv, "recipes/finetune.py", "", PRESETS)
        self.accelerator = session.start("fp32", "auto")
        self.data, self.model, self.info = data_and_model(self.accelerator, self._command.flags, self._command.stages)
        plan = plan_stages(self.accelerator, self._command, self.data, self.model, self.info)
        self.data = with_cache(self.accelerator, self._command.flags, self.data, plan, self.info)
        (self._planned,) = plan
        self._workers = session.loader_workers(self.accelerator, "auto")
        self._entered: Entered | None = None
        self.steps = self._planned.steps

    def feeds(self) -> tuple[Entered, StageFeeds]:
        """Enter the stage and make its batches; cached ones from pictures."""
        self._entered = enter_stage(self.accelerator, self.model, self._planned, before=self._entered)
        unreadable = UnreadablePictures(self.accelerator, None, self.data, 0.01, resumed=False)
        how = self.accelerator, self._entered, self._planned, self.data, self.info, unreadable
        return self._entered, stage_feeds(*how, 0, "horizontal", self._workers)

    def train(self, entered: Entered, feed: Feed) -> int:
        """All steps that the stage has; how many."""
        loss, clip, _ = objective(self.accelerator, self._command.flags, self.data)
        steps = train_steps(self.accelerator, entered, feed, loss, clip, Progress(), 0)
        return sum(1 for _ in steps)

    def whole(self) -> None:
        """The stage from its pictures to its last step."""
        entered, feeds = self.feeds()
        self.train(entered, feeds.train)
        self._last = entered, feeds.train

    def steps_again(self) -> float:
        """The optimizer steps of `whole` once more, on the features that it has computed; seconds of all of them."""
        return timed(partial(self.train, *self._last), 1)

    def one_pass(self, *parts: str) -> None:
        """The network once over the pictures that the stage reads, in evaluation mode."""
        self.model.eval()
        with torch.inference_mode():
            for part in parts:
                rows = getattr(self.data, part)
                feed = judging_feed(self.accelerator, rows, self.info.input_size, self.info, self._workers)
                for micro in feed:
                    self.model(micro.inputs)


def timed(job: Callable[[], object], count: int) -> float:
    """Seconds of one of *count* things that *job* does."""
    began = time.perf_counter()
    job()
    return (time.perf_counter() - began) / count


def drained(micros: Iterable[Micro], count: int) -> None:
    """Take so many batches."""
    assert sum(1 for _ in islice(micros, count)) == count


def rows_of_live(argv: list[str], pairs: int) -> list[Row]:
    """The head on live pictures by the ceiling."""
    kept = Frozen([*argv, "--cache", "ram"])
    entered_kept, feeds_kept = kept.feeds()
    run = Frozen(argv)
    entered, feeds = run.feeds()
    steps = feeds.train.order.steps_per_epoch
    batch = next(feeds.train.epoch(0))
    same = Resident(feeds.train.order, run.info.input_size, run.accelerator.device)
    same._features, same._labels = batch.inputs, batch.labels
    tops = {name: ceiling.forwards(run.model, layout, batch.inputs) for name, layout in ceiling.LAYOUTS.items()}
    jobs: dict[str, Callable[[], float]] = {name: partial(top, steps) for name, top in tops.items()}
    jobs["in memory"] = partial(timed, partial(run.train, entered, same), steps)
    jobs["live"] = partial(timed, partial(run.train, entered, feeds.train), steps)
    jobs["from the cache"] = partial(timed, partial(kept.train, entered_kept, feeds_kept.train), steps)
    jobs["loading"] = lambda: timed(partial(drained, feeds.train.epoch(0), steps), steps)
    times = paired(jobs, pairs)
    best = min(tops, key=lambda name: sum(times[name]))
    note = ", ".join(f"{name} {1e3 * min(times[name]):.0f} ms" for name in jobs)
    return [
        Row("head on live pictures : forward only", ratio(times, best, "live"), ">= 0.85", f"a step: {note}"),
        Row("... with `--cache ram` : forward only", ratio(times, best, "from the cache"), ">= 0.85", "filled before"),
        Row("head on a batch in memory : forward only", ratio(times, best, "in memory"), "", f"with {best}"),
    ]


def rows_of_cached(argv: list[str], pairs: int, epochs: int) -> list[Row]:
    """All epochs of the head on features by passes over the pictures."""
    run = Frozen([*argv, "--freeze-epochs", str(epochs), "--cache-features"])
    run.whole()
    jobs = {"pass": partial(run.one_pass, "train", "eval"), "cached": run.whole}
    times = paired({**{n: partial(timed, job, 1) for n, job in jobs.items()}, "steps": run.steps_again}, pairs)
    note = ", ".join(f"{name} {min(times[name]):.1f} s" for name in jobs)
    what = f"{epochs} epochs of the head on cached features : one pass"
    step = f"a step {1e3 * min(times['steps']) / run.steps:.2f} ms"
    return [
        Row(what, ratio(times, "cached", "pass"), "<= 1.15", note),
        Row("... their optimizer steps alone : one pass", ratio(times, "steps", "pass"), "", step),
    ]


def rows_of_upper(argv: list[str], pairs: int, scratch: Path) -> list[Row]:
    """An epoch of the upper half on features by the same epoch on pictures."""

    def run(name: str, cached: bool) -> Callable[[], object]:
        (scratch / name).write_text(f"stages: [{{open: 0.5, epochs: 1, cache_features: {str(cached).lower()}}}]")
        made = Frozen([*argv, "--preset", str(scratch / name), "--augment", "none", "--cache", "ram"])
        entered, feeds = made.feeds()
        return partial(made.train, entered, feeds.train)

    jobs = {"live": run("live.yaml", cached=False), "features": run("features.yaml", cached=True)}
    times = paired({name: partial(timed, job, 1) for name, job in jobs.items()}, pairs)
    note = ", ".join(f"{name} {min(times[name]):.1f} s" for name in jobs)
    return [Row("an epoch of the upper half on features : on pictures", ratio(times, "features", "live"), "", note)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=20, help="of the head on cached features")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of an epoch")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--cached", action="store_true", help="on cached features only")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    pairs, steps = (2, 10) if given.quick else (given.pairs, given.steps)
    batch = str(given.batch_size)
    with tempfile.TemporaryDirectory() as scratch:
        photos = write_photos(Path(scratch), steps * given.batch_size, given.batch_size)
        argv = ["--data", str(photos), "--model", given.model, "--weights", "none", "--batch-norm", "train"]
        argv += ["--image-size", str(given.image_size), "--batch-size", batch, "--micro-batch", batch]
        argv += ["--tracker", "none", "--precision", "fp32"]
        head = [*argv, "--freeze-epochs", "1", "--epochs", "0"]
        rows = [] if given.cached else rows_of_live(head, pairs)
        rows += rows_of_cached(head, pairs, given.epochs) + rows_of_upper(argv, pairs, Path(scratch))
    threads = torch.get_num_threads()
    what = f"{given.model}, {given.image_size} px, batch {given.batch_size}, fp32, {threads} threads"
    print(table(f"Frozen stages against the forward pass: {what}", rows))


if __name__ == "__main__":
    main()
