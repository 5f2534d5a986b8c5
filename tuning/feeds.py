"""The batches of one stage: pictures through workers, or features computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from accelerate import Accelerator
from torch import nn

from tuning.data.broken import Unreadable
from tuning.data.class_sampling import sampled_order
from tuning.data.erasing import Erasing
from tuning.data.loader import EvalFeed, FeatureFeed, Feed, TrainFeed
from tuning.data.local_order import train_order
from tuning.data.mixing import Mixing
from tuning.data.operations import stage_operations
from tuning.data.sampling import EvalOrder, TrainOrder
from tuning.data.sources import Data
from tuning.data.splits import stratified_subset
from tuning.data.streamed import StreamedRows
from tuning.data.tables import Table, label_array, take
from tuning.data.transforms import Crop, Normalise
from tuning.entering import Entered
from tuning.features import CachedEval, EveryImage, View, compute_features
from tuning.models.build import ModelInfo
from tuning.open_part import Part
from tuning.plan import StagePlan
from tuning.safety.unreadable import UnreadablePictures

EVAL_BATCH = 64  # pictures per forward pass per process
JUDGED = 2048  # images, an error of about 1 % in accuracy
CACHED_EVAL_BATCH = 4096  # rows of pooled features, a few kB each; larger ones go EVAL_BATCH at a time


@dataclass(frozen=True)
class StageFeeds:
    """What a stage trains and is judged on.

    Attributes:
        train: training batches of this process.
        evaluation: evaluation batches of this process, as many as on every other.
        judged: what `evaluation` is for: the raw model, or its open part when the features are cached.
        plain: the training images, each once and as evaluations see them, and what takes them: `judged`, or the model.
    """

    train: Feed
    evaluation: EvalFeed | CachedEval
    judged: nn.Module
    plain: tuple[EveryImage, nn.Module]


def stage_feeds(
    accelerator: Accelerator,
    entered: Entered,
    planned: StagePlan,
    data: Data,
    info: ModelInfo,
    unreadable: UnreadablePictures,
    seed: int,
    flip: Literal["none", "horizontal", "both"],
    workers: int,
) -> StageFeeds:
    """Build the batches of a stage; with ``cache_features`` this runs the model over all pictures, once a view.

    Args:
        unreadable: counts the pictures that can't be read.
    """
    stage, rank = planned.stage, accelerator.process_index
    evaluation = plain_feed(accelerator, data.eval, planned, info, workers, unreadable.evaluation)
    plain = plain_feed(accelerator, data.train, planned, info, workers, unreadable.train), entered.model
    blocks = data.train.blocks if isinstance(data.train, StreamedRows) else None
    every = order = train_order(len(data.train), seed, planned.batch, rank, blocks)
    if stage.sampling != "shuffle":
        order = sampled_order(label_array(data.train), stage.sampling, seed, planned.batch, rank)
    if stage.cache_features and stage.feature_views == 1:
        size = planned.image_size
        pictures = judging_feed(accelerator, data.train, size, info, workers, unreadable.train)
        feeds = _cached(accelerator, entered, [pictures], evaluation, order, unreadable)
        return feeds if size == planned.eval_size else replace(feeds, plain=plain)
    train = TrainFeed(
        data.train,
        every if stage.cache_features else order,
        Crop(planned.largest_size, info.interpolation, info.crop_pct, stage_operations(stage, info.mean)),
        Normalise(info.mean, info.std),
        augment=stage.augment,
        flip=flip,
        workers=workers,
        device=accelerator.device,
        unreadable=unreadable.train,
        mixing=Mixing(stage.mixup, stage.cutmix, seed, len(data.train)) if stage.mixes else None,
        erasing=Erasing(stage.erases, seed) if stage.erases else None,
        sizes=planned.sizes if stage.varies else (),
    )
    if stage.cache_features:
        views = [View(train, epoch) for epoch in range(stage.feature_views)]
        return replace(_cached(accelerator, entered, views, evaluation, order, unreadable), plain=plain)
    return StageFeeds(train, evaluation, entered.model, plain)


def _cached(
    accelerator: Accelerator,
    entered: Entered,
    views: Sequence[EveryImage],
    evaluation: EvalFeed,
    order: TrainOrder,
    unreadable: UnreadablePictures,
) -> StageFeeds:
    """Features of every view of the training images, the first of them the plain one, and of the evaluation images."""
    part = entered.trained
    assert isinstance(part, Part)
    made = [compute_features(accelerator, entered.model, feed, entered.forward, part) for feed in (*views, evaluation)]
    unreadable.check()
    entered.train_mode()
    first, *others, judged = made
    size = CACHED_EVAL_BATCH if first.features.dim() == 2 else EVAL_BATCH
    place = size, accelerator.process_index, accelerator.num_processes
    once, evaluated = (CachedEval(some, EvalOrder(len(some.labels), *place)) for some in (first, judged))
    train = FeatureFeed(first.features, first.labels, order, [more.features for more in others])
    return StageFeeds(train, evaluated, part, (once, part))


def some_evaluation(
    accelerator: Accelerator,
    feeds: StageFeeds,
    planned: StagePlan,
    data: Data,
    info: ModelInfo,
    seed: int,
    workers: int,
) -> EvalFeed | CachedEval:
    """The evaluation images, or `JUDGED` of them in the proportions of the classes: to compare trials by.

    What can't be read is noted nowhere.
    """
    if isinstance(feeds.evaluation, CachedEval):
        return feeds.evaluation
    rows = take(data.eval, stratified_subset(label_array(data.eval), JUDGED, seed))
    return plain_feed(accelerator, rows, planned, info, workers, Unreadable(data.folder))


def plain_feed(
    accelerator: Accelerator,
    rows: Table,
    planned: StagePlan,
    info: ModelInfo,
    workers: int,
    unreadable: Unreadable | None = None,
) -> EvalFeed:
    """This process's part of *rows*, every picture once, with the evaluation crop at the size of evaluations."""
    return judging_feed(accelerator, rows, planned.eval_size, info, workers, unreadable)


def judging_feed(
    accelerator: Accelerator,
    rows: Table,
    image_size: int,
    info: ModelInfo,
    workers: int,
    unreadable: Unreadable | None = None,
    batch_size: int = EVAL_BATCH,
) -> EvalFeed:
    """This process's part of *rows*, every picture once, with the evaluation crop at *image_size* pixels.

    Args:
        batch_size: pictures per forward pass per process.
    """
    rank, world_size, together = accelerator.process_index, accelerator.num_processes, isinstance(rows, StreamedRows)
    order = EvalOrder(len(rows), batch_size, rank, world_size, together)
    crop, normalise = Crop(image_size, info.interpolation, info.crop_pct), Normalise(info.mean, info.std)
    device = accelerator.device
    return EvalFeed(rows, order, crop, normalise, workers=workers, device=device, unreadable=unreadable)
