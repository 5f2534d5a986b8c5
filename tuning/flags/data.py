"""Flags of the group data."""

from dataclasses import dataclass
from typing import Optional


@dataclass(frozen=True)
class DataFlags:
    data: str = "demo"
    """A folder with train/ and val/ class folders; a folder of class folders; a Hugging Face dataset id; a folder of
    parquet, arrow or webdataset shards; or the word demo (photos of solar cells from the package elpv-dataset),
    which brings flags of its own: recipes/presets/demo.yaml."""
    image_column: Optional[str] = None
    """Column of the images in a dataset with columns (found by itself when there is one)."""
    label_column: Optional[str] = None
    """Column of the labels in a dataset with columns (found by itself when there is one)."""
    train_split: Optional[str] = None
    """Name of the training split or sub-folder."""
    eval_split: Optional[str] = None
    """Name of the evaluation split or sub-folder."""
    val_fraction: float = 0.25
    """Fraction of the images held out when the data has no evaluation split (seeded by --seed, stratified by class)."""
    limit_train: Optional[int] = None
    """Use at most this many training images."""
    limit_eval: Optional[int] = None
    """Use at most this many evaluation images."""
    streaming: bool = False
    """Read parquet shards where they lie, a row group at a time: for data beyond one disk. --data may then also be a
    pattern or a URL that fsspec opens (docs/streaming.md)."""
    shuffle_gb: float = 2.0
    """10^9 bytes of encoded pictures that --streaming shuffles at a time, over all processes together."""
