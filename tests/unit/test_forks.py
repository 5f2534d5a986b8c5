"""The tests' own forks: they train, whatever the test before them did in the same process."""

from __future__ import annotations

import torch
from ranks import run_ranks
from torch._subclasses.fake_tensor import FakeTensorMode


def trained() -> float:
    weight = torch.ones(1, requires_grad=True)
    (3 * weight).sum().backward()
    return float(weight.grad)  # type: ignore[arg-type]


def test_a_fork_trains_after_an_export() -> None:
    with FakeTensorMode():
        pass
    trained()
    assert run_ranks(1, trained) == [3.0]
