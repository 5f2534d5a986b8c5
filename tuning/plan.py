"""The whole run in numbers before anything is spent: stages in steps, learning rates of every group, batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace

from torch import nn

from tuning.averaging.batch_norm import norms, refuse_foreign_norms
from tuning.depth import open_names
from tuning.errors import UserError
from tuning.groups import decay_for_ratio, param_groups
from tuning.image_sizes import batch_at, sizes_of, stride
from tuning.models.build import ModelInfo, check_image_size
from tuning.open_part import open_part
from tuning.optimizers import check_optimizer
from tuning.progress import Progress
from tuning.sizes import LARGEST_AUTO_MICRO_BATCH, BatchPlan, plan_batch
from tuning.stages import Stage


@dataclass(frozen=True)
class GroupPlan:
    """One parameter group in one stage.

    Attributes:
        name: such as ``layer07``; its curve is ``lr/layer07``.
        depth: 0 = stem, largest = head.
        parameters: number of elements.
        open_parameters: of these, how many the stage trains.
        peak_lr: learning rate at factor 1.
        weight_decay: 0 for norms and biases.
    """

    name: str
    depth: int
    parameters: int
    open_parameters: int
    peak_lr: float
    weight_decay: float


@dataclass(frozen=True)
class StagePlan:
    """One stage with everything that depends on the data, the model and the processes.

    Attributes:
        stage: the description.
        batch: how an optimizer step is shared out.
        image_size: side of the input in pixels.
        sizes: sides of the training input, of which every optimizer step draws one; `image_size` alone if it doesn't.
        eval_size: side at which the stage is evaluated, that of the last stage: evaluations of a run compare.
        steps_per_epoch: optimizer steps of one pass over the data; the last may be short.
        layer_decay: LR factor from one layer to the next lower one.
        groups: every parameter group, stem first.
        feature_bytes: of cached features of the training images, on every process; 0 = none are cached.
        forward: how what is closed is run (`tuning.frozen`); None = like everything else.
        keeps_statistics: open layers have running statistics, which `Stage.batch_norm` is about.
    """

    stage: Stage
    batch: BatchPlan
    image_size: int
    sizes: tuple[int, ...]
    eval_size: int
    steps_per_epoch: int
    layer_decay: float
    groups: tuple[GroupPlan, ...]
    keeps_statistics: bool = False
    feature_bytes: int = 0
    forward: str | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps of the stage."""
        return self.stage.steps(self.steps_per_epoch)

    @property
    def largest_size(self) -> int:
        """Side of the largest training input in pixels."""
        return max(self.sizes)

    @property
    def open_parameters(self) -> int:
        """Elements that the stage trains."""
        return sum(group.open_parameters for group in self.groups)

    @property
    def swa_steps(self) -> tuple[int, ...]:
        """Steps of the stage after which SWA takes in its weights: ends of SGDR cycles, without cycles of epochs.

        Those of the last `Stage.swa_epochs` epochs; none without SWA.
        """
        cycles = self.stage.cycle_ends(self.steps_per_epoch) if self.stage.swa_lr is None else []
        ends = cycles or range(self.steps_per_epoch, self.steps + 1, self.steps_per_epoch)
        return tuple(end for end in ends if end > self.steps - self.stage.swa_epochs * self.steps_per_epoch)

    def lrs(self, every: int = 1) -> Iterator[dict[str, float]]:
        """Learning rate of every open group at every step of the stage, or at every *every*-th from the first on."""
        factor = self.stage.factor(self.steps_per_epoch)
        peaks = {group.name: group.peak_lr for group in self.groups if group.open_parameters}
        for now in map(factor, range(0, self.steps, every)):
            yield {name: peak * now for name, peak in peaks.items()}


def make_plan(
    stages: Sequence[Stage],
    model: nn.Module,
    *,
    train_images: int,
    world_size: int,
    micro_batch: int | str,
    image_size: int,
    largest_auto: int = LARGEST_AUTO_MICRO_BATCH,
    lr_scaling: str = "none",
) -> tuple[StagePlan, ...]:
    """Work out every stage; the model is only read.

    Args:
        image_size: side of the input, for stages that don't name their own.
        largest_auto: images that a *micro_batch* of ``auto`` doesn't go beyond.
        lr_scaling: how the learning rate follows a batch that follows the size (``batch_scaling``).

    Raises:
        UserError: a batch that doesn't divide, an unknown optimizer, a depth or a decay the model can't have, or
            ``cache_features`` for a model with two heads.
    """
    final = stages[-1].image_size or image_size
    plan = []
    for stage in stages:
        size = stage.image_size or image_size
        following = batch_at(stage, size, final, lr_scaling, train_images)
        plan.append(_plan_stage(following, model, train_images, world_size, micro_batch, (size, final), largest_auto))
    return tuple(plan)


def check_sizes(plan: Sequence[StagePlan], model: nn.Module, info: ModelInfo) -> None:
    """Refuse sizes that the model can't take.

    Raises:
        UserError: names the flag or key, what is allowed, and why.
    """
    checked = set[int]()
    for planned in plan:
        for size in (planned.image_size, *planned.sizes, planned.eval_size):
            flag = "--image-size" if size in (planned.image_size, planned.eval_size) else planned.stage.drawn_by
            if size not in checked:
                _check_size(model, info, size, flag)
            checked.add(size)


