"""Processes that don't see the same folder of the run refuse to go on, each with the step of all."""

from __future__ import annotations

import pytest
from accelerate import Accelerator
from ranks import run_ranks

from tuning.errors import UserError
from tuning.safety.agreement import refuse_different_steps


def refused(found: tuple[int | None, ...]) -> str:
    """What this process says when it has found the step at its place in *found*."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == len(found)
    try:
        refuse_different_steps(found[accelerator.process_index])
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("found", "said"),
    [((12, None), "process 0: 12, process 1: none"), ((8, 12), "process 0: 8, process 1: 12"), ((12, 12), "")],
)
def test_checkpoints_of_different_steps(found: tuple[int | None, ...], said: str) -> None:
    for told in run_ranks(2, refused, found):
        assert said in told
        assert bool(told) == bool(said)
