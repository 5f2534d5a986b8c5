"""A picture of what the model sees: the beginning of a training batch, after all augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from tuning.data.loader import Feed, Micro, TrainFeed
from tuning.progress import Progress
from tuning.tracking.figures import save

FILE = "augmented_batch.png"
SHOWN, COLUMNS = 16, 4  # pictures
NAME_LENGTH = 22  # characters of a class


def draw_batch(feed: Feed, progress: Progress, classes: Sequence[str], plots: Path) -> None:
    """Draw the first pictures of the next step as the model sees them, but for the normalisation, which is undone.

    They are made anew in this process: the feed goes on as if nothing had been. Once a run, at its first stage on
    pictures; nothing is drawn for cached features.
    """
    if not isinstance(feed, TrainFeed) or (plots / FILE).exists():
        return
    micro = feed.sample(progress.epoch, progress.stage_step % feed.order.steps_per_epoch, SHOWN, progress.step)
    pictures = feed.shown(micro.inputs).permute(0, 2, 3, 1).cpu().numpy()
    captions = _captions(micro, classes)
    lines, side = -(-len(pictures) // COLUMNS), pictures.shape[1]
    step = side + max(1, side // 5)  # with room for a caption above each
    sheet = np.ones((lines * step, COLUMNS * step, 3), dtype=np.float32)
    figure, axes = plt.subplots(figsize=(2.0 * COLUMNS, 2.0 * lines))
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        top, left = (number // COLUMNS + 1) * step - side, number % COLUMNS * step
        sheet[top : top + side, left : left + side] = picture
        axes.text(left, top - 0.02 * side, caption, fontsize=7, va="bottom", parse_math=False)
    axes.imshow(sheet, interpolation="nearest")
    axes.axis("off")
    save(figure, plots / FILE, tight=True)


def _captions(micro: Micro, classes: Sequence[str]) -> list[str]:
    names = [name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1]}…" for name in classes]
    labels = micro.labels.tolist()
    if micro.others is None or micro.shares is None:
        return [names[label] for label in labels]
    mixed = zip(labels, micro.others.tolist(), micro.shares.tolist(), strict=True)
    return [f"{share:.2f} {names[own]}\n{1 - share:.2f} {names[other]}" for own, other, share in mixed]
