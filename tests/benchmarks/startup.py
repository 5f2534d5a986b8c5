"""Before anything is trained: answers without torch, the first step, and a folder of a million files.

    python -m tests.benchmarks.startup              # a million files in a temporary folder: minutes, a million inodes
    python -m tests.benchmarks.startup --quick      # 100,000 files

CPU seconds of `--help`, of a misspelt flag and of `--print-config` (best of five; bar: 0.3). Seconds from the end of
the imports of recipes/finetune.py to its first forward pass in training and to its first optimizer step, on the demo
and on a folder of photos, with `--head-init default`, so that no head is fitted in between (median of three; bar: 3 for
the step). Seconds and memory of opening a folder of class folders: listed, and with the listings of the run before
(bars: 10 and 2 seconds, 1 GB). The files were written just before: the system holds their folders in memory.
"""

from __future__ import annotations

import argparse
import os
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/finetune.py"
CLASSES = 1_000
PHOTO = 500, 375


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100,000 files instead of a million")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        what, *arguments = asked.child
        {"first-step": first_step, "index": index}[what](arguments)
        return
    print_hardware()
    print("| what | found | bar |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="start-up-") as folder:
        for row in (*answers(), *steps(Path(folder)), *listing(Path(folder), 100 if asked.quick else 1_000)):
            print(f"| {' | '.join(row)} |", flush=True)


def print_hardware() -> None:
    """In a process of its own: the answers are measured without torch in memory."""
    script = (
        "import torch; from tuning.tracking.hardware import hardware;"
        "print(f\"{hardware(torch.device('cpu'))}, torch {torch.__version__}\\n\")"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def answers() -> Iterator[Sequence[str]]:
    """CPU seconds of commands that train nothing."""
    for name, argv in (
        ("Python itself", ("-c", "pass")),
        ("importing the parsers", ("-c", "import tyro, yaml")),
        ("`--help`", (RECIPE, "--help")),
        ("a misspelt flag", (RECIPE, "--modle", "x")),
        ("`--print-config`", (RECIPE, "--print-config")),
    ):
        spent = min(cpu_seconds(argv) for _ in range(5))
        yield name, f"{spent:.3f} s of CPU", "<= 0.3" if argv[0] == RECIPE else ""


def cpu_seconds(argv: Sequence[str]) -> float:
    """User and system time of a Python process, which may keep what it compiles."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def steps(folder: Path) -> Iterator[Sequence[str]]:
    """Seconds to the first forward pass and optimizer step."""
    photos = folder / "photos"
    write_photos(photos)
    for name, argv in (("the demo", []), ("a folder of 256 photos", ["--data", str(photos)])):
        found = []
        for number in range(3):
            output = folder / f"{name.split()[-1]}-{number}"
            found.append(child("first-step", "--head-init", "default", "--output", str(output), *argv))
        forward, step = (statistics.median(float(line[place]) for line in found) for place in (0, 1))
        yield f"{name}: first forward pass of training, after the imports", f"{forward:.2f} s", ""
        yield f"{name}: first optimizer step, after the imports", f"{step:.2f} s", "<= 3"


def listing(folder: Path, files: int) -> Iterator[Sequence[str]]:
    """Seconds and memory of opening a folder of class folders."""
    million = folder / "million"
    write_names(million, files)
    time.sleep(3)  # folders of the last two seconds are not kept
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    runs = [child("index", str(million), env=environment) for _ in range(4)]
    assert len({line[0] for line in runs}) == 1, "other rows with the cache"
    for name, line, bar in (("", runs[0], "<= 10 s, 1 GB"), (", again", min(runs[1:], key=lambda r: r[1]), "<= 2 s")):
        _, wall, cpu, before, peak, held = line
        found = f"{wall} s ({cpu} of CPU), memory {before} MB before, {peak} MB at most, {held} MB of rows"
        yield f"opening {files * CLASSES:,} files in {CLASSES:,} folders{name}", found, bar


def child(what: str, *arguments: str, env: dict[str, str] | None = None) -> list[str]:
    """The words that this module prints last in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.startup", "--child", what, *arguments]
    environment = (env or dict(os.environ)) | {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return done.stdout.splitlines()[-1].split()


def first_step(argv: Sequence[str]) -> None:
    """Run the recipe up to its first optimizer step; seconds to the first forward pass of training, and to the step."""
    from tuning.cli.command_line import parse_command
    from tuning.tracking.weights_and_biases import import_tracker

    import_tracker(parse_command(argv, RECIPE, "", ROOT / "recipes" / "presets").flags.run)
    from torch.nn.modules.module import register_module_forward_pre_hook

    from tuning import engine, session
    from tuning.tracking import track

    marks: dict[str, float] = {}
    start, train_steps, open_tracker = session.start, engine.train_steps, track.open_tracker

    def started(*args, **kwargs):  # type: ignore[no-untyped-def]  # the recipe's first call after its imports
        marks["start"] = time.perf_counter()
        return start(*args, **kwargs)

    def opened(*args, **kwargs):  # type: ignore[no-untyped-def]  # what runs forward before it are checks of sizes
        found = open_tracker(*args, **kwargs)
        register_module_forward_pre_hook(lambda *_: marks.setdefault("forward", time.perf_counter()) and None)
        return found

    def stepped(*args, **kwargs):  # type: ignore[no-untyped-def]
        next(train_steps(*args, **kwargs))
        now = time.perf_counter()
        print(f"\n{marks['forward'] - marks['start']:.3f} {now - marks['start']:.3f}", flush=True)
        os._exit(0)

    session.start, engine.train_steps, track.open_tracker = started, stepped, opened
    sys.argv = [RECIPE, *argv]
    runpy.run_path(str(ROOT / RECIPE), run_name="__main__")


def index(argv: Sequence[str]) -> None:
    """Open a folder; a digest of its rows, wall and CPU seconds, megabytes before, at most, and of the rows."""
    import hashlib

    import pyarrow.compute as pc

    from tuning.data.sources import open_data
    from tuning.data.tables import label_array

    nothing = dict.fromkeys(("image_column", "label_column", "train_split", "eval_split", "limit_train", "limit_eval"))
    before, wall, cpu = peak_megabytes(), time.perf_counter(), time.process_time()
    data = open_data(argv[0], **nothing, val_fraction=0.25, seed=0)
    wall, cpu, peak = time.perf_counter() - wall, time.process_time() - cpu, peak_megabytes()
    digest, held = hashlib.blake2b(digest_size=8), 0
    for part in (data.train, data.eval):
        digest.update(label_array(part).tobytes())
        for chunk in pc.struct_field(part.data.column("image"), "path").iterchunks():
            digest.update("\n".join(chunk.to_pylist()).encode())
        held += part.data.nbytes
    print(f"{digest.hexdigest()} {wall:.2f} {cpu:.2f} {before:.0f} {peak:.0f} {held / 1e6:.0f}")


def peak_megabytes() -> float:
    """The most memory that this process has held so far (Linux counts in 1,024 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_photos(folder: Path, images: int = 128) -> None:
    """Two classes of JPEGs."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(images):
            coarse = draw.integers(0, 256, (PHOTO[1] // 25, PHOTO[0] // 25, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize(PHOTO).save(folder / name / f"{number}.jpg", quality=85)


def write_names(folder: Path, files: int) -> None:
    """Class folders of empty files: nobody looks into one."""
    for label in range(CLASSES):
        name = f"n{label:08d}"
        (folder / name).mkdir(parents=True)
        for number in range(files):
            (folder / name / f"{name}_{number:04d}.JPEG").touch()


if __name__ == "__main__":
    main()
