"""How near `recipes/predict.py` comes to the forward pass alone on a batch that lies on the device.

    python tests/benchmarks/predict_ceiling.py --images 1024 --model tf_efficientnet_lite0 --rounds 3

Both are measured in turns in this one process; the ratio is what counts. The pictures are JPEGs of 500 x 375 pixels.
"""

from __future__ import annotations

import argparse
import io
import platform
import re
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

import predict  # noqa: E402

from tuning import session  # noqa: E402
from tuning.cli.command_line import parse_command  # noqa: E402
from tuning.judging.predicting import judging_batch  # noqa: E402
from tuning.models.build import build, save_timm_folder  # noqa: E402


def write_pictures(folder: Path, images: int) -> None:
    generator = np.random.default_rng(0)
    for number in range(images):
        pixels = generator.integers(0, 256, (47, 63, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number:05d}.jpg")


def of_recipe(folder: Path, precision: str, number: int) -> float:
    """Images per second that the recipe itself reports, from the first batch it asks for to the closed file."""
    argv = ["--run", str(folder / "model"), "--images", str(folder / "in"), "--precision", precision]
    command = parse_command([*argv, "--output", str(folder / f"{number}.parquet")], "recipes/predict.py", "", ROOT)
    said = io.StringIO()
    with redirect_stdout(said):
        predict.predict(command)
    found = re.search(r"([\d,]+) images/s", said.getvalue())
    assert found is not None, said.getvalue()
    return float(found[1].replace(",", ""))


def of_forward(folder: Path, images: int, precision: str) -> float:
    """Images per second of the forward pass alone."""
    accelerator = session.start(precision, "auto")  # type: ignore[arg-type]
    model, info = build(f"local-dir:{folder / 'model'}", classes=10)
    model.eval().to(accelerator.device)
    size = judging_batch("auto", accelerator.device)
    batch = torch.randn(size, 3, info.input_size, info.input_size, device=accelerator.device)
    batch = batch.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), accelerator.autocast():
        model(batch).cpu()
        started = time.perf_counter()
        for _ in range(max(1, images // size)):
            logits = model(batch)
        logits.cpu()
    return max(1, images // size) * size / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="fp32")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        write_pictures(folder / "in", asked.images)
        classes = [str(number) for number in range(10)]
        model, info = build(asked.model, classes=classes, weights="none")
        save_timm_folder(model, info, classes, folder / "model")
        ratios = []
        for number in range(asked.rounds):
            alone, recipe = (
                of_forward(folder, asked.images, asked.precision),
                of_recipe(folder, asked.precision, number),
            )
            ratios.append(recipe / alone)
            print(f"round {number}: forward alone {alone:.0f} images/s, recipe {recipe:.0f}, ratio {ratios[-1]:.3f}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    about = f"{device}, {session.cpu_cores()} cores, torch {torch.__version__}"
    print(f"{asked.model}, {info.input_size} pixels, {asked.precision}, {about}")
    print(f"median ratio {statistics.median(ratios):.3f}, {min(ratios):.3f} .. {max(ratios):.3f}")


if __name__ == "__main__":
    main()
