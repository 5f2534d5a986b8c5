"""Duplicates: all of them, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from tuning.preflight.duplicates import Seen, near_pairs, same_files


def seen(row: int, digest: bytes, perceptual: bytes | None = None, split: str = "train") -> Seen:
    return Seen(split, row, 0, digest, perceptual)


def test_same_files_are_grouped() -> None:
    pictures = [seen(0, b"a"), seen(1, b"b"), seen(2, b"a"), seen(0, b"a", split="eval"), seen(3, b"c")]
    assert [[(p.split, p.row) for p in group] for group in same_files(pictures)] == [
        [("train", 0), ("train", 2), ("eval", 0)]
    ]


@pytest.mark.parametrize("most_bits", [0, 1, 4, 16])
def test_near_pairs_are_those_of_brute_force(most_bits: int) -> None:
    generator = np.random.default_rng(most_bits)
    bits = generator.integers(0, 2, (60, 128), dtype=np.uint8)
    bits[:, 100:] = 0
    for number in range(30, 60):  # neighbours of the first 30, from equal to 29 bits away
        bits[number] = bits[number - 30]
        bits[number, generator.choice(100, number - 30, replace=False)] ^= 1
    pictures = [seen(row, str(row).encode(), np.packbits(line).tobytes()) for row, line in enumerate(bits)]
    distances = (bits[:, None] != bits[None]).sum(2)
    expected = {(i, j) for i in range(60) for j in range(i + 1, 60) if distances[i, j] <= most_bits}
    assert expected
    assert [(a.row, b.row) for a, b in near_pairs(pictures, most_bits)] == sorted(expected)


def test_the_same_file_is_no_near_duplicate_and_counts_once() -> None:
    same, near = bytes(16), bytes([1, *bytes(15)])
    pictures = [seen(0, b"a", same), seen(1, b"a", same), seen(2, b"b", near), seen(3, b"c", None)]
    assert [(a.row, b.row) for a, b in near_pairs(pictures, 4)] == [(0, 2)]
    assert list(near_pairs(pictures[:2], 4)) == []


def test_many_are_quick_to_compare() -> None:
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 256, (30_000, 16), dtype=np.uint8)
    hashes[-1] = hashes[0] ^ np.array([3, *[0] * 15], np.uint8)
    pictures = [seen(row, row.to_bytes(4, "big"), line.tobytes()) for row, line in enumerate(hashes)]
    assert [(a.row, b.row) for a, b in near_pairs(pictures, 4)] == [(0, 29_999)]


def test_pictures_that_all_have_one_hash() -> None:
    pictures = [seen(row, str(row).encode(), bytes(16)) for row in range(4)]
    assert len(list(near_pairs(pictures, 4))) == 6
