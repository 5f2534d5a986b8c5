"""Training that is taken back: afterwards everything is, bit for bit, what it was before."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from tuning.entering import Entered
from tuning.sharding import own


@contextmanager
def leaving_no_trace(accelerator: Accelerator, entered: Entered) -> Iterator[None]:
    """Put back, bit for bit, what training in the body changes: model, optimizer, scaler, modes, random generators.

    Costs a copy of the model on the host, and one of the optimizer's state where it is. The wrapper stays the same one;
    DDP arranges its exchange anew after its first step, so make another before training (`enter_stage`).
    """
    tensors = [own(tensor.detach()) for tensor in (*entered.model.parameters(), *entered.model.buffers())]
    copies = [tensor.to("cpu", copy=True) for tensor in tensors]
    modes = [(module, module.training) for module in (*entered.wrapped.modules(), *entered.model.modules())]
    optimizer = entered.optimizer.optimizer
    state, groups, generators = _optimizer_state(optimizer)
    scaler = accelerator.scaler
    scale = None if scaler is None else copy.deepcopy(scaler.state_dict())
    python, numpy = random.getstate(), np.random.get_state()
    cuda = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, before in zip(tensors, copies, strict=True):
                    tensor.copy_(before)
            entered.model.zero_grad()
            _restore_optimizer(optimizer, state, groups, generators)
            if scaler is not None:
                scaler.load_state_dict(scale)
            for module, training in modes:
                module.training = training
            random.setstate(python)
            np.random.set_state(numpy)


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[Any, Any], list[dict[str, Any]], dict[str, Any]]:
    """Copies of the state, the groups without their parameters, and the generators that some optimizers hold."""
    itself = {id(p): p for group in optimizer.param_groups for p in group["params"]}  # keys stay what they are
    state = copy.deepcopy(dict(optimizer.state), dict(itself))
    groups = [copy.deepcopy({k: v for k, v in g.items() if k != "params"}) for g in optimizer.param_groups]
    generators: dict[str, Any] = {}
    for name, value in vars(optimizer).items():
        if isinstance(value, random.Random):
            generators[name] = value.getstate()
        elif isinstance(value, torch.Generator):
            generators[name] = value.get_state()
    return state, groups, generators


def _restore_optimizer(
    optimizer: torch.optim.Optimizer,
    state: dict[Any, Any],
    groups: Sequence[dict[str, Any]],
    generators: dict[str, Any],
) -> None:
    optimizer.state.clear()
    optimizer.state.update(state)
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        for name in group.keys() - before.keys() - {"params"}:
            del group[name]
        group.update(before)
    for name, before in generators.items():
        generator = getattr(optimizer, name)
        restore = generator.setstate if isinstance(generator, random.Random) else generator.set_state
        restore(before)
