"""Flags of the group evaluate."""

from dataclasses import dataclass
from typing import Literal

from tuning.flags.names import Texts


@dataclass(frozen=True)
class EvaluateFlags:
    calibrate: bool = False
    """recipes/evaluate.py fits a temperature (Guo et al. 2017) on the evaluation pictures of the run and stores it with
    the model."""
    tta: Literal["none", "flip", "flips", "dihedral"] = "none"
    """Views of a picture over which recipes/evaluate.py averages probabilities: flip = and its mirror image; flips =
    both axes, four views; dihedral = and turned by 90 degrees, eight views."""
    ensemble: Texts = ()
    """More runs, checkpoints or timm folders: recipes/evaluate.py judges each, the mean of their probabilities together
    with --run, and their averaged weights where the architectures agree."""
    bootstrap: int = 1000
    """Resamples behind the 95 % intervals of recipes/evaluate.py; 0 = no intervals."""
