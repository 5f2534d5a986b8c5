"""Flags that one or a few recipes use, for `tuning.flags.Flags`: name, type, unit and default. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class OverfitFlags:
    overfit_target: float = 0.1
    """Training loss that counts as learned by recipes/overfit.py: cross-entropy in nats, mean over one pass."""
    overfit_steps: int = 200
    """Optimizer steps after which recipes/overfit.py gives up; --max-steps may lower it."""
    overfit_stage: str | None = None
    """Stage whose open layers and learning rates recipes/overfit.py takes: its name, or its number from 1. Default:
    the last, and with --replay the one that the file names."""
    replay: str | None = None
    """File faults/step-*.json of an earlier run: recipes/overfit.py takes exactly the images listed there."""


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


@dataclass(frozen=True)
class ExportFlags:
    format: Literal["timm", "onnx", "exported-program"] = "onnx"
    """What recipes/export.py writes: onnx; exported-program = torch.export's, a .pt2 file; timm = a folder for
    timm.create_model("local-dir:...")."""
    export_input: Literal["uint8", "float"] | None = None
    """What goes into the export: uint8 = RGB from 0 to 255, normalised inside the network; float = float32, already
    normalised. Default: uint8; for a timm folder float, which can't be otherwise."""
    tolerance: float = 1e-3
    """Largest difference between a logit of the export and of the original on real pictures, beyond which
    recipes/export.py refuses the export. 1e-3 moves no probability by more than 0.0005."""
    check_images: int = 256
    """Evaluation pictures, at most, on which recipes/export.py compares the two."""
    latency_repeats: int = 20
    """Forward passes of every batch size that recipes/export.py times, in turns with the original; 0 = none."""
    license: str | None = None
    """Licence of the exported model in the header of its model card, for example apache-2.0. Default: unknown."""
    metrics: str | None = None
    """metrics.json of recipes/evaluate.py for the model card. Default: evaluation/metrics.json of the run if there is
    one, else the run's own best evaluation."""
    push: str | None = None
    """Upload the export to this repository OWNER/NAME of the Hugging Face hub, private if it is new."""
    push_wandb: bool = False
    """Upload the export as a W&B artifact of the training run."""


@dataclass(frozen=True)
class OpenedFlags:
    run: str | None = None
    """What was trained, for recipes/evaluate.py, predict.py and export.py: the folder of a run, one of its checkpoints,
    or a folder in timm's format. Default: --model with its --weights; export.py has none."""


@dataclass(frozen=True)
class EvaluateFlags:
    calibrate: bool = False
    """recipes/evaluate.py fits a temperature (Guo et al. 2017) on the evaluation pictures of the run and stores it with
    the model."""
    tta: Literal["none", "flip", "flips", "dihedral"] = "none"
    """Views of a picture over which recipes/evaluate.py averages probabilities: flip = and its mirror image; flips =
    both axes, four views; dihedral = and turned by 90 degrees, eight views."""
    ensemble: tuple[str, ...] = ()
    """More runs, checkpoints or timm folders: recipes/evaluate.py judges each, the mean of their probabilities together
    with --run, and their averaged weights where the architectures agree."""
    bootstrap: int = 1000
    """Resamples behind the 95 % intervals of recipes/evaluate.py; 0 = no intervals."""


@dataclass(frozen=True)
class PredictFlags:
    images: tuple[str, ...] = ()
    """Pictures for recipes/predict.py: files, folders (searched to the bottom) and quoted globs."""
    top_k: int = 1
    """Classes a picture in the output of recipes/predict.py, most probable first."""


@dataclass(frozen=True)
class FinderFlags:
    finder_start: float | None = None
    """Lowest learning rate of the head that the LR finder tries. Default: 1e-6; SGD 1e-5, Lion 1e-7."""
    finder_end: float | None = None
    """Highest learning rate of the head that the LR finder tries; it ends a sweep earlier when the loss is 4 times its
    best. Default: 1; SGD 10, Lion 0.1."""
    finder_steps: int = 100
    """Optimizer steps of one sweep of the LR finder, from 10."""
    finder_sweeps: int = 3
    """Sweeps of the LR finder, each over other images; their agreement is its confidence."""
    finder_race: int = 50
    """Optimizer steps that every learning rate around the sweeps' answer then trains, from the same start on the same
    images; the one that ends lowest is the answer. 0 = the sweeps alone decide; else from 10."""
    finder_at: Literal["start", "stages", "sizes"] = "start"
    """When --lr auto searches: at the start of the first stage that takes --lr; of each; or of each with another image
    size than the one before."""
    finder_share: float = 0.1
    """Share of the run's optimizer steps that one search of --lr auto may cost, in (0, 1]; 190 steps it may always."""
    stage: str | None = None
    """Stage that recipes/find_lr.py sweeps: its name, or its number from 1. Default: the first of those in which most
    is open."""
