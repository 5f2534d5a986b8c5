"""The overfit check: one small batch, everything off that makes it harder to learn, and eyes on what happens to it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from tuning.data.loader import EvalFeed, Micro
from tuning.data.sources import Data, image_name
from tuning.data.splits import stratified_subset
from tuning.data.tables import in_memory, label_array, take
from tuning.engine import Step
from tuning.entering import Entered
from tuning.flags import Flags
from tuning.models.build import ModelInfo, check_image_size
from tuning.overfit.suspects import Picture, Suspect
from tuning.plan import StagePlan, make_plan
from tuning.safety.replay import Replay
from tuning.sizes import LARGEST_AUTO_MICRO_BATCH
from tuning.stage_lists import stage_number
from tuning.stages import Stage

SMALL_BATCH = 16  # pictures
OFF = (
    "augmentation, flips, mixup, cutmix, dropout, drop path, --loss (plain cross-entropy), label smoothing, class "
    "weights, sampling, weight decay, averaged weights, fitted head, warm-up and schedule"
)
# Where timm keeps rates outside of torch's dropout modules: paths and blocks, patches, models that call F.dropout.
RATES = ("drop_prob", "prob", "drop_rate", "attn_drop_p", "drop")


def small_data(data: Data, flags: Flags, replay: Replay | None) -> Data:
    """*data* with the pictures to learn as its training part: those of *replay*, all of --limit-train, or a few."""
    if replay:
        chosen = torch.tensor(replay.rows).numpy()
    elif flags.data.limit_train is not None:
        return replace(data, train=in_memory(data.train, data.classes))
    else:
        chosen = stratified_subset(label_array(data.train), SMALL_BATCH, flags.run.seed)
    return replace(data, train=in_memory(take(data.train, chosen), data.classes))


def choose_stage(stages: Sequence[Stage], wanted: str | None, replay: Replay | None) -> Stage:
    """The stage of --overfit-stage; by default the one of the replayed step, or the last.

    Raises:
        UserError: no such stage.
    """
    if wanted is None:
        return stages[replay.stage] if replay and 0 <= replay.stage < len(stages) else stages[-1]
    return stages[stage_number(stages, wanted, "--overfit-stage")]


def small_plan(
    stage: Stage, model: nn.Module, info: ModelInfo, images: int, micro_batch: int | str, world_size: int, steps: int
) -> StagePlan:
    """*stage* on *images* pictures for at least *steps* steps: constant rate, nothing random, no weight decay.

    A batch is as large as the stage's, or holds all pictures where they are fewer. Where that can't be shared out
    evenly, the last forward pass has filler of weight 0.

    Raises:
        UserError: from `make_plan` and `check_image_size`.
    """
    share = math.ceil(min(stage.batch_size, images) / world_size)
    limit = LARGEST_AUTO_MICRO_BATCH if micro_batch == "auto" else int(micro_batch)
    passes = math.ceil(share / limit)
    micro = math.ceil(share / passes) if micro_batch == "auto" else min(limit, share)
    batch = passes * micro * world_size
    calm = replace(
        stage,
        epochs=math.ceil(steps / math.ceil(images / batch)),
        batch_size=batch,
        schedule="constant",
        warmup_epochs=0.0,
        new_optimizer=False,
        patience=None,
        weight_decay=0.0,
        augment="none",
        mixup=0.0,
        cutmix=0.0,
        sampling="shuffle",
        random_erasing=0.0,
        train_sizes=(),
        multi_scale=0.0,
        batch_scaling="none",
        cache_features=False,
    )
    (planned,) = make_plan(
        [calm],
        model,
        train_images=max(images, batch),
        world_size=world_size,
        micro_batch=micro,
        image_size=info.input_size,
    )
    check_image_size(model, info.name, planned.image_size)
    return planned


def silence(model: nn.Module) -> None:
    """Take every random draw out of the forward pass, in place: dropout of units, paths, blocks and patches."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name in RATES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def layer_names(entered: Entered) -> dict[str, str]:
    """Layer of every parameter, such as ``layer07``."""
    groups = {id(p): group["name"] for group in entered.optimizer.param_groups for p in group["params"]}
    return {name: groups[id(p)] for name, p in entered.model.named_parameters()}


@dataclass(frozen=True)
class Look:
    """What the batch is before any training, the same on every process.

    Attributes:
        pictures: those that can be read.
        outputs: classes that the model tells apart.
        trainable: the outputs depend on open parameters.
    """

    pictures: tuple[Picture, ...]
    outputs: int
    trainable: bool


