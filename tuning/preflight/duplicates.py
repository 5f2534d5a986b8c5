"""Pictures that are there twice: the same bytes, or almost the same picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

MOST_IN_BUCKET = 20_000  # hashes that share a band; of more, what they share says nothing, and time grows as its square
_ONES = np.unpackbits(np.arange(2**16, dtype=np.uint16).view(np.uint8).reshape(-1, 2), axis=1).sum(1, dtype=np.uint8)


class Seen(NamedTuple):
    """One readable picture of either part.

    Attributes:
        split: ``train`` or ``eval``.
        row: of that part.
        label: index of its class.
        digest: of its bytes.
        perceptual: perceptual hash, None when there is none or the picture is blank.
    """

    split: str
    row: int
    label: int
    digest: bytes
    perceptual: bytes | None


def same_files(seen: Sequence[Seen]) -> list[list[Seen]]:
    """Groups of two or more pictures with the same bytes, in the order of their first."""
    groups: dict[bytes, list[Seen]] = defaultdict(list)
    for picture in seen:
        groups[picture.digest].append(picture)
    return [group for group in groups.values() if len(group) > 1]


def near_pairs(seen: Sequence[Seen], most_bits: int) -> Iterator[tuple[Seen, Seen]]:
    """Pairs of different files whose perceptual hashes differ in at most *most_bits* bits.

    Quick for large data sets, and complete: hashes within d bits agree in at least one of d + 1 bands (multi-index
    hashing, Norouzi et al. 2012). Only bands that more than `MOST_IN_BUCKET` share are passed over. Of the same files
    the first alone is compared.
    """
    firsts = {picture.digest: picture for picture in reversed(seen) if picture.perceptual is not None}
    pictures = sorted(firsts.values(), key=lambda p: (p.split != "train", p.row))
    if len(pictures) < 2:
        return
    packed = np.stack([np.frombuffer(p.perceptual or b"", np.uint8) for p in pictures])
    for first, second in sorted(_close(packed, most_bits)):
        yield pictures[first], pictures[second]


def _close(packed: np.ndarray, most_bits: int) -> set[tuple[int, int]]:
    """Index pairs (i < j) of rows of ``(N, bytes)`` within *most_bits* bits."""
    bits, words = np.unpackbits(packed, axis=1), np.ascontiguousarray(packed).view(np.uint16)
    found: set[tuple[int, int]] = set()
    differing = np.flatnonzero((bits != bits[0]).any(axis=0))  # what all have in common tells none apart
    for band in np.array_split(differing, most_bits + 1):
        for bucket in _buckets(np.packbits(bits[:, band], axis=1)):
            for place, number in enumerate(bucket[:-1]):
                rest = bucket[place + 1 :]
                distance = _ONES[words[rest] ^ words[number]].sum(1)
                found.update((int(number), int(other)) for other in rest[distance <= most_bits])
    return found


def _buckets(keys: np.ndarray) -> Iterator[np.ndarray]:
    """Ascending rows that have the same key, where they are two or more but not nearly all."""
    if keys.shape[1] == 0:
        inverse, counts = np.zeros(len(keys), np.int64), np.array([len(keys)])
    else:
        _, inverse, counts = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    order = np.argsort(inverse.ravel(), kind="stable")
    for start, many in zip(np.cumsum(counts) - counts, counts, strict=True):
        if 1 < many <= MOST_IN_BUCKET:
            yield order[start : start + many]
