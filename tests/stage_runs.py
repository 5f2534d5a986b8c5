"""Train stages on tiny pictures with the library's own parts, and look inside after each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from tuning import session
from tuning.caching import with_cache
from tuning.cli.command_line import parse_command
from tuning.data.sources import open_data
from tuning.depth import open_names
from tuning.engine import train_steps
from tuning.entering import enter_stage
from tuning.feeds import stage_feeds
from tuning.image_sizes import run_sizes
from tuning.judging.evaluation import evaluate
from tuning.models.build import build
from tuning.plan import make_plan
from tuning.precision import cast_weights, level_of
from tuning.preparing import objective
from tuning.progress import Progress
from tuning.recomputing import recompute_blocks
from tuning.safety.unreadable import UnreadablePictures
from tuning.sharding import shard, whole

PRESETS = Path(__file__).parents[1] / "recipes" / "presets"


@dataclass
class StageRun:
    """What one process saw.

    Attributes:
        lrs: of every optimizer step, ``{group: learning rate}``.
        losses: of every step, over all processes.
        states: the model's state before the first stage and after each.
        opened: names of the parameters that each stage opened.
        metrics: of the evaluation after each stage.
        grouped: after each stage, how many groups of the optimizer hold each open parameter.
    """

    lrs: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    states: list[dict[str, Tensor]] = field(default_factory=list)
    opened: list[frozenset[str]] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    grouped: list[dict[str, int]] = field(default_factory=list)


def run_stages(*argv: str, threads: int = 1) -> StageRun:
    """Train every stage of the command line on this process and the others of its group."""
    command = parse_command([*argv, "--workers", "0", "--tracker", "none"], "test", "", PRESETS)
    flags = command.flags
    accelerator = session.start(flags.run.precision, threads, shards=True)
    data = open_data(**vars(flags.data), seed=flags.run.seed)
    sizes = run_sizes(command.stages)
    model, info = build(
        flags.model.model,
        classes=data.classes,
        weights=flags.model.weights,
        drop_rate=flags.model.drop_rate,
        drop_path_rate=flags.model.drop_path_rate,
        image_size=flags.model.image_size,
        final_size=sizes.final,
        several_sizes=sizes.several,
        seed=flags.run.seed,
    )
    if flags.batch.grad_checkpointing:
        recompute_blocks(model, "--grad-checkpointing", "")
    cast_weights(model, level_of(accelerator))
    plan = make_plan(
        command.stages,
        model,
        train_images=len(data.train),
        world_size=accelerator.num_processes,
        micro_batch=flags.batch.micro_batch,
        image_size=info.input_size,
        lr_scaling=flags.optimisation.lr_scaling,
    )
    data = with_cache(accelerator, flags, data, plan, info)
    shard(accelerator, model)
    loss, clip, _ = objective(accelerator, flags, data)
    run, progress, entered = StageRun(states=[state_of(model)]), Progress(), None
    for number, planned in enumerate(plan):
        entered = enter_stage(accelerator, model, planned, before=entered)
        unreadable = UnreadablePictures(accelerator, None, data, 1.0, resumed=False)
        feeds = stage_feeds(
            accelerator, entered, planned, data, info, unreadable, flags.run.seed, flags.regularisation.flip, 0
        )
        for step in train_steps(accelerator, entered, feeds.train, loss, clip, progress, flags.run.seed):
            run.lrs.append(step.lrs)
            run.losses.append(float(step.loss))
        run.opened.append(open_names(model, planned.stage.open))
        statistics = entered.statistics.values()
        run.metrics.append(
            evaluate(accelerator, feeds.judged, feeds.evaluation, len(data.eval), len(data.classes), statistics)
        )
        run.states.append(state_of(model))
        run.grouped.append(_times_grouped(model, entered.optimizer))
        progress.stage, progress.stage_step = number + 1, 0
    return run


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: whole(tensor.detach()).clone() for name, tensor in model.state_dict().items()}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Over all tensors of two states."""
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def _times_grouped(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    return {name: held.count(id(p)) for name, p in model.named_parameters() if p.requires_grad}
