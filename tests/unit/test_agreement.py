"""Drift between processes is an error; the statistics of BatchNorm are averaged."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from ranks import run_ranks
from timm.layers import EvoNorm2dB0
from torch import Tensor, nn

from tuning.safety.agreement import DriftError, average_statistics, refuse_drift, running_statistics, sum_if_all


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), EvoNorm2dB0(4), nn.BatchNorm2d(4), nn.Linear(4, 2))


def drift(name: str | None, by: float) -> str:
    """The message of `refuse_drift` after rank 1 has moved one element of the tensor *name*, or an empty string."""
    accelerator, model = Accelerator(), network()
    if name is not None and accelerator.process_index == 1:
        model.state_dict()[name].view(-1)[-1] += by
    try:
        refuse_drift(accelerator, model)
    except DriftError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ["0.weight", "4.bias", "1.running_var", "3.num_batches_tracked"])
def test_drift_names_the_tensor_on_every_process(name: str) -> None:
    for message in run_ranks(2, drift, name, 1 if "num_batches" in name else 1e-5):
        assert message == f"1 of {len(network().state_dict())} tensors differ between processes, the first is {name}."


def test_a_nan_on_one_process_alone_is_drift() -> None:
    for message in run_ranks(2, drift, "0.bias", float("nan")):
        assert message.endswith("the first is 0.bias.")


def test_equal_processes_pass() -> None:
    assert run_ranks(2, drift, None, 0.0) == ["", ""]


def test_one_process_has_nobody_to_differ_from() -> None:
    assert drift("0.weight", 1.0) == ""


def summed(mine: list[float | None]) -> float | None:
    accelerator, exchanges = Accelerator(), []
    number = mine[accelerator.process_index]
    exchange = torch.distributed.all_reduce
    with mock.patch("torch.distributed.all_reduce", lambda *a, **k: (exchanges.append(a), exchange(*a, **k))):
        total = sum_if_all(accelerator, None if number is None else torch.tensor(number))
    assert len(exchanges) == 1, "a message of its own for the vote costs as much again"
    return None if total is None else float(total)


@pytest.mark.parametrize(
    ("mine", "expected"), [([1.5, 2.0], 3.5), ([1.5, None], None), ([None, None], None), ([0.0, -0.0], 0.0)]
)
def test_a_sum_is_of_all_or_of_none(mine: list[float | None], expected: float | None) -> None:
    assert run_ranks(2, summed, mine) == [expected, expected]


def test_a_sum_with_nan_is_nan_and_nobody_is_missing() -> None:
    assert all(total is not None and math.isnan(total) for total in run_ranks(2, summed, [1.0, float("nan")]))


def equal_nan() -> None:
    accelerator, model = Accelerator(), network()
    model[0].weight.data[0] = float("nan")
    refuse_drift(accelerator, model)


def test_the_same_nan_everywhere_is_no_drift() -> None:
    run_ranks(2, equal_nan)


def averaged(training: bool) -> dict[str, Tensor]:
    """The state after averaging; rank r started with statistics r + 1, the last norm in evaluation mode."""
    accelerator, model = Accelerator(), network()
    model.train(training)
    model[3].eval()
    for name, tensor in model.state_dict().items():
        if "running_" in name:
            tensor.fill_(accelerator.process_index + 1)
    average_statistics(accelerator, running_statistics(model).values())
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_statistics_are_averaged_where_they_move() -> None:
    for rank, state in enumerate(run_ranks(2, averaged, True)):
        for name in ("1.running_mean", "1.running_var", "2.running_var"):
            assert (state[name] == 1.5).all(), name
        assert (state["3.running_mean"] == rank + 1).all()
        parameters = dict(network().named_parameters())
        assert all(torch.equal(state[name], value) for name, value in parameters.items())


def test_norms_in_evaluation_mode_are_left_alone() -> None:
    for rank, state in enumerate(run_ranks(2, averaged, False)):
        assert all((value == rank + 1).all() for name, value in state.items() if "running_" in name)
