"""Full fine-tuning against its ceiling: what everything around forward, backward and update costs.

    python -m tests.benchmarks.steps            # some six minutes on two idle cores; --quick: two

The ceiling is the same model and precision with fused AdamW on one normalised batch in memory, in the better of two
layouts of its weights: no loader, no EMA, no clipping, no curves, no Accelerate. Against it in turns

- the loop of `recipes/finetune.py` over such a batch: `train_steps`, clipping, EMA, curves in metrics.jsonl and in W&B
  (offline), the agreement at every boundary. Bar: >= 0.97 of the ceiling's speed;
- the recipe itself on a folder of JPEGs of 500 x 375 pixels, in its second epoch, by its own records: one thread trains
  and one process loads beside it (>= 0.97 of the ceiling of one thread), and as the recipe starts by itself, where both
  share the cores (never under t_step / (t_step + t_load), with the loader's own time when nothing else runs).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from tests.benchmarks import ceiling
from tests.benchmarks.ceiling import shown
from tests.benchmarks.paired import Row, paired, ratio, table
from tests.benchmarks.photos import write_photos
from tests.benchmarks.saving import Resident
from tuning import session
from tuning.averaging.averages import Averages
from tuning.cli.command_line import Command, parse_command
from tuning.data.loader import Micro
from tuning.engine import train_steps
from tuning.entering import enter_stage
from tuning.feeds import stage_feeds
from tuning.preparing import data_and_model, objective, plan_stages
from tuning.progress import Progress
from tuning.safety.heartbeat import beat
from tuning.safety.numerical_faults import NumericalFaults
from tuning.safety.stopping import Boundary
from tuning.safety.unreadable import UnreadablePictures
from tuning.tracking.console import Speaker
from tuning.tracking.records import read_records
from tuning.tracking.run_folder import RunFolder
from tuning.tracking.track import Curves, described, open_tracker

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/finetune.py"
EMA_DECAY = "0.999"


def flags(folder: Path, model: str, size: int, batch: int, *more: str) -> list[str]:
    """Full fine-tuning from the first step on, for two epochs."""
    network = ["--model", model, "--weights", "none", "--image-size", str(size), "--precision", "fp32"]
    stages = ["--batch-size", str(batch), "--micro-batch", str(batch), "--freeze-epochs", "0", "--epochs", "2"]
    return ["--data", str(folder), *network, *stages, "--ema-decay", EMA_DECAY, *more]


class OurLoop:
    """What `recipes/finetune.py` does at every step, over one batch in memory, as far as it is asked.

    Attributes:
        batch: the first of the loader's, as it arrives at the model.
        model: as it was before the first step.
    """

    def __init__(self, command: Command, folder: RunFolder) -> None:
        self._command, self._folder = command, folder
        self.accelerator = session.start("fp32", "auto")
        self.data, model, self.info = data_and_model(self.accelerator, command.flags, command.stages)
        self.model = copy.deepcopy(model)
        (self._planned,) = plan_stages(self.accelerator, command, self.data, model, self.info)
        self._entered = enter_stage(self.accelerator, model, self._planned)
        unreadable = UnreadablePictures(self.accelerator, None, self.data, 0.01, resumed=False)
        self._feeds = stage_feeds(
            *(self.accelerator, self._entered, self._planned, self.data, self.info, unreadable),
            *(0, command.flags.regularisation.flip, session.loader_workers(self.accelerator, "auto")),
        )
        self.batch: Micro = next(self._feeds.train.epoch(0))
        self._steps = self._train()

    def seconds(self, count: int) -> float:
        """Of a step, over *count* of them."""
        began = time.perf_counter()
        for loss in islice(self._steps, count):
            last = loss
        last.item()
        return (time.perf_counter() - began) / count

    def loading(self, count: int) -> float:
        """Of the loader's work for a step, with nothing beside it."""
        batches = self._feeds.train.epoch(1)
        began = time.perf_counter()
        made = sum(1 for _ in islice(batches, count))
        return (time.perf_counter() - began) / made

    def _train(self) -> Iterator[torch.Tensor]:
        accelerator, run, entered = self.accelerator, self._command.flags.run, self._entered
        progress, speaker = Progress(), Speaker(accelerator.is_main_process)
        tracker = open_tracker(accelerator, run, self._folder, described(self._command, accelerator), progress)
        faults = NumericalFaults(run.max_skipped, self._folder.path, self.data.train, writes=True)
        curves = Curves(accelerator, self._folder, tracker, run.log_every, faults, 0)
        loss, clip, _ = objective(accelerator, self._command.flags, self.data)
        averages = Averages(entered.model, [self._planned], float(EMA_DECAY))
        boundary = Boundary(accelerator, self._folder.path, time.time())
        feed = Resident(self._feeds.train.order, self.info.input_size, accelerator.device)
        feed._features, feed._labels = self.batch.inputs, self.batch.labels
        while True:
            progress.stage_step = 0  # the stage has too few steps for this
            for step in train_steps(accelerator, entered, feed, loss, clip, progress, run.seed):
                beat(step.step)
                averages.update(entered.model, progress)
                curves.add(step, progress)
                speaker.show_progress("", step.step, self._planned.steps, curves.latest)
                boundary.agree(step.step)
                yield step.loss


