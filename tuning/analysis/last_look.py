"""The last evaluation of a run: what the weights in model/ say about every evaluation image, and what that shows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from safetensors.torch import load_file
from torch import Tensor, nn

from tuning.analysis.overview import Overview, look_at
from tuning.data import fingerprint
from tuning.data.broken import Unreadable
from tuning.data.sources import Data
from tuning.feeds import judging_feed
from tuning.flags import EvaluateFlags
from tuning.judging.judgement import finite, judge
from tuning.judging.kept_predictions import write
from tuning.judging.predicting import Predictions, in_order, stream
from tuning.models.build import ModelInfo
from tuning.models.names import LOCAL, look_up
from tuning.safety.interrupts import StopRequested
from tuning.sharding import load_whole, own, split_like
from tuning.tracking.run_folder import RunFolder

BATCHES = 4  # of every process between two exchanges, at which a wish to stop is heard
Watch = Callable[[Iterable[Predictions], str], Iterator[Predictions]]


@dataclass(frozen=True)
class LastLook:
    """What came of it.

    Attributes:
        overview: the error analysis, on rank 0 where there was no problem.
        judged: metrics with intervals as in ``metrics.json`` of recipes/evaluate.py, where there is an `overview`.
        problem: a sentence about what went wrong; empty when nothing did.
        stopped: the run was asked to end before the analysis was complete.
    """

    overview: Overview | None = None
    judged: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    stopped: bool = False


def look_back(
    accelerator: Accelerator,
    model: nn.Module,
    info: ModelInfo,
    folder: RunFolder,
    data: Data,
    workers: int,
    watch: Watch,
) -> LastLook:
    """Evaluate the weights in ``model/`` once more, keep ``predictions.parquet``, analyse it. All processes take part.

    Nothing that goes wrong here is raised: the run is over and its model is written. A wish to stop ends it early.

    Args:
        model: the raw model of the run on the accelerator's device; it holds the weights of ``model/`` afterwards.
        watch: `Boundary.watch`.
    """
    try:
        size = load_weights(accelerator, model, folder.model)
        feed = judging_feed(accelerator, data.eval, size, info, workers, Unreadable(data.folder))
        pieces = watch(stream(accelerator, model.eval(), feed, BATCHES), "the analysis of its mistakes")
        kept = [piece for piece in pieces if accelerator.is_main_process]
        return _analysed(kept, folder, data) if accelerator.is_main_process else LastLook()
    except StopRequested as wish:
        return LastLook(problem=f"{wish}: report.html is left out.", stopped=True)
    except Exception as error:
        problem = f"The analysis of the model's mistakes failed: {type(error).__name__}: {error}."
        if not accelerator.is_main_process:
            print(f"warning (process {accelerator.process_index}): {problem}", file=sys.stderr, flush=True)
        return LastLook(problem=problem)


def load_weights(
    accelerator: Accelerator,
    model: nn.Module,
    folder: Path,
    read: Callable[[], dict[str, Tensor]] | None = None,
) -> int:
    """Give *model* the weights that rank 0 finds in a timm folder such as ``model/``. All processes take part.

    Args:
        read: called on rank 0 for other weights than the folder's.

    Returns:
        the side of its input in pixels.

    Raises:
        RuntimeError: on every process, if rank 0 can't load them.
    """
    size, problem, best = None, "", dict[str, Tensor]()
    if accelerator.is_main_process:
        try:
            size = look_up(f"{LOCAL}{folder}")[1]["input_size"][-1]
            best = read() if read else load_file(folder / "model.safetensors")
            load_whole(model, best)
        except Exception as error:  # whatever it is: the others must hear of it
            problem = f"{folder} can't be loaded: {error}"
    size, problem = broadcast_object_list([size, problem])
    if problem:
        raise RuntimeError(problem)
    if accelerator.num_processes > 1:
        for name, tensor in model.state_dict().items():
            given = torch.empty(tensor.shape, dtype=tensor.dtype, device=accelerator.device)
            given = best[name].to(given) if accelerator.is_main_process else given
            own(tensor).copy_(own(split_like(broadcast(given), tensor)))
    return int(size)


def _analysed(pieces: list[Predictions], folder: RunFolder, data: Data) -> LastLook:
    """Write the predictions, judge them and look at the mistakes; on rank 0."""
    logits, answers, index = in_order(pieces)
    rows, labels = index.numpy(), answers.numpy()
    if not len(rows):
        raise ValueError(f"none of the {len(data.eval)} evaluation pictures could be read")
    probabilities = logits.softmax(dim=1).numpy()
    ids = fingerprint.names(data.eval, data.folder).take(rows)
    write(folder.predictions, ids, rows, labels, probabilities, data.classes)
    judged = finite(judge(logits, answers, temperature=1.0, resamples=EvaluateFlags.bootstrap))
    return LastLook(look_at(probabilities, labels, rows, ids.to_pylist(), data), judged)
