"""What the plan says of the numbers of images of the classes, and of what sampling makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tuning.data.class_sampling import times_drawn
from tuning.stages import Stage

CLASSES_SHOWN = 8


def class_sentence(names: Sequence[str], counts: np.ndarray) -> str:
    """Number and share of the training images of every class, or of the largest and the smallest where they are many.

    Args:
        counts: images of every class, ``(K,)``.
    """
    shares = 100 * counts / counts.sum()

    def told(place: int) -> str:
        return f"{names[place]} {counts[place]:,} ({shares[place]:.2g} %)"

    present = np.flatnonzero(counts)
    largest, smallest = int(counts.argmax()), int(present[counts[present].argmin()])
    ratio = counts[largest] / counts[smallest]
    if len(names) <= CLASSES_SHOWN:
        shown = ", ".join(f"{name} {count:,}" for name, count in zip(names, counts, strict=True))
        shown += f" ({', '.join(f'{share:.2g}' for share in shares)} %)"
    else:
        shown = f"largest {told(largest)}, median {np.median(counts[present]):,.0f}, smallest {told(smallest)}"
    absent = len(names) - len(present)
    missing = f"; {absent:,} without an image" if absent else ""
    return f"{len(names):,}: {shown}; imbalance {ratio:,.4g} : 1{missing}"


def sampling_sentences(names: Sequence[str], counts: np.ndarray, stages: Sequence[Stage]) -> list[str]:
    """One sentence for each way in which stages sample, but for shuffle: how often images come."""
    sentences = []
    for sampling in dict.fromkeys(stage.sampling for stage in stages if stage.sampling != "shuffle"):
        times = times_drawn(counts, sampling)
        present = np.flatnonzero(counts)
        rare, common = (int(present[place]) for place in (times[present].argmax(), times[present].argmin()))
        where = ", ".join(stage.name for stage in stages if stage.sampling == sampling)
        sentences.append(
            f"{sampling} in {where}: an epoch takes each image of {names[rare]} {times[rare]:.3g} times, of "
            f"{names[common]} {times[common]:.3g} times"
        )
    return sentences
