"""Stages: what is open, for how long, and the learning rate at every step."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tuning import schedules
from tuning.cli.command_line import parse_command, resolve_stages
from tuning.errors import UserError
from tuning.flags import Flags, RegularisationFlags, StageFlags
from tuning.stage_checks import check_stage
from tuning.stage_lists import read_stages, standard_stages
from tuning.stages import Stage

BASE = resolve_stages(Flags())[-1]
PER_EPOCH = 7


def staged(**changes: Any) -> Stage:
    return dataclasses.replace(BASE, **changes)


def read(text: str, base: Stage = BASE) -> list[Stage]:
    return read_stages(yaml.safe_load(text), base, "preset.yaml")


def factors(stage: Stage, steps: int) -> list[float]:
    factor = stage.factor(PER_EPOCH)
    return [factor(step) for step in range(steps)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": "constant"}, schedules.constant()),
        ({"schedule": "cosine"}, schedules.cosine(70)),
        ({"schedule": "cosine", "lr_floor": 0.1}, schedules.cosine(70, 0.1)),
        ({"schedule": "one-cycle"}, schedules.one_cycle(70)),
        ({"schedule": "sgdr"}, schedules.sgdr(70, 2)),
        (
            {"schedule": "sgdr", "cycle_epochs": 1.5, "cycle_mult": 3, "cycle_decay": 0.5, "lr_floor": 0.01},
            schedules.sgdr(10, 3, 0.01, 0.5),  # 1.5 epochs of 7 steps, rounded to even
        ),
        ({"schedule": "step"}, schedules.step_decay(23, 0.1)),
        ({"schedule": "step", "step_epochs": 2, "step_gamma": 0.3}, schedules.step_decay(14, 0.3)),
        ({"schedule": "triangular"}, schedules.triangular(35)),
        ({"schedule": "triangular", "cycle_epochs": 2.0, "lr_floor": 0.2}, schedules.triangular(7, 0.2)),
        ({"schedule": "triangular", "cycle_epochs": 0.001}, schedules.triangular(1)),
        ({"schedule": "sgdr", "cycle_epochs": 0.001, "cycle_mult": 1}, schedules.sgdr(1, 1)),
        ({"schedule": "cosine", "warmup_epochs": 1.0}, schedules.with_warmup(schedules.cosine(63), 7)),
        ({"schedule": "one-cycle", "warmup_epochs": 0.5}, schedules.with_warmup(schedules.one_cycle(66), 4)),
        ({"schedule": "step", "warmup_epochs": 1.0}, schedules.with_warmup(schedules.step_decay(21), 7)),
    ],
)
def test_schedules_are_those_of_the_library(changes: dict[str, Any], expected: schedules.Schedule) -> None:
    assert factors(staged(**changes), 70) == [expected(step) for step in range(70)]


@pytest.mark.parametrize("name", ["sgdr", "cosine", "step", "triangular", "constant", "one-cycle"])
def test_warm_up_rises_without_a_jump(name: str) -> None:
    values = factors(staged(schedule=name, warmup_epochs=1.0, lr_floor=0.1), 8)
    assert values[:7] == pytest.approx([(n + 1) / 8 * values[7] for n in range(7)])
    assert values[0] > 0


def test_steps_are_epochs_of_optimizer_steps() -> None:
    assert staged(epochs=3).steps(PER_EPOCH) == 21


@pytest.mark.parametrize(
    ("epochs", "changes", "expected"),
    [
        (7, {"cycle_epochs": 1.0, "cycle_mult": 2}, None),  # 1 + 2 + 4
        (8, {"cycle_epochs": 1.0, "cycle_mult": 2}, "ends 12% into its last SGDR cycle; 15 epochs"),
        (6, {"cycle_epochs": 1.0, "cycle_mult": 2}, "ends 75% into its last SGDR cycle; 7 epochs"),
        (8, {"cycle_epochs": 2.0, "cycle_mult": 1}, None),
        (9, {"cycle_epochs": 2.0, "cycle_mult": 1}, "ends 50% into its last SGDR cycle; 10 epochs"),
        (8, {"cycle_epochs": 1.0, "cycle_mult": 2, "warmup_epochs": 1.0}, None),
        (3, {"cycle_epochs": 5.0, "cycle_mult": 2}, "ends 60% into its last SGDR cycle; 5 epochs"),
        (3, {"cycle_epochs": 0.001, "cycle_mult": 1}, None),
        (3, {"cycle_epochs": None}, None),
        (3, {"cycle_epochs": 2.0, "schedule": "cosine"}, None),
    ],
)
def test_a_cut_cycle_is_announced(epochs: int, changes: dict[str, Any], expected: str | None) -> None:
    said = staged(**{"epochs": epochs, "schedule": "sgdr", **changes}).cut_cycle(PER_EPOCH)
    assert said is None if expected is None else said is not None and expected in said


def test_a_warm_up_that_fills_the_stage_leaves_no_cycle() -> None:
    stage = staged(schedule="sgdr", epochs=1, warmup_epochs=0.9)
    assert stage.cycle_ends(1) == stage.cycle_ends(4) == []
    assert stage.cycle_ends(10) == [10]


def test_a_stage_without_a_restart_is_announced() -> None:
    said = " ".join(staged(schedule="sgdr", cycle_epochs=None).notes(PER_EPOCH))
    assert "is one SGDR cycle without a restart" in said
    assert "restart" not in " ".join(staged(schedule="sgdr", cycle_epochs=1.0).notes(PER_EPOCH))


@given(st.integers(1, 12), st.integers(1, 9), st.floats(0.01, 6), st.integers(1, 3))
def test_the_announcement_agrees_with_the_learning_rate(epochs: int, per_epoch: int, cycle: float, mult: int) -> None:
    """Uncut: the step after the last would restart at the peak."""
    stage = staged(schedule="sgdr", epochs=epochs, cycle_epochs=cycle, cycle_mult=mult)
    restarts = stage.factor(per_epoch)(stage.steps(per_epoch)) == 1.0
    assert (stage.cut_cycle(per_epoch) is None) == restarts


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("head", "head"),
        ("all", "all"),
        ("3", 3),
        ("'3'", 3),
        ("40%", 0.4),
        ("100%", 1.0),
        ("0.25", 0.25),
        ("1e-1", 0.1),
        ("12.5%", 0.125),
    ],
)
def test_open_is_read(written: str, expected: str | int | float) -> None:
    (stage,) = read(f"- {{open: {written}}}")
    check_stage(stage)
    assert stage.open == expected
    assert type(stage.open) is type(expected)


@pytest.mark.parametrize(
    "written", ["bad", "0", "-1", "0.0", "1.5", "150%", "'%'", "x%", ".nan", "true", "null", "[1]", "{a: 1}", "''"]
)
def test_open_is_refused(written: str) -> None:
    (stage,) = read(f"- {{open: {written}}}")
    with pytest.raises(
        UserError, match=r"open is .*give head, all, norms, norms-biases, a number of layers from 1, or a"
    ):
        check_stage(stage)


def test_a_stage_takes_what_it_leaves_out_from_the_flags() -> None:
    base = staged(lr=0.02, batch_size=48, cache_features=True)
    first, second = read("- {open: head, lr: 1e-3}\n- {open: 50%, epochs: 2, name: upper, batch-size: 16}", base)
    assert (first.name, first.lr, first.batch_size, first.epochs) == ("head", 1e-3, 48, BASE.epochs)
    assert (second.name, second.lr, second.batch_size, second.epochs) == ("upper", 0.02, 16, 2)
    assert not first.cache_features, "a list of stages says for each whether its features are cached"


@pytest.mark.parametrize(
    ("base", "entry", "expected"),
    [
        ({"lr_ratio": 0.1}, "layer_decay: 0.8", (0.8, None)),
        ({"lr_ratio": None, "layer_decay": 0.7}, "lr_ratio: 0.2", (None, 0.2)),
        ({"lr_ratio": None, "layer_decay": 0.7}, "epochs: 2", (0.7, None)),
        ({"lr_ratio": 0.1}, "epochs: 2", (None, 0.1)),
    ],
)
def test_a_stages_own_decay_replaces_the_other_kind(base: dict[str, Any], entry: str, expected: Any) -> None:
    (stage,) = read(f"- {{open: all, {entry}}}", staged(**base))
    check_stage(stage)
    assert (stage.layer_decay, stage.lr_ratio) == expected


def test_both_kinds_of_decay_in_a_stage_are_refused() -> None:
    (stage,) = read("- {open: all, layer_decay: 0.8, lr_ratio: 0.1}")
    with pytest.raises(UserError, match=r"--layer-decay 0\.8 and --lr-ratio 0\.1 exclude each other"):
        check_stage(stage)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- {open: all, epoch: 3}", ["stage 1", "unknown key 'epoch'", "Perhaps you meant 'epochs'"]),
        ("- {open: head}\n- {open: all, lr: fast}", ["stage 2, lr", "'fast' is not a number"]),
        ("- {open: all, schedule: cosin}", ["Perhaps you meant 'cosine'"]),
        ("- {open: all, epochs: .inf}", ["stage 1, epochs", "whole number"]),
        ("- {epochs: 3}", ["stage 1", "open: head"]),
        ("[]", ["must be a list of stages"]),
        ("{open: all}", ["must be a list of stages"]),
        ("- all", ["must be a list of stages"]),
    ],
)
def test_malformed_lists_are_refused(text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        read(text)
    assert all(word in str(caught.value) for word in ["preset.yaml", *words]), caught.value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("lr", v) for v in (0.0, -1e-3, float("nan"), float("inf"))),
        *(("epochs", v) for v in (0, -1)),
        ("batch_size", 0),
        ("image_size", 4),
        *(("weight_decay", v) for v in (-0.1, float("nan"), float("inf"))),
        *(("momentum", v) for v in (1.0, -0.1, float("nan"))),
        *(("lr_floor", v) for v in (1.0, -0.1, float("nan"))),
        *(("warmup_epochs", v) for v in (10.0, -1.0, float("nan"), float("inf"))),
        *((key, v) for key in ("cycle_epochs", "step_epochs") for v in (0.0, -1.0, float("nan"), float("inf"))),
        ("cycle_mult", 0),
        *((key, v) for key in ("cycle_decay", "step_gamma", "lr_ratio") for v in (0.0, 1.1, float("nan"))),
        ("layer_decay", 0.0),
        ("layer_decay", 1.5),
    ],
)
def test_impossible_values_are_refused(key: str, value: float) -> None:
    with pytest.raises(UserError) as caught:
        check_stage(staged(**{key: value}))
    assert f"stage 'all': --{key.replace('_', '-')} is {value!r}; give" in str(caught.value)


def test_cached_features_need_closed_layers() -> None:
    for depth in ("head", 2, 0.5):
        check_stage(staged(open=depth, cache_features=True))
    for depth in ("all", "norms"):
        with pytest.raises(UserError, match=f"cache_features needs closed layers .* but open is '{depth}'"):
            check_stage(staged(open=depth, cache_features=True))


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (1, [1]),
        (2, [1, 1]),
        (3, [1, 1, 1]),
        (4, [1, 1, 1, 1]),
        (5, [1, 1, 1, 2]),
        (6, [1, 2, 1, 2]),
        (7, [1, 2, 2, 2]),
        (8, [2, 2, 2, 2]),
        (9, [2, 2, 2, 3]),
    ],
)
def test_gradual_unfreezing_shares_the_epochs_out(epochs: int, expected: list[int]) -> None:
    head, *rest = standard_stages(staged(epochs=epochs), 2, 5e-3, "gradual")
    assert (head.open, head.epochs, head.lr) == ("head", 2, 5e-3)
    assert [stage.epochs for stage in rest] == expected
    parts = len(expected)
    assert [stage.open for stage in rest] == [*((n + 1) / parts for n in range(parts - 1)), "all"]
    assert len({stage.name for stage in rest}) == parts
    for stage in rest:
        check_stage(stage)


def test_standard_stages_at_once() -> None:
    head, rest = standard_stages(staged(cache_features=True), 3, 1e-3, "all")
    assert (head.open, head.epochs, head.cache_features) == ("head", 3, True)
    assert (rest.open, rest.epochs, rest.lr, rest.cache_features) == ("all", BASE.epochs, BASE.lr, False)
    assert [s.open for s in standard_stages(staged(epochs=0), 3, 1e-3, "gradual")] == ["head"]
    assert [s.open for s in standard_stages(BASE, 0, 1e-3, "all")] == ["all"]
    with pytest.raises(UserError, match=r"--freeze-epochs 0 and --epochs 0 leave nothing to train"):
        standard_stages(staged(epochs=0), 0, 1e-3, "all")


def test_learning_rates_are_scaled_once_for_the_batch_of_each_stage(tmp_path: Path) -> None:
    preset = tmp_path / "p.yaml"
    preset.write_text(
        "lr_scaling: linear\nlr_batch: 32\n"
        "stages:\n- {open: head, lr: 1e-3, batch_size: 64}\n- {open: all, lr: 1e-4, batch_size: 16}\n"
    )
    command = parse_command(["--preset", str(preset)], "test", "", tmp_path)
    assert [stage.lr for stage in command.stages] == pytest.approx([2e-3, 5e-5])
    command = parse_command(["--preset", str(preset), "--lr-scaling", "sqrt"], "test", "", tmp_path)
    assert [stage.lr for stage in command.stages] == pytest.approx([1e-3 * 2**0.5, 1e-4 * 0.5**0.5])


def test_a_stage_may_mix_otherwise_and_cached_features_are_not_mixed() -> None:
    flags = Flags(regularisation=RegularisationFlags(mixup=0.2), staging=StageFlags(cache_features=True))
    head, rest = resolve_stages(flags)
    assert (head.cache_features, head.mixes, rest.mixes) == (True, False, True)
    first, second, third = read("[{open: all}, {open: all, mixup: 0}, {open: all, mixup: 0, cutmix: 1}]", rest)
    assert (first.mixup, first.mixes) == (0.2, True)
    assert not second.mixes
    assert (third.mixes, third.mixup, third.cutmix) == (True, 0.0, 1.0)
    with pytest.raises(UserError, match=r"--cutmix is -1\.0; give 0 for off"):
        check_stage(staged(cutmix=-1.0))
