"""CPU seconds that the loader takes for an image, beside timm's pipeline on PIL and floats: with and without a cache.

    python -m tests.benchmarks.loader [--quick] [--pictures 256] [--folder PHOTOS]

The same JPEGs (500 x 375, made on the spot; or a folder of photos), the same kind of crop, one thread, one process:

- timm: `timm.data.create_transform` without jitter (decode by PIL, random crop resized with antialiasing, flip, float
  tensor, normalise) and a batch stacked from that;
- ours: `Pictures`, what a worker does for a micro-batch: a batch of uint8, channels-last (flips and normalisation come
  on the device, once a batch);
- cached: the same from a filled ``--cache``.

Bars: ours <= 1/2 of timm's, cached <= 1/4. Every picture's crop is compared with PIL's crop and antialiased resize of
the same part of the original: >= 55 dB at worst without a cache. What the second resize of the cache costs is beside.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import timm.data
import torch
from PIL import Image

from tests.benchmarks.paired import Row, paired, ratio, table
from tests.benchmarks.photos import write_photos
from tuning.data.cached import CachedRows
from tuning.data.images import decode
from tuning.data.picture_store import Files, PictureStore
from tuning.data.pictures import Pictures
from tuning.data.reduction import Reduction
from tuning.data.resizing import mode_of, resize
from tuning.data.sampling import Item
from tuning.data.tables import picture_dataset
from tuning.data.transforms import CROP_AREA, Crop, random_box

SIZE, BATCH, CROP_PCT = 224, 32, 0.875
KINDS = [
    ("light", "bicubic"),
    ("light", "bilinear"),
    ("strong", "bicubic"),
]  # strong: the crop alone, timm's own default
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def timms(paths: list[str], strength: str, interpolation: str) -> Callable[[int], float]:
    """CPU seconds an image of an epoch."""
    transform = timm.data.create_transform(
        SIZE, is_training=True, color_jitter=None, auto_augment=None, interpolation=interpolation,
        scale=CROP_AREA[strength],
    )  # fmt: skip

    def batches(_epoch: int) -> Iterator[torch.Tensor]:
        for first in range(0, len(paths), BATCH):
            yield torch.stack([transform(Image.open(path).convert("RGB")) for path in paths[first : first + BATCH]])

    return lambda epoch: timed(batches(epoch), len(paths))


def ours(pictures: Pictures) -> Callable[[int], float]:
    """The same of what a worker does."""

    def batches(epoch: int) -> Iterator[torch.Tensor]:
        for first in range(0, len(pictures), BATCH):
            rows = range(first, min(first + BATCH, len(pictures)))
            yield pictures.__getitems__([Item(epoch, row, 1.0) for row in rows]).images

    return lambda epoch: timed(batches(epoch), len(pictures))


def timed(batches: Iterator[torch.Tensor], images: int) -> float:
    """CPU seconds of this process an image."""
    began = time.process_time()
    assert sum(len(batch) for batch in batches) == images
    return (time.process_time() - began) / images


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB."""
    error = np.square(ours.astype(float) - theirs.astype(float)).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def likeness(paths: list[str], strength: str, interpolation: str, reduction: Reduction | None) -> list[float]:
    """PSNR of a random crop of every picture, against PIL's of the same part of the original."""
    found = []
    for number, path in enumerate(paths):
        original, mode = Image.open(path).convert("RGB"), mode_of(interpolation)
        picture = decode(path)
        kept = picture if reduction is None else reduction(picture)
        height, width = kept.shape[:2]
        box = random_box(height, width, CROP_AREA[strength], torch.Generator().manual_seed(number))
        across, down = original.width / width, original.height / height
        part = (box.left * across, box.top * down, (box.left + box.width) * across, (box.top + box.height) * down)
        theirs = original.resize((SIZE, SIZE), RESAMPLING[interpolation], box=part)
        if reduction is None:
            theirs = original.crop(tuple(map(int, part))).resize((SIZE, SIZE), RESAMPLING[interpolation])
        cut = kept[box.top : box.top + box.height, box.left : box.left + box.width]
        found.append(psnr(resize(cut, SIZE, SIZE, mode).numpy(), np.asarray(theirs)))
    return found


def compare(paths: list[str], strength: str, interpolation: str, folder: Path, rounds: int) -> tuple[list[Row], str]:
    """The rows of one kind of crop, and a line about its pixels."""
    rows, crop = picture_dataset(paths, [0] * len(paths), ("one",)), Crop(SIZE, interpolation, CROP_PCT)
    reduction = Reduction(interpolation, crop.shorter_side, ((SIZE, CROP_AREA[strength][0]),), SIZE)
    places = Files(*(str(folder / f"{strength}-{interpolation}.{name}") for name in Files._fields))
    store = PictureStore(places, len(rows))
    cached = CachedRows(rows, np.zeros(len(rows), np.int64), store, reduction, outlives=True)
    loaders = {
        "timm": timms(paths, strength, interpolation),
        "ours": ours(Pictures(rows, crop, strength, 0, replace_unreadable=True)),  # type: ignore[arg-type]
        "cached": ours(Pictures(cached, crop, strength, 0, replace_unreadable=True)),  # type: ignore[arg-type]
    }
    for loader in loaders.values():
        loader(0)  # fills the cache, and warms the others
    times = paired({name: lambda loader=loader: loader(1) for name, loader in loaders.items()}, rounds)  # type: ignore[misc]
    ms = {name: f"{name} {1e3 * float(np.median(seconds)):.2f} ms" for name, seconds in times.items()}
    low, high = CROP_AREA[strength]
    what = f"crops of {low:.0%} to {high:.0%}, {interpolation}"
    direct, kept = (likeness(paths, strength, interpolation, how) for how in (None, reduction))
    pixels = (
        f"- {what}: {min(direct):.1f} dB at worst, median {np.median(direct):.1f}; from the cache {min(kept):.1f}, "
        f"median {np.median(kept):.1f}, at {store.bytes_used / len(rows) / 1e3:.0f} kB a picture"
    )
    return [
        Row(f"{what}: ours / timm", ratio(times, "ours", "timm"), "<= 0.5", f"{ms['ours']}, {ms['timm']}"),
        Row(f"{what}: cached / timm", ratio(times, "cached", "timm"), "<= 0.25", f"{ms['cached']}, {ms['timm']}"),
    ], pixels


def main() -> None:
    """Print the table and the likeness of the pixels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few pictures and rounds")
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="photos of your own (*.jpg)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    count, rounds = (32, 3) if given.quick else (given.pictures, 7)
    with tempfile.TemporaryDirectory() as scratch:
        photos = given.folder or write_photos(Path(scratch) / "photos", count, 0)
        paths = sorted(map(str, photos.rglob("*.jpg")))[:count]
        found = [compare(paths, *kind, Path(scratch), rounds) for kind in KINDS]
        size = np.mean([Path(path).stat().st_size for path in paths]) / 1e3
    title = f"CPU seconds an image, {len(paths)} JPEGs of {size:.0f} kB on average, to {SIZE} pixels, one thread"
    print(table(title, [row for rows, _ in found for row in rows]))
    print("\nPSNR against PIL's crop and antialiased resize of the original:\n")
    print("\n".join(pixels for _, pixels in found))


if __name__ == "__main__":
    main()
