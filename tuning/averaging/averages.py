"""Averaged weights beside the trained ones: EMA after every optimizer step, SWA at the ends of epochs or cycles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from tuning.plan import StagePlan
from tuning.progress import Progress
from tuning.sharding import asked


class Averages:
    """The averages that a run keeps. Every process keeps all of them, from the same weights.

    EMA (Polyak and Juditsky 1992; with a warm-up, by timm): ``average += (1 - d) * (weights - average)`` after every
    optimizer step, buffers too. SWA (Izmailov et al. 2018, arXiv:1803.05407): the plain mean of the weights after the
    `swa_steps` of the last stage; running statistics must be taken anew before it is of use.

    Nothing but tensors has to be saved: how many weights are in a mean follows from `Progress`.

    Args:
        model: the raw model, before it is split.
        decay: of the EMA; None = no EMA.
    """

    def __init__(self, model: nn.Module, plan: Sequence[StagePlan], decay: float | None) -> None:
        split = self._split = asked()
        self._last, self._moments = len(plan) - 1, plan[-1].swa_steps
        self._ema = None
        if decay:  # in float32, whatever the weights are
            self._ema = ModelEmaV3(model, decay, use_warmup=True, foreach=not split, dtype=torch.float32)
        self._moving: tuple[int, Moving] | None = None  # of a stage
        self._swa = AveragedModel(model, avg_fn=_mean if split else None).eval() if self._moments else None

    @property
    def all(self) -> dict[str, nn.Module]:
        """Every average by its name, those without content yet included."""
        kept = {"ema": self._ema, "swa": self._swa}
        return {name: average.module for name, average in kept.items() if average is not None}

    def at(self, progress: Progress) -> dict[str, nn.Module]:
        """The averages that have begun."""
        return {name: model for name, model in self.all.items() if name == "ema" or self._taken(progress)}

    def begin(self, model: nn.Module) -> None:
        """Start from weights that came by another way than a step."""
        self._moving = None
        if self._ema is not None:
            self._ema.set(model)  # type: ignore[no-untyped-call]

    def update(self, model: nn.Module, progress: Progress) -> None:
        """Take in what the optimizer step just completed has made of *model*."""
        if self._ema is not None and self._split:
            self._ema.update(model, progress.step)
        elif self._ema is not None:
            if self._moving is None or self._moving[0] != progress.stage:
                self._moving = progress.stage, Moving.of(self._ema.module, model)
            self._moving[1].follow(1.0 - self._ema.get_decay(progress.step))
        if self._swa is not None and progress.stage == self._last and progress.stage_step in self._moments:
            self._swa.n_averaged.fill_(self._taken(progress) - 1)
            self._swa.update_parameters(model)

    def _taken(self, progress: Progress) -> int:
        """Weights in the mean so far."""
        if progress.stage < self._last:
            return 0
        return sum(moment <= progress.stage_step for moment in self._moments)


@dataclass(frozen=True)
class Moving:
    """The tensors of an average that a stage can change, each beside its source in the model.

    Put together once a stage: `ModelEmaV3` asks both models for all their tensors at every step, which takes longer
    than the arithmetic, and a head alone would pay for its whole backbone.
    """

    averaged: list[Tensor]
    sources: list[Tensor]
    counters: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, average: nn.Module, model: nn.Module) -> Moving:
        """What *model*, in training mode, moves, and what has not arrived in *average* yet."""
        floats: list[tuple[Tensor, Tensor]] = []
        counters: list[tuple[Tensor, Tensor]] = []
        moves, sources = _trained(model), model.state_dict()
        for name, averaged in average.state_dict().items():
            source = sources[name]
            if name in moves or averaged.dtype != source.dtype or not torch.equal(averaged, source):
                (floats if averaged.is_floating_point() else counters).append((averaged, source))
        return cls([averaged for averaged, _ in floats], [source for _, source in floats], counters)

    @torch.no_grad()
    def follow(self, share: float) -> None:
        """``average += share * (weights - average)``; counters are copied."""
        for averaged, source in self.counters:
            averaged.copy_(source)
        if all(mine.dtype == theirs.dtype for mine, theirs in zip(self.averaged, self.sources, strict=True)):
            torch._foreach_lerp_(self.averaged, self.sources, weight=share)
        else:
            torch._foreach_mul_(self.averaged, 1.0 - share)
            torch._foreach_add_(self.averaged, self.sources, alpha=share)


def _trained(model: nn.Module) -> set[str]:
    """Names of the open parameters, and of the buffers of modules in training mode."""
    opened = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    return opened | {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if module.training
        for name, _ in module.named_buffers(recurse=False)
    }


def _mean(average: Tensor, weights: Tensor, taken: Tensor | int) -> Tensor:
    """What torch does, for shares: those don't mix with a counter that is a tensor."""
    return average + (weights - average) / (int(taken) + 1)