def second_epoch(metrics: Path, batch: int) -> float:
    """Seconds of a step in the second epoch, by what a run has written."""
    windows = [record for record in read_records(metrics) if "perf/images_per_second" in record]
    steps, seconds, before = 0, 0.0, 0
    for record in windows:
        if record["epoch"] > 1:
            steps += record["step"] - before
            seconds += (record["step"] - before) * batch / record["perf/images_per_second"]
        before = record["step"]
    return seconds / steps


def of_recipe(argv: list[str], folder: Path, batch: int) -> float:
    """Run the recipe; seconds of a step in its second epoch."""
    output = Path(tempfile.mkdtemp(dir=folder))
    env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    env |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, RECIPE, *argv, "--output", str(output / "run")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    assert json.loads((output / "run" / "summary.json").read_text())["status"] == "done"
    return second_epoch(output / "run" / "metrics.jsonl", batch)


def with_threads(count: int, job: partial[float]) -> float:
    """What *job* returns under so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return job()
    finally:
        torch.set_num_threads(before)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--window", type=int, default=5, help="steps that a loop makes when it is its turn")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    pairs, epoch = (2, 5) if given.quick else (given.pairs, 15)  # optimizer steps of an epoch
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    with tempfile.TemporaryDirectory() as scratch:
        print(measure(given, Path(scratch), pairs, epoch))


def measure(given: argparse.Namespace, scratch: Path, pairs: int, epoch: int) -> str:
    """All comparisons, as a table."""
    batch, window = given.batch_size, given.window
    photos = write_photos(scratch / "photos", epoch * batch, batch)
    argv = flags(photos, given.model, given.image_size, batch, "--log-every", str(epoch))
    folder = RunFolder(scratch / "loop")
    folder.path.mkdir()
    ours = OurLoop(parse_command(argv, RECIPE, "", ROOT / "recipes" / "presets"), folder)
    images, labels = ours.batch.inputs, ours.batch.labels
    ceilings = {name: ceiling.steps(ours.model, layout, images, labels) for name, layout in ceiling.LAYOUTS.items()}
    ours.seconds(1)
    jobs = {name: partial(run, window) for name, run in (*ceilings.items(), ("ours", ours.seconds))}
    times = paired(jobs, pairs)
    best = min(ceilings, key=lambda name: sum(times[name]))
    top = ceilings[best]
    recipes = {
        "ceiling": partial(top, window),
        "loading": partial(ours.loading, epoch),
        "shared": partial(of_recipe, argv, scratch, batch),
        "ceiling of a thread": partial(with_threads, 1, partial(top, window)),
        "beside": partial(of_recipe, [*argv, "--threads", "1", "--workers", "1"], scratch, batch),
    }
    end_to_end = paired(recipes, max(1, min(3, pairs - 1)))
    end_to_end["bound"] = [a + b for a, b in zip(end_to_end["ceiling"], end_to_end["loading"], strict=True)]
    rows = [
        Row(
            *("the loop on a batch in memory : ceiling", ratio(times, best, "ours"), ">= 0.97"),
            f"{shown(times, best)} with {best}, {shown(times, 'ours')}",
        ),
        *ceiling.other_layouts(times, best),
        Row(
            *("recipe, the loader on a core of its own : ceiling of one thread",),
            *(ratio(end_to_end, "ceiling of a thread", "beside"), ">= 0.97", shown(end_to_end, "beside")),
        ),
        Row(
            *("recipe on shared cores : t_step / (t_step + t_load)", ratio(end_to_end, "bound", "shared"), ">= 1"),
            f"{shown(end_to_end, 'shared')}; t_step {shown(end_to_end, 'ceiling')}, "
            f"t_load {shown(end_to_end, 'loading')}",
        ),
    ]
    what = f"{given.model}, {given.image_size} px, batch {batch}, fp32, {torch.get_num_threads()} threads"
    return table(f"Full fine-tuning against its ceiling: {what}", rows)


if __name__ == "__main__":
    main()
