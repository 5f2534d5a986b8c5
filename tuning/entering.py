"""Entering a stage: the only place that opens and closes layers, and the only place that wraps a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from tuning.averaging.batch_norm import synchronise
from tuning.depth import closed_eval, freeze_batch_norm, open_names, set_open
from tuning.frozen import called, lay_back, lay_out
from tuning.groups import param_groups, set_peak_lrs
from tuning.open_part import HeadOnly, open_part
from tuning.optimizers import create_optimizer, start_momentum
from tuning.plan import StagePlan
from tuning.precision import level_of, lowered
from tuning.safety.agreement import running_statistics
from tuning.sharding import is_sharded
from tuning.stages import Stage


@dataclass
class Entered:
    """What a stage trains with.

    Attributes:
        stage: its description.
        model: the raw model; name and save parameters on this one.
        trained: `model`, or its open part alone when the stage trains on cached features.
        wrapped: what to call in training: autocast or bf16 copies of the weights (`tuning.precision`) and, with
            several processes, DDP around `trained`.
        optimizer: over all groups of `model`, closed ones included, so that its state keeps its shape.
        factor: optimizer step within the stage -> factor of every group's peak LR.
        layer_decay: LR factor from one layer to the next lower one.
        statistics: running statistics of norms that this stage moves, ``{name: buffer}``.
        synchronised: processes exchange statistics of BatchNorm in every forward pass.
        forward: how what is closed is run (`tuning.frozen`).
        laid_out: closed weights that are in another layout during the stage.
    """

    stage: Stage
    model: nn.Module
    trained: nn.Module
    wrapped: nn.Module
    optimizer: AcceleratedOptimizer
    factor: Callable[[int], float]
    layer_decay: float
    statistics: dict[str, Tensor] = field(default_factory=dict)
    synchronised: bool = False
    forward: str | None = None
    laid_out: list[nn.Parameter] = field(default_factory=list)

    def train_mode(self) -> None:
        """Training mode for open layers, evaluation mode for closed ones (their BatchNorm and dropout rest)."""
        self.wrapped.train()
        self.model.train()
        closed_eval(self.model)
        if self.stage.batch_norm == "frozen":
            freeze_batch_norm(self.model)

    @property
    def lrs(self) -> dict[str, float]:
        """``{group name: learning rate}`` of the open groups now."""
        groups = self.optimizer.param_groups
        return {groups[number]["name"]: groups[number]["lr"] for number in self.open_groups}

    @cached_property
    def open_groups(self) -> list[int]:
        """Numbers of the groups with open parameters. Not the groups: a loaded state brings new ones."""
        groups = enumerate(self.optimizer.param_groups)
        return [number for number, group in groups if any(p.requires_grad for p in group["params"])]

    @cached_property
    def open_parameters(self) -> list[nn.Parameter]:
        """What the stage trains."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def drop_gradients(self) -> None:
        """`optimizer.zero_grad` for open parameters: no others get a gradient, and walking past them takes time."""
        for parameter in self.open_parameters:
            parameter.grad = None


def enter_stage(
    accelerator: Accelerator, model: nn.Module, planned: StagePlan, before: Entered | None = None
) -> Entered:
    """Open and close layers, set every group's peak LR, and wrap the model anew. All processes take part.

    DDP hooks only the parameters that are open when it wraps, so every stage gets its own wrapper; a sharded model
    (`tuning.sharding`) sees by itself what is open, and only autocast is put around it. The optimizer lives on, with
    its state, while stages name the same one; another one starts fresh.

    Args:
        model: the raw model, already on the accelerator's device.
        before: the stage that ends now.

    Raises:
        UserError: a depth the model doesn't have.
    """
    stage = planned.stage
    if before is not None:
        leave_stage(accelerator, before)
    set_open(model, open_names(model, stage.open))
    optimizer = _optimizer(accelerator, model, planned, before)
    trained = _trained(model, planned)
    synchronise(model, False)  # on a CPU DDP refuses to wrap such layers, without need
    lower = lowered(trained, level_of(accelerator))
    if not stage.cache_features:
        lower = called(lower, planned.forward)
    wrapped = accelerator.prepare_model(lower, evaluation_mode=is_sharded(model))
    factor = stage.factor(planned.steps_per_epoch)
    entered = Entered(stage, model, trained, wrapped, optimizer, factor, planned.layer_decay, forward=planned.forward)
    entered.laid_out = lay_out(model, planned.forward)
    entered.train_mode()
    entered.statistics = running_statistics(model)
    entered.synchronised = stage.batch_norm == "sync" and accelerator.num_processes > 1 and bool(entered.statistics)
    synchronise(model, entered.synchronised)
    start_momentum(optimizer.optimizer)
    return entered


def _trained(model: nn.Module, planned: StagePlan) -> nn.Module:
    """What the stage runs in an optimizer step."""
    if not planned.stage.cache_features:
        return model
    if planned.stage.open == "head":
        return HeadOnly(model)
    return open_part(model, open_names(model, planned.stage.open), planned.image_size)


def leave_stage(accelerator: Accelerator, entered: Entered) -> None:
    """Take the wrapper off the model, and put closed weights back into their own layout."""
    _forget_wrapper(accelerator, entered.wrapped)
    lay_back(entered.laid_out)


def _optimizer(
    accelerator: Accelerator, model: nn.Module, planned: StagePlan, before: Entered | None
) -> AcceleratedOptimizer:
    """That of the stage before at the new peak LRs, if the stage keeps it; else a fresh one over all groups."""
    stage, decay = planned.stage, planned.layer_decay
    if before is not None and stage.keeps_optimizer_of(before.stage):
        set_peak_lrs(before.optimizer.param_groups, stage.lr, decay)
        return before.optimizer
    groups = param_groups(model, lr=stage.lr, layer_decay=decay, weight_decay=stage.weight_decay)
    accelerator._optimizers.clear()
    return accelerator.prepare_optimizer(create_optimizer(stage.optimizer, groups, stage.momentum))


def _forget_wrapper(accelerator: Accelerator, wrapped: nn.Module) -> None:
    """Undo `prepare_model`: give back the raw forward and drop the wrapper from the accelerator's list.

    Without this the next `prepare_model` nests autocast and registers the model twice. `free_memory` would also drop
    the optimizer.
    """
    raw = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False, keep_torch_compile=False)
    accelerator._models.clear()
    raw.__dict__.pop("_is_accelerate_prepared", None)
