"""The race between learning rates: who runs, who wins, what a search costs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuning.lr_search.race import MOST, Candidate, affordable, next_rung, rung_lr, winner


def raced(loss_at: dict[int, float], low: float = 1e-9, high: float = 1e9, centre: float = 1e-3) -> list[int]:
    """Rungs in the order in which they ran."""
    scores: dict[int, float] = {}
    while (rung := next_rung(scores, centre, low, high)) is not None:
        assert rung not in scores
        scores[rung] = loss_at.get(rung, 9.0)
    return list(scores)


def test_a_race_climbs_down_in_halves_then_looks_at_the_quarters_beside_the_best() -> None:
    assert raced({0: 1.0}) == [0, -2, 2, -1, 1]
    assert raced({0: 1.0, 2: 0.9, 4: 0.8, 6: 0.85}) == [0, -2, 2, 4, 6, 3, 5]
    assert raced({0: 1.0, -2: 0.9, -3: 0.5}) == [0, -2, -4, -3, -1], "a better quarter is not climbed from"
    assert len(raced({rung: -float(rung) for rung in range(30)})) == MOST


def test_where_all_diverge_the_race_goes_down() -> None:
    diverge = dict.fromkeys(range(-30, 30), math.inf)
    assert raced(diverge) == [0, -2, -4, -6, -8, -10, -12, -14, -16]
    assert raced(diverge, low=1e-4) == [0, -2, -4], "its range and no further"
    assert raced(diverge | {-4: 1.0})[-3:] == [-6, -5, -3], "until one does not"


def test_a_race_stays_in_its_range() -> None:
    falling = {rung: -float(rung) for rung in range(-30, 30)}
    assert raced(falling, high=1e-2) == [0, -2, 2, 4, 3]
    assert raced(falling, low=1e-3, high=1e-3) == [0]


@given(st.integers(-10, 10), st.integers(-3, 3))
def test_a_single_valley_is_found(best: int, shift: int) -> None:
    """To a quarter of a decade, wherever its bottom lies within the candidates that a race may have."""
    scores = {rung: abs(rung - best) + 0.01 * shift * rung / 10 for rung in range(-40, 40)}
    ran = raced(scores)
    assert min(ran, key=lambda rung: scores[rung]) == best or abs(best) > 8


def candidate(lr: float, *judged: float, steps: int = 20) -> Candidate:
    return Candidate(lr, steps, judged)


START = (2.0, 2.2, 1.8, 2.1)


def scored(*gains: float | None) -> list[Candidate]:
    """Candidates from 1e-4 on that gain so much on every image; None diverged."""
    return [
        candidate(1e-4 * 10 ** (n / 4), *([] if gain is None else [loss - gain for loss in START]))
        for n, gain in enumerate(gains)
    ]


def place(*gains: float | None) -> float | None:
    """Where the winner is, in candidates from the lowest."""
    lr, _ = winner(scored(*gains), START, whole=False)
    return None if lr is None else round(4 * math.log10(lr / 1e-4), 6)


def test_the_lowest_loss_wins() -> None:
    assert place(0.1, 0.5, 1.5, 0.6, None) == 2
    assert place(None, 0.3, 0.2) == 1
    assert place(0.5) == 0
    assert candidate(1e-2).score == math.inf
    assert candidate(1e-2, 1.0, math.nan).score == math.inf
    assert candidate(1e-4, 1.7, 1.8, 1.5, 1.7).score == pytest.approx(1.675)


def test_those_beside_it_that_are_as_good_draw_the_answer_to_their_middle() -> None:
    best = candidate(1e-3, 1.0, 1.0, 1.0, 1.0)
    # Behind by 0.1 +- 0.122, by hand: differences 0.4, -0.2, 0.2, 0; deviation 0.258.
    alike = (1.4, 0.8, 1.2, 1.0)
    behind = (1.4, 1.1, 1.3, 1.2)
    assert winner([candidate(1e-4, *alike), best, candidate(1e-2, *behind)], START, whole=False)[0] == pytest.approx(
        10**-3.5
    )
    assert winner([candidate(1e-4, *behind), best, candidate(1e-2, *alike)], START, whole=False)[0] == pytest.approx(
        10**-2.5
    )
    assert winner([candidate(1e-4, *alike), best, candidate(1e-2, *alike)], START, whole=False)[0] == pytest.approx(
        1e-3
    )
    further = [candidate(1e-5, *alike), candidate(1e-4, *behind), best, candidate(1e-2)]
    assert winner(further, START, whole=False)[0] == pytest.approx(1e-3), (
        "not across one that is behind, nor one that diverged"
    )


def test_a_single_one_that_learns_is_chance() -> None:
    lr, reason = winner(scored(0.0, 1.5, None), START, whole=False)
    assert lr is None
    assert reason == "chance: after 20 steps 1.8e-04 is clearly better than before, those beside it are not"


def test_without_a_clear_gain_nobody_wins() -> None:
    """By hand: gains 0.1, -0.1, 0.2, 0.2 have the mean 0.1 and the standard error 0.0707."""
    lr, reason = winner([candidate(1e-4, 1.9, 2.3, 1.6, 1.9)], START, whole=False)
    assert (lr, reason.partition(":")[0]) == (None, "nothing learned")
    assert "after 20 steps no candidate is clearly better on the 4 evaluation images" in reason
    clearer = candidate(1e-4, 1.9 - 0.12, 2.3 - 0.12, 1.6 - 0.12, 1.9 - 0.12)
    assert winner([clearer], START, whole=False)[0] == pytest.approx(1e-4), "0.22 / 0.0707 = 3.1 standard errors"
    assert place(0.0, 0.0) is None
    assert place(-1.0, -2.0) is None
    assert winner(scored(None, None), START, whole=False) == (
        None,
        "all diverge: every candidate from 1.0e-04 to 1.8e-04",
    )


def test_a_rung_is_a_round_number_about_a_quarter_of_a_decade_from_the_next() -> None:
    around = [1e-4, 2e-4, 3e-4, 6e-4, 1e-3, 2e-3, 3e-3, 6e-3, 1e-2]
    assert [rung_lr(1e-3, rung) for rung in range(-4, 5)] == around
    assert [rung_lr(8.1e-4, rung) for rung in range(-4, 5)] == around, "from the nearest 1 or 3"
    assert [rung_lr(2e-3, rung) for rung in (-2, -1, 0, 1, 2)] == [1e-3, 2e-3, 3e-3, 6e-3, 1e-2]
    assert [rung_lr(1.0, rung) for rung in (-1, 0, 1)] == [0.6, 1.0, 2.0]


@given(st.floats(1e-7, 10.0))
def test_the_first_candidate_is_about_a_quarter_of_a_decade_from_the_answer_at_most(centre: float) -> None:
    assert abs(math.log10(rung_lr(centre, 0) / centre)) <= 0.2730


@pytest.mark.parametrize(
    ("planned", "cost"),
    [(0, (30, 1, 40)), (1_000, (30, 1, 40)), (3_000, (30, 2, 40)), (10_000, (100, 3, 50)), (100_000, (100, 3, 50))],
)
def test_a_search_costs_a_bounded_share_of_the_run(planned: int, cost: tuple[int, int, int]) -> None:
    steps, sweeps, race = affordable(planned, 0.1, 100, 3, 50)
    assert steps * sweeps + 6 * race <= max(270, 0.1 * planned)
    assert (steps, sweeps, race) == cost


def test_without_a_race_the_sweeps_get_it_all() -> None:
    assert affordable(0, 0.1, 100, 3, 0) == (90, 3, 0)
    assert affordable(10_000, 0.1, 12, 4, 10) == (12, 4, 10)
