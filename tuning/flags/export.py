"""Flags of the group export."""

from dataclasses import dataclass
from typing import Literal, Optional


@dataclass(frozen=True)
class ExportFlags:
    format: Literal["timm", "onnx", "exported-program"] = "onnx"
    """What recipes/export.py writes: onnx; exported-program = torch.export's, a .pt2 file; timm = a folder for
    timm.create_model("local-dir:...")."""
    export_input: Optional[Literal["uint8", "float"]] = None
    """What goes into the export: uint8 = RGB from 0 to 255, normalised inside the network; float = float32, already
    normalised. Default: uint8; for a timm folder float, which can't be otherwise."""
    tolerance: float = 1e-3
    """Largest difference between a logit of the export and of the original on real pictures, beyond which
    recipes/export.py refuses the export. 1e-3 moves no probability by more than 0.0005."""
    check_images: int = 256
    """Evaluation pictures, at most, on which recipes/export.py compares the two."""
    latency_repeats: int = 20
    """Forward passes of every batch size that recipes/export.py times, in turns with the original; 0 = none."""
    license: Optional[str] = None
    """Licence of the exported model in the header of its model card, for example apache-2.0. Default: unknown."""
    metrics: Optional[str] = None
    """metrics.json of recipes/evaluate.py for the model card. Default: evaluation/metrics.json of the run if there is
    one, else the run's own best evaluation."""
    push: Optional[str] = None
    """Upload the export to this repository OWNER/NAME of the Hugging Face hub, private if it is new."""
    push_wandb: bool = False
    """Upload the export as a W&B artifact of the training run."""
