"""Gradient checkpointing on two processes: the weights are those without, through partly frozen stages, too."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_ranks
from stage_runs import largest_difference, run_stages

RUN = ("--weights", "none", "--batch-size", "8", "--micro-batch", "2", "--drop-rate", "0.2")
STAGES = ("--freeze-epochs", "1", "--epochs", "4", "--unfreeze", "gradual", "--optimizer", "sgd", "--lr", "0.05")


@pytest.mark.parametrize("name", ["test_convnext", "test_vit"])
def test_two_processes_end_with_the_same_weights(photos: Path, name: str) -> None:
    argv = ("--data", str(photos), "--model", name, "--image-size", "32", *RUN, *STAGES)
    plain, _ = run_ranks(2, run_stages, *argv)
    first, second = run_ranks(2, run_stages, *argv, "--grad-checkpointing")
    assert len(plain.states) > 3
    for one, other, without in zip(first.states, second.states, plain.states, strict=True):
        assert largest_difference(one, other) == 0
        assert largest_difference(one, without) == 0
    assert (first.losses, first.metrics) == (plain.losses, plain.metrics)
