"""A stage that did not better the model is undone before the next one begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from safetensors.torch import load_file

from tuning import session
from tuning.averaging.averages import Averages
from tuning.entering import Entered, leave_stage
from tuning.progress import Progress


def rolled_back(
    accelerator: Accelerator,
    entered: Entered,
    averages: Averages,
    best: Path,
    progress: Progress,
    say: Callable[[str], None],
) -> Entered | None:
    """Leave the stage that ends; with the best weights so far, if none of its evaluations bettered them.

    All processes take part; rank 0 reads. The average begins anew, and so does the optimizer: its state belongs to the
    weights that are given up.

    Args:
        best: folder of the best weights, ``model/`` of the run.
        say: tells the user.

    Returns:
        *entered*; None where the stage was undone.
    """
    began = progress.step - progress.stage_step
    file, undone = best / "model.safetensors", progress.best_step is not None and progress.best_step <= began
    if not session.same_everywhere(undone and file.is_file()):
        return entered
    leave_stage(accelerator, entered)
    weights = load_file(file) if accelerator.is_main_process else {}
    with torch.no_grad():
        for name, tensor in entered.model.state_dict().items():
            if accelerator.is_main_process:
                tensor.copy_(weights[name])
            broadcast(tensor)
    averages.begin(entered.model)
    say(f"{entered.stage.name:>10}  undone: the weights of step {progress.best_step} were better, and are taken again.")
    return None
