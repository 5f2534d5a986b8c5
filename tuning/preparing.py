"""What every recipe begins with: the data, the model that fits it, and the plan of the stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from tuning import sharding
from tuning.cli.command_line import Command
from tuning.cli.derived import derived
from tuning.clipping import Clip, clipping
from tuning.data.grey import are_grey
from tuning.data.sources import Data, open_data
from tuning.data.tables import label_array
from tuning.depth import open_names
from tuning.errors import UserError
from tuning.flags import ColorName, Flags
from tuning.frozen_choice import check_forward
from tuning.image_sizes import run_sizes
from tuning.losses import Loss, balanced_weights, chosen
from tuning.lr_search.auto import before_search
from tuning.models.build import ModelInfo, build
from tuning.models.head_fit import can_be_fitted, linear_classifier
from tuning.models.names import folder_of
from tuning.plan import StagePlan, check_sizes, make_plan
from tuning.precision import cast_weights, level_of
from tuning.recomputing import check_recomputing, recompute_blocks
from tuning.sizes import largest_auto_micro_batch
from tuning.stages import Stage


class Setup(NamedTuple):
    """What a run does, and with what."""

    command: Command
    data: Data
    model: nn.Module
    info: ModelInfo
    stages: tuple[StagePlan, ...]


def prepare(accelerator: Accelerator, command: Command, fits_head: bool = True) -> Setup:
    """Data, model and plan of what was asked for, with what follows from the first two. All processes take part.

    Args:
        fits_head: a new head may begin fitted though no flag says so.

    Raises:
        UserError: from `data_and_model` and `plan_stages`.
    """
    data, model, info = data_and_model(accelerator, command.flags, command.stages)
    new_head = command.flags.model.weights == "pretrained" and folder_of(info.name) is None
    fits = fits_head and new_head and not sharding.asked() and can_be_fitted(model)
    command, reasons = derived(command, len(data.train), accelerator.num_processes, fits)
    data = replace(data, notes=(*data.notes, *reasons))
    return Setup(command, data, model, info, plan_stages(accelerator, command, data, model, info))


def data_and_model(
    accelerator: Accelerator, flags: Flags, stages: Sequence[Stage]
) -> tuple[Data, nn.Module, ModelInfo]:
    """Open the data and build the raw model for its classes, on the accelerator's device. All processes take part.

    Args:
        stages: what the model must be able to go through, of whatever image sizes.

    Raises:
        UserError: from `open_data` and `build`.
    """
    with accelerator.local_main_process_first():  # the others find its cache
        data = open_data(**vars(flags.data), seed=flags.run.seed)
    sizes = run_sizes(stages)
    model, info = build(
        flags.model.model,
        classes=data.classes,
        weights=flags.model.weights,
        head_init="default" if flags.model.head_init == "fitted" else flags.model.head_init,
        init=flags.model.init,
        drop_rate=flags.model.drop_rate,
        drop_path_rate=flags.model.drop_path_rate,
        image_size=flags.model.image_size,
        crop_pct=flags.model.crop_pct,
        final_size=sizes.final,
        several_sizes=sizes.several,
        seed=flags.run.seed,
    )
    if sharding.recomputes():
        check_recomputing(model, stages, level_of(accelerator), "fsdp_activation_checkpointing")
    if flags.batch.grad_checkpointing:
        check_recomputing(model, stages, level_of(accelerator), "--grad-checkpointing")
        recompute_blocks(model, "--grad-checkpointing", "leave it out, and use a smaller --micro-batch instead")
    model = cast_weights(model, level_of(accelerator))
    # What will be split is never whole on a device.
    return data, model if sharding.asked() else model.to(accelerator.device), info


def plan_stages(
    accelerator: Accelerator, command: Command, data: Data, model: nn.Module, info: ModelInfo
) -> tuple[StagePlan, ...]:
    """One plan a stage: steps, batches, peak learning rates.

    Raises:
        UserError: a depth, batch, image size or head that this model or data doesn't have.
    """
    flags = command.flags
    sharding.check_flags(command.stages, flags.model.head_init, flags.optimisation.clip_agc, flags.staging.rollback)
    plan = make_plan(
        [before_search(stage, model) for stage in _settled_colors(accelerator, command.stages, data)],
        model,
        train_images=len(data.train),
        world_size=accelerator.num_processes,
        micro_batch=flags.batch.micro_batch,
        image_size=info.input_size,
        largest_auto=largest_auto_micro_batch(accelerator.device.type),
        lr_scaling=flags.optimisation.lr_scaling,
    )
    check_sizes(plan, model, info)
    check_forward(accelerator, flags)
    if flags.regularisation.ema_decay is not None:
        _refuse_lagging(plan, model)
    if flags.model.head_init == "fitted":
        linear_classifier(model)
    return plan


def _refuse_lagging(plan: Sequence[StagePlan], model: nn.Module) -> None:
    """Features are what the trained weights make of an image; an average whose closed layers lag behind has others."""
    moved = frozenset[str]()
    for stage in (planned.stage for planned in plan):
        opened = open_names(model, stage.open)
        if stage.cache_features and moved - opened:
            raise UserError(
                f"stage {stage.name!r}: cache_features with --ema-decay, after a stage that trains what is closed now: "
                "the average lags behind the layers that the features come from. Leave one of the two out."
            )
        moved |= opened


def _settled_colors(accelerator: Accelerator, stages: Sequence[Stage], data: Data) -> list[Stage]:
    """The stages with ``color: auto`` as the training pictures are; rank 0 looks at some, if any stage asks."""
    asks = any(stage.color == "auto" and stage.augment in ("medium", "strong") for stage in stages)
    look = asks and accelerator.is_main_process
    grey = broadcast_object_list([are_grey(data.train) if look else False])[0] if asks else False
    settled: ColorName = "keep" if grey else "change"
    return [replace(stage, color=settled) if stage.color == "auto" else stage for stage in stages]


class Objective(NamedTuple):
    """What an optimizer step does about its images.

    Attributes:
        loss: of every image.
        clip: of the gradients of the mean loss.
        class_weights: ``(K,)`` in `loss`, on the accelerator's device; None = all classes count as they come.
    """

    loss: Loss
    clip: Clip
    class_weights: Tensor | None


def objective(accelerator: Accelerator, flags: Flags, data: Data) -> Objective:
    """The loss and the clipping that the flags ask for."""
    regularisation = flags.regularisation
    balanced = regularisation.class_weights == "balanced"
    weights = balanced_weights(label_array(data.train), len(data.classes)).to(accelerator.device) if balanced else None
    loss = chosen(regularisation.loss, regularisation.label_smoothing, weights, regularisation.focal_gamma)
    optimisation = flags.optimisation
    return Objective(loss, clipping(optimisation.clip_norm, optimisation.clip_value, optimisation.clip_agc), weights)
