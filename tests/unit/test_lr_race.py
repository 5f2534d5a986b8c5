"""The race between learning rates: who runs, who wins, what a search costs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuning.lr_race import MOST, Candidate, affordable, next_rung, rung_lr, winner


def raced(loss_at: dict[int, float], low: float = 1e-9, high: float = 1e9, centre: float = 1e-3) -> list[int]:
    """Rungs in the order in which they ran."""
    scores: dict[int, float] = {}
    while (rung := next_rung(scores, centre, low, high)) is not None:
        assert rung not in scores
        scores[rung] = loss_at.get(rung, 9.0)
    return list(scores)


def test_a_race_climbs_down_to_a_rung_with_neighbours() -> None:
    assert raced({0: 1.0}) == [0, -1, 1]
    assert raced({0: 1.0, 1: 0.9, 2: 0.8, 3: 0.85}) == [0, -1, 1, 2, 3]
    assert raced({0: 1.0, -1: 0.9}) == [0, -1, -2], "the other side is of no interest then"
    assert len(raced({rung: -float(rung) for rung in range(20)})) == MOST
    assert raced({0: math.inf, -1: math.inf, 1: math.inf}) == [0, -1, 1], "all diverged: no reason to go anywhere"


def test_a_race_stays_in_its_range() -> None:
    falling = {rung: -float(rung) for rung in range(-9, 9)}
    assert raced(falling, high=1e-2) == [0, -1, 1, 2]
    assert raced(falling, low=1e-3, high=1e-3) == [0]


@given(st.integers(-6, 6), st.integers(-3, 3))
def test_a_single_valley_is_found(best: int, shift: int) -> None:
    """Wherever its bottom lies within the candidates that a race may have."""
    scores = {rung: abs(rung - best) + 0.01 * shift * rung / 10 for rung in range(-20, 20)}
    ran = raced(scores)
    assert min(ran, key=lambda rung: scores[rung]) == min(best, 5)


def candidate(lr: float, *losses: float, steps: int = 0) -> Candidate:
    return Candidate(lr, losses, steps or len(losses))


@pytest.mark.parametrize(
    ("below", "best", "above", "moved"),
    [
        (1.0, 0.5, 1.0, 0.0),
        (0.6, 0.5, 1.0, -1 / 3),
        (math.inf, 0.5, 1.0, 0.5),
        (0.9, 0.5, math.inf, -0.5),
        (math.inf, 0.5, math.inf, 0.0),
    ],
)
def test_the_answer_is_at_the_bottom_of_the_parabola(below: float, best: float, above: float, moved: float) -> None:
    """In half-decades; through (-1, 0.6), (0, 0.5), (1, 1.0) by hand: 0.3 x^2 + 0.2 x + 0.5, lowest at -1/3."""
    falling = [9.0] * 9
    ran = [
        Candidate(lr, (*falling, *[score] * 9) if score < math.inf else (9.0,), 18)
        for lr, score in ((1e-3 / 10**0.5, below), (1e-3, best), (1e-3 * 10**0.5, above))
    ]
    lr, _ = winner(ran)
    assert lr == pytest.approx(1e-3 * 10 ** (moved / 2))


def test_the_lowest_end_wins() -> None:
    slow, good = candidate(1e-4, 2, 2, 2, 1.8, 1.7, 1.7), candidate(1e-3, 2, 3, 2, 1, 0.5, 0.5)
    wild = candidate(1e-2, 2, 0.1, 0.1, 0.1, 3, 3)
    assert winner([good, wild]) == (1e-3, ""), "without two neighbours it is what ran"
    lr, _ = winner([slow, good, wild])
    assert 1e-3 / 10**0.25 <= lr < 1e-3  # type: ignore[operator]  # the wild one is further up
    assert slow.score == pytest.approx(1.7)
    assert winner([slow, candidate(1e-3, 2, 0.1, steps=6)]) == (1e-4, ""), "one that ended early"
    assert winner([slow, candidate(1e-3, 2, 0.1, 0.1, 0.1, 0.1, math.nan)]) == (1e-4, "")


def test_without_a_fall_nobody_wins() -> None:
    lr, reason = winner([candidate(1e-4, *[2.0] * 9), candidate(1e-3, 2, 2, 2, 2, 2, 2, 1.95, 1.95, 1.95)])
    assert (lr, reason.partition(":")[0]) == (None, "flat")
    diverged = [candidate(lr, 2.0, 50.0, steps=9) for lr in (1e-4, 1e-3)]
    assert winner(diverged) == (None, "all diverge: every candidate from 1.0e-04 to 1.0e-03")


def test_a_rung_is_half_a_decade() -> None:
    assert [rung_lr(1e-3, rung) for rung in (-2, 0, 2)] == pytest.approx([1e-4, 1e-3, 1e-2])


@pytest.mark.parametrize(
    ("planned", "cost"),
    [(0, (30, 1, 32)), (1_000, (30, 1, 32)), (3_000, (30, 3, 42)), (10_000, (100, 3, 50)), (100_000, (100, 3, 50))],
)
def test_a_search_costs_a_bounded_share_of_the_run(planned: int, cost: tuple[int, int, int]) -> None:
    steps, sweeps, race = affordable(planned, 0.1, 100, 3, 50)
    assert steps * sweeps + 5 * race <= max(190, 0.1 * planned)
    assert (steps, sweeps, race) == cost


def test_without_a_race_the_sweeps_get_it_all() -> None:
    assert affordable(0, 0.1, 100, 3, 0) == (63, 3, 0)
    assert affordable(10_000, 0.1, 12, 4, 10) == (12, 4, 10)