def look(accelerator: Accelerator, entered: Entered, feed: EvalFeed, train: Dataset) -> Look:
    """Send the batch through the untrained model, in evaluation mode. All processes take part."""
    entered.model.eval()
    mine: list[Picture] = []
    outputs, trainable = 0, True
    for micro in feed:
        with accelerator.autocast():
            logits = entered.model(micro.inputs)
        outputs, trainable = logits.shape[-1], trainable and logits.requires_grad
        finite = logits.detach().isfinite().flatten(1).all(dim=1).tolist()
        mine += _pictures(micro, finite, train)
    entered.train_mode()
    seen = {picture.row: picture for picture in gather_object(mine)}
    return Look(tuple(seen[row] for row in sorted(seen)), outputs, trainable)


def _pictures(micro: Micro, finite: Sequence[bool], train: Dataset) -> list[Picture]:
    inputs, labels = micro.inputs.float().cpu(), micro.labels.tolist()
    found = []
    for place, row in enumerate(micro.rows.tolist()):
        if micro.weights[place] > 0:
            pixels = inputs[place].contiguous()
            digest = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
            mean, square = (tuple(x.mean(dim=(1, 2)).tolist()) for x in (pixels.double(), pixels.double().square()))
            name = image_name(train[row], row)
            found.append(Picture(row, name, labels[place], digest, mean, square, finite[place]))
    return found


@dataclass
class Learning:
    """How far the batch is learned, from the steps of the engine; the same on every process.

    Attributes:
        target: mean loss of one pass that counts as learned.
        most_steps: optimizer steps after which it is given up.
        most_skipped: steps in a row without a finite loss and gradient after which it is given up.
        steps: optimizer steps so far.
        first: loss of the first step, before any update.
        losses: mean loss of every complete pass.
        skipped: steps with a loss or gradient that was not finite.
    """

    target: float
    most_steps: int
    most_skipped: int
    steps: int = 0
    first: float = math.nan
    losses: list[float] = field(default_factory=list)
    skipped: int = 0
    _skipped_in_a_row: int = 0
    _sum: float = 0.0
    _images: int = 0

    def add(self, step: Step) -> None:
        """Take in one optimizer step."""
        loss, norm = torch.stack((step.loss, step.grad_norm.float())).tolist()
        self.first = loss if self.steps == 0 else self.first
        self.steps += 1
        finite = math.isfinite(loss) and math.isfinite(norm)
        self.skipped += not finite
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        self._sum, self._images = self._sum + loss * step.images, self._images + step.images
        if step.ends_epoch:
            self.losses.append(self._sum / self._images)
            self._sum, self._images = 0.0, 0

    @property
    def learned(self) -> bool:
        """The last pass reached the target."""
        return bool(self.losses) and self.losses[-1] < self.target

    @property
    def over(self) -> bool:
        """Learned, or given up."""
        return self.learned or self.steps >= self.most_steps or self.stuck

    @property
    def stuck(self) -> bool:
        """Nothing has been finite for too long."""
        return self._skipped_in_a_row >= self.most_skipped


def verdict(learning: Learning, found: Sequence[Suspect], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``summary.json``; PASS when the batch was learned and nothing decisive was found."""
    passed = learning.learned and not any(suspect.decisive for suspect in found)
    return {
        "status": "done",
        "verdict": "PASS" if passed else "FAIL",
        "steps": learning.steps,
        "target": learning.target,
        "first_loss": _finite(learning.first),
        "last_loss": _finite(learning.losses[-1]) if learning.losses else None,
        "skipped_steps": learning.skipped,
        "suspects": [{"kind": suspect.kind, "text": suspect.text} for suspect in found],
        **facts,
    }


def verdict_lines(result: Mapping[str, Any]) -> list[str]:
    """*result* of `verdict` for a person to read."""
    steps, first, last = result["steps"], result["first_loss"], result["last_loss"]
    losses = " -> ".join("not finite" if loss is None else f"{loss:.3g}" for loss in (first, last))
    trained = f"loss {losses}, target {result['target']:g}" if steps else "not trained"
    lines = [
        f"{result['verdict']}: {result['train_images']} pictures, {steps} steps, {result['seconds']} s, {trained}."
    ]
    lines += [f"  {suspect['kind']}: {suspect['text']}" for suspect in result["suspects"]]
    if result["verdict"] == "FAIL" and not result["suspects"]:
        lines.append(
            "  None of the usual suspects. Try another --lr, more --overfit-steps, another stage (--overfit-stage) or "
            "model, and look at the pictures and labels."
        )
    return lines


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
