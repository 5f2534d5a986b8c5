"""The campaign of `campaign.py`: a few short cases in every run of the tests, the whole of it with -m slow."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.faults.campaign import REGRESSIONS, SHORT, Campaign, Case, case_of

QUICK = (16, 82)  # kill -9 inside a save at two processes, a signal at one
WHOLE = (*REGRESSIONS, *range(60))


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    return Campaign(tmp_path_factory.mktemp("campaign"))


@pytest.mark.parametrize("seed", QUICK)
def test_short_run_is_not_changed_by_faults(campaign: Campaign, seed: int) -> None:
    check(campaign, replace(case_of(seed), variant=SHORT, strikes=1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", WHOLE)
def test_run_is_not_changed_by_faults(campaign: Campaign, seed: int) -> None:
    check(campaign, case_of(seed))


def check(campaign: Campaign, case: Case) -> None:
    """Play the case; a failure says what differs and how to play it again."""
    result = campaign.play(case)
    assert not result.problems, (
        f"python -m tests.faults.campaign --seed {case.seed}  ({'; '.join(result.faults)})\n"
        + "\n".join(result.problems)
    )
