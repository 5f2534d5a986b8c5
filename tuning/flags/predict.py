"""Flags of the group predict."""

from dataclasses import dataclass

from tuning.flags.names import Texts


@dataclass(frozen=True)
class PredictFlags:
    images: Texts = ()
    """Pictures for recipes/predict.py: files, folders (searched to the bottom) and quoted globs."""
    top_k: int = 1
    """Classes a picture in the output of recipes/predict.py, most probable first."""
