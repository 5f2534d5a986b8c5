"""Flags of the group check."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckFlags:
    decode: bool = False
    """recipes/check.py decodes every picture: finds damage inside files, blank pictures and near-duplicates. Without
    it, only headers, ends and hashes of all files are read, and what looks wrong is decoded."""
    check_steps: int = 4
    """Optimizer steps of every stage that recipes/check.py tries; 0 = look at the pictures only."""
    min_side: int = 16
    """A picture whose shorter side has fewer pixels is reported as tiny."""
    max_aspect: float = 4.0
    """A picture whose longer side is more than this many times its shorter side is reported."""
    max_megapixels: float = 50.0
    """A picture of more million pixels is reported as huge."""
    near_bits: int = 4
    """With --decode: two pictures are near-duplicates when their perceptual hashes of 100 bits differ in at most this
    many bits."""
