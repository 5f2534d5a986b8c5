"""Schedules against torch's schedulers and at their corner values."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler as torch_schedulers

from tuning.schedules import (
    Schedule,
    constant,
    cosine,
    exponential_rise,
    one_cycle,
    restarts,
    sgdr,
    step_decay,
    triangular,
    with_warmup,
)

PEAK = 0.4


def torch_factors(make: Callable[[torch.optim.Optimizer], torch_schedulers.LRScheduler], steps: int) -> list[float]:
    """The learning rate of each of *steps* real optimizer steps, over the peak."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK, momentum=0.9)
    scheduler = make(optimizer)
    factors = []
    for _ in range(steps):
        factors.append(float(optimizer.param_groups[0]["lr"]) / PEAK)
        optimizer.step()
        scheduler.step()
    return factors


def assert_same(schedule: Schedule, expected: list[float]) -> None:
    assert [schedule(step) for step in range(len(expected))] == pytest.approx(expected, abs=1e-9, rel=0)


@pytest.mark.parametrize("mult", [1, 2, 3])
@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_sgdr_equals_torch(mult: int, floor: float) -> None:
    expected = torch_factors(
        lambda o: torch_schedulers.CosineAnnealingWarmRestarts(o, T_0=7, T_mult=mult, eta_min=floor * PEAK), 200
    )
    assert_same(sgdr(first_cycle=7, mult=mult, floor=floor), expected)


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_cosine_equals_torch(floor: float) -> None:
    expected = torch_factors(lambda o: torch_schedulers.CosineAnnealingLR(o, T_max=60, eta_min=floor * PEAK), 61)
    assert_same(cosine(60, floor), expected)


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_triangular_equals_torch(floor: float) -> None:
    expected = torch_factors(
        lambda o: torch_schedulers.CyclicLR(
            o, base_lr=floor * PEAK, max_lr=PEAK, step_size_up=20, cycle_momentum=False
        ),
        130,
    )
    assert_same(triangular(20, floor), expected)


def test_step_decay_equals_torch() -> None:
    assert_same(step_decay(30, 0.2), torch_factors(lambda o: torch_schedulers.StepLR(o, 30, 0.2), 130))


@pytest.mark.parametrize(("steps", "warm"), [(100, 0.3), (37, 0.25), (11, 0.5), (10, 0.0), (3, 0.3), (2, 0.4)])
def test_one_cycle_equals_torch(steps: int, warm: float) -> None:
    assert_same(one_cycle(steps, warm), _one_cycle_torch(steps, warm))


def test_one_cycle_whose_peak_is_the_first_or_the_last_step() -> None:
    assert [one_cycle(10, 0.1)(step) for step in (0, 9)] == pytest.approx([1, 4e-6])
    assert [one_cycle(10, 1.0)(step) for step in (0, 9, 10)] == pytest.approx([1 / 25, 1, 1])