def _check_size(model: nn.Module, info: ModelInfo, size: int, flag: str) -> None:
    built = info.model_args.get("img_size", info.input_size)
    try:
        check_image_size(model, info.name, size, flag=flag)
    except UserError as error:
        if size == built or size % stride(model):
            raise
        raise UserError(
            f"{flag} {size}: {type(model).__name__} works at the {built} pixels only that it is built for, because "
            "timm has no dynamic_img_size for it. Give the whole run one --image-size, without --train-sizes and "
            "--multi-scale, or choose another --model (ViT, Swin, EVA, and networks of convolutions take several)."
        ) from error


def last_step(plan: Sequence[StagePlan], progress: Progress, max_steps: int | None) -> int:
    """The optimizer step with which the run ends, seen from where it stands: stages before may have ended early."""
    left = sum(planned.steps for planned in plan[progress.stage :]) - progress.stage_step
    return min(progress.step + left, max_steps or 2**63)


def at_micro_batch(planned: StagePlan, micro_batch: int | None) -> StagePlan:
    """The stage as it goes on after memory ran out: forward passes of *micro_batch* images at most; None = as planned.

    Optimizer steps, their images and learning rates stay.
    """
    return planned if micro_batch is None else replace(planned, batch=planned.batch.at_most(micro_batch))


def _plan_stage(
    stage: Stage,
    model: nn.Module,
    train_images: int,
    world_size: int,
    micro_batch: int | str,
    at: tuple[int, int],
    largest_auto: int,
) -> StagePlan:
    """*at*: sides of its input in pixels, in training and in evaluation."""
    check_optimizer(stage.optimizer)
    cached = _feature_bytes(stage, model, train_images, at[0])
    batch = plan_batch(stage.batch_size, micro_batch, world_size, train_images, largest_auto)
    if stage.mixes and batch.micro_batch == 1:
        raise UserError(
            f"stage {stage.name!r}: --mixup {stage.mixup:g} and --cutmix {stage.cutmix:g} mix the pictures of a "
            "micro-batch, but it has only 1. Raise --micro-batch or --batch-size, or turn them off."
        )
    decay = stage.layer_decay if stage.layer_decay is not None else decay_for_ratio(model, stage.lr_ratio or 1.0)
    groups = _plan_groups(stage, model, decay)
    _refuse_equal_rates(stage, groups)
    per_epoch, opened = batch.steps_per_epoch(train_images), open_names(model, stage.open)
    shown = at[0], sizes_of(stage, at[0], model), at[1]
    planned = StagePlan(stage, batch, *shown, per_epoch, decay, groups, _keeps_statistics(model, opened), cached)
    if planned.keeps_statistics and stage.batch_norm == "sync":
        refuse_foreign_norms(model, f"stage {stage.name!r}: --batch-norm sync")
    if stage.swa_epochs and len(planned.swa_steps) < 2:
        raise UserError(
            f"stage {stage.name!r}: --swa-epochs {stage.swa_epochs} averages at {len(planned.swa_steps)} ends of "
            f"{'sgdr cycles' if stage.cycle_ends(per_epoch) else 'epochs'}; an average needs 2. Raise it, or choose "
            "shorter cycles by --cycle-epochs."
        )
    return planned


def _feature_bytes(stage: Stage, model: nn.Module, train_images: int, image_size: int) -> int:
    """Of all views of the training images, as float32."""
    if not stage.cache_features:
        return 0
    return 4 * _features(stage, model, image_size) * train_images * stage.feature_views


def _features(stage: Stage, model: nn.Module, image_size: int) -> int:
    """Numbers of an image that enter what the stage trains."""
    if stage.open != "head":
        return open_part(model, open_names(model, stage.open), image_size).numbers
    head = model.get_classifier()  # type: ignore[operator]
    if not isinstance(head, nn.Module):
        raise UserError(
            f"stage {stage.name!r}: the head of {type(model).__name__} is more than one classifier, so its input can't "
            "be cached. Leave --cache-features out."
        )
    return int(next(head.parameters()).shape[1])


def _keeps_statistics(model: nn.Module, opened: Set[str]) -> bool:
    """Whether a layer with running statistics is among the open ones; one without parameters counts as open."""
    return any(
        not names or not opened.isdisjoint(names)
        for names in (
            frozenset(f"{layer}.{name}" for name, _ in module.named_parameters(recurse=False))
            for layer, module in norms(model).items()
        )
    )


def _plan_groups(stage: Stage, model: nn.Module, decay: float) -> tuple[GroupPlan, ...]:
    names = open_names(model, stage.open)
    opened = {id(p) for name, p in model.named_parameters() if name in names}
    groups = param_groups(model, stage.lr, decay, stage.weight_decay)
    return tuple(
        GroupPlan(
            group["name"],
            group["depth"],
            sum(p.numel() for p in group["params"]),
            sum(p.numel() for p in group["params"] if id(p) in opened),
            group["peak_lr"],
            group["weight_decay"],
        )
        for group in groups
    )


def _refuse_equal_rates(stage: Stage, groups: Sequence[GroupPlan]) -> None:
    """Layer-wise decay that was asked for must show in the learning rates."""
    depths = {group.depth for group in groups if group.open_parameters}
    rates = {group.peak_lr for group in groups if group.open_parameters}
    asked = stage.layer_decay if stage.layer_decay is not None else stage.lr_ratio
    shows = len(rates) == len(depths) and (len(depths) > 1 or stage.open != "all") and min(rates) > 0
    if asked not in (None, 1.0) and not shows:
        raise UserError(
            f"stage {stage.name!r}: the {len(depths)} open depths of the model have {len(rates)} different learning "
            f"rates from {min(rates):g}, although a decay of {asked} was asked for. Use --lr-ratio 1 for equal rates, "
            "or a decay nearer to 1."
        )
