"""Early stopping by hand; the plateau against torch's own ReduceLROnPlateau."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_stages import plain_stage

from tuning.cli.command_line import Command, parse_command
from tuning.errors import UserError
from tuning.patience import count, curves_of, next_stage
from tuning.progress import Progress
from tuning.stage_checks import check_stage
from tuning.stages import Stage

PER_EPOCH = 3


def after(stage: Stage, values: list[float], metric: str = "top1") -> list[Progress]:
    """Progress after every evaluation, as a run has it that is stopped and gone on after each."""
    progress, seen = Progress(), []
    for value in values:
        progress = Progress.from_json(json.loads(json.dumps(progress.to_json())))
        progress.stage_step += PER_EPOCH
        count(progress, stage, value, metric, PER_EPOCH)
        seen.append(dataclasses.replace(progress))
    return seen


@pytest.mark.parametrize(
    ("values", "ends_after"),
    [
        ([0.5, 0.4, 0.6, 0.6, 0.5], 5),
        ([0.5, 0.5, 0.5], 3),
        ([0.1, 0.2, 0.3], None),
        ([math.nan, math.nan], 2),
        ([math.nan, 0.1, math.nan, 0.05], 4),
    ],
)
def test_a_stage_ends_after_two_evaluations_without_a_better_one(values: list[float], ends_after: int | None) -> None:
    seen = after(plain_stage(epochs=9, patience=2), values)
    assert [n for n, progress in enumerate(seen, start=1) if progress.stage_over] == (
        [ends_after] if ends_after else []
    )


def test_of_a_loss_less_is_better() -> None:
    assert [p.waiting for p in after(plain_stage(patience=9), [1.0, 0.9, 0.95, 0.8], "loss")] == [0, 0, 1, 0]


def test_without_the_flags_nothing_ends_and_nothing_drops() -> None:
    last = after(plain_stage(), [0.5] * 50)[-1]
    assert (last.stage_over, last.lr_factor) == (False, 1.0)
    assert not curves_of(last, plain_stage())


VALUES = st.lists(st.floats(0, 1) | st.sampled_from([0.25, 0.5, math.nan]), min_size=1, max_size=40)


@settings(deadline=None, max_examples=60)
@given(VALUES, st.integers(1, 4), st.sampled_from([0.1, 0.5, 0.3]), st.sampled_from([0.0, 0.05]), st.booleans())
def test_the_plateau_is_torchs(values: list[float], patience: int, gamma: float, floor: float, loss: bool) -> None:
    stage = plain_stage(schedule="plateau", plateau_patience=patience, step_gamma=gamma, lr_floor=floor)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, "min" if loss else "max", factor=gamma, patience=patience - 1, threshold=0, min_lr=floor, eps=0
    )
    factors = []
    for value in values:
        theirs.step(value)
        factors.append(optimizer.param_groups[0]["lr"])
    assert [p.lr_factor for p in after(stage, values, "loss" if loss else "top1")] == pytest.approx(factors, rel=1e-12)


def test_a_stage_counts_for_itself() -> None:
    progress = after(plain_stage(patience=3, schedule="plateau", plateau_patience=1), [0.5, 0.4])[-1]
    assert (progress.waiting, progress.lr_factor, progress.stage_best) == (1, 0.1, 0.5)
    next_stage(progress)
    assert dataclasses.replace(progress, stage=0) == Progress()
    assert progress.stage == 1


def test_within_a_cycle_nothing_is_counted() -> None:
    """Cycles of 1, 2 and 4 epochs after an epoch of warm-up: they end after epochs 2, 4 and 8."""
    stage = plain_stage(
        epochs=9, schedule="sgdr", cycle_epochs=1.0, cycle_mult=2, warmup_epochs=1.0, patience=2, lr=0.1
    )
    check_stage(stage)
    seen = after(stage, [0.9, 0.5, 0.1, 0.4, 0.6, 0.1, 0.2, 0.3])
    assert [progress.waiting for progress in seen] == [0, 0, 0, 1, 1, 1, 1, 2]
    assert [progress.stage_over for progress in seen] == [False] * 7 + [True]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schedule": "one-cycle"}, "before the learning rate of --schedule one-cycle has come down"),
        ({"schedule": "triangular"}, "before the learning rate of --schedule triangular has come down"),
        ({"schedule": "sgdr"}, r"give whole --cycle-epochs \(now None\)"),
        ({"schedule": "sgdr", "cycle_epochs": 1.5}, r"give whole --cycle-epochs \(now 1\.5\)"),
        ({"schedule": "sgdr", "cycle_epochs": 1.0, "warmup_epochs": 0.5}, r"--warmup-epochs \(now 0\.5\)"),
        ({"schedule": "plateau", "plateau_patience": 3}, "before --plateau-patience 3 drops"),
        ({"patience": 0}, "--patience is 0; give at least 1"),
        ({"patience": None, "plateau_patience": 0}, "--plateau-patience is 0; give at least 1"),
    ],
)
def test_what_can_not_work_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_stage(plain_stage(**{"epochs": 9, "patience": 3, **changes}))


def parse(*argv: str) -> Command:
    return parse_command(["--data", "photos", *argv], "recipes/finetune.py", "", Path("presets"))


def test_flags_that_do_nothing_are_refused() -> None:
    for argv in (("--epochs", "3"), ("--epochs", "0", "--freeze-epochs", "9", "--cache-features")):
        with pytest.raises(UserError, match="--patience 2 has no effect: no stage that is evaluated after every epoch"):
            parse("--patience", "2", *argv)
    with pytest.raises(UserError, match="--plateau-patience 5 has no effect with --schedule cosine"):
        parse("--plateau-patience", "5")
    parse("--patience", "2", "--epochs", "4")


def test_the_plan_says_it() -> None:
    stage = parse("--patience", "4", "--schedule", "plateau", "--plateau-patience", "1").stages[-1]
    assert list(stage.notes(5)) == [
        "stage 'all' drops to 0.1 of its learning rate after 1 evaluation without better",
        "stage 'all' ends early after 4 evaluations in a row without a better one",
    ]
