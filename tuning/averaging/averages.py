"""Averaged weights beside the trained ones: EMA after every optimizer step, SWA at the ends of epochs or cycles."""

from __future__ import annotations

from collections.abc import Sequence

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
        split = asked()
        self._last, self._moments = len(plan) - 1, plan[-1].swa_steps
        self._ema = None
        if decay:  # in float32, whatever the weights are
            self._ema = ModelEmaV3(model, decay, use_warmup=True, foreach=not split, dtype=torch.float32)
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
        if self._ema is not None:
            self._ema.set(model)  # type: ignore[no-untyped-call]

    def update(self, model: nn.Module, progress: Progress) -> None:
        """Take in what the optimizer step just completed has made of *model*."""
        if self._ema is not None:
            self._ema.update(model, progress.step)
        if self._swa is not None and progress.stage == self._last and progress.stage_step in self._moments:
            self._swa.n_averaged.fill_(self._taken(progress) - 1)
            self._swa.update_parameters(model)

    def _taken(self, progress: Progress) -> int:
        """Weights in the mean so far."""
        if progress.stage < self._last:
            return 0
        return sum(moment <= progress.stage_step for moment in self._moments)


def _mean(average: Tensor, weights: Tensor, taken: Tensor | int) -> Tensor:
    """What torch does, for shares: those don't mix with a counter that is a tensor."""
    return average + (weights - average) / (int(taken) + 1)