def _one_cycle_torch(steps: int, warm: float) -> list[float]:
    """torch refuses the step after its last, so step one time less than the steps read."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK, momentum=0.9)
    scheduler = torch_schedulers.OneCycleLR(optimizer, max_lr=PEAK, total_steps=steps, pct_start=warm)
    factors = [float(optimizer.param_groups[0]["lr"]) / PEAK]
    for _ in range(steps - 1):
        optimizer.step()
        scheduler.step()
        factors.append(float(optimizer.param_groups[0]["lr"]) / PEAK)
    return factors


def test_values_at_start_peak_boundary_end() -> None:
    assert [constant()(step) for step in (0, 10**9)] == [1, 1]
    assert [cosine(10, 0.2)(step) for step in (0, 5, 10, 11, 1000)] == pytest.approx([1, 0.6, 0.2, 0.2, 0.2])
    assert [sgdr(10, 2)(step) for step in (0, 5, 10, 20, 30)] == pytest.approx([1, 0.5, 1, 0.5, 1])
    assert sgdr(10)(9) == pytest.approx((1 + math.cos(0.9 * math.pi)) / 2)
    assert [one_cycle(100)(step) for step in (0, 29, 99, 100, 5000)] == pytest.approx([1 / 25, 1, 4e-6, 4e-6, 4e-6])
    assert [step_decay(30)(step) for step in (0, 29, 30, 59, 60)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert [triangular(20, 0.1)(step) for step in (0, 10, 20, 40, 60)] == pytest.approx([0.1, 0.55, 1, 0.1, 1])
    rise = exponential_rise(101, 1e-6, 1.0)
    assert [rise(step) for step in (0, 50, 100, 200)] == pytest.approx([1e-6, 1e-3, 1, 1])


def test_peak_decay_lowers_each_restart_but_never_under_the_floor() -> None:
    schedule = sgdr(10, peak_decay=0.5, floor=0.2)
    assert [schedule(step) for step in (0, 10, 20, 30, 40)] == pytest.approx([1, 0.5, 0.25, 0.2, 0.2])


@pytest.mark.parametrize("mult", [1, 2, 3])
def test_restarts_are_the_steps_where_the_factor_jumps_up(mult: int) -> None:
    schedule = sgdr(7, mult)
    jumps = [step for step in range(1, 200) if schedule(step) > schedule(step - 1)]
    assert restarts(7, mult, 200) == jumps
    assert restarts(7, mult, 7) == []
    assert restarts(7, mult, 8) == [7]


def test_warmup_never_wastes_a_step_and_hands_over_to_the_schedule() -> None:
    schedule = with_warmup(cosine(10), 4)
    assert [schedule(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert schedule(9) == pytest.approx(0.5)
    assert schedule(14) == pytest.approx(0)
    base = cosine(10)
    assert with_warmup(base, 0) is base
    assert with_warmup(triangular(10, 0.5), 1)(0) == pytest.approx(0.25)


@settings(max_examples=200, deadline=None)
@given(
    step=st.integers(0, 10**7),
    length=st.integers(1, 5000),
    mult=st.integers(1, 4),
    floor=st.floats(0, 1),
    decay=st.floats(0, 1),
)
def test_factor_stays_between_floor_and_one(step: int, length: int, mult: int, floor: float, decay: float) -> None:
    for schedule in (
        cosine(length, floor),
        sgdr(length, mult, floor, decay),
        one_cycle(length, decay, start=max(floor, 0.5), floor=floor),
        triangular(length, floor),
    ):
        assert floor - 1e-12 <= schedule(step) <= 1 + 1e-12
        assert 0 <= with_warmup(schedule, 10)(step) <= 1 + 1e-12
    assert 0 <= step_decay(length, floor)(step) <= 1


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (lambda: cosine(0), "0"),
        (lambda: cosine(2.5), "2.5"),  # type: ignore[arg-type]
        (lambda: cosine(True), "True"),
        (lambda: cosine(5, -0.1), "-0.1"),
        (lambda: sgdr(5, 0), "0"),
        (lambda: sgdr(5, floor=float("nan")), "nan"),
        (lambda: sgdr(5, peak_decay=1.1), "1.1"),
        (lambda: one_cycle(5, 1.5), "1.5"),
        (lambda: one_cycle(5, start=2), "2"),
        (lambda: step_decay(-3), "-3"),
        (lambda: step_decay(3, 7.0), "7.0"),
        (lambda: triangular(0), "0"),
        (lambda: exponential_rise(1, 1e-3, 1), "1"),
        (lambda: exponential_rise(9, 1e-3, 1e-4), "0.0001"),
        (lambda: with_warmup(constant(), -1), "-1"),
        (lambda: restarts(0, 1, 5), "0"),
    ],
)
def test_bad_values_are_refused_at_construction_with_the_value(make: Callable[[], object], value: str) -> None:
    with pytest.raises(ValueError, match=f"got.*{value}"):
        make()
