"""What an optimizer is given where the user gives nothing, and the warm-up where a stage names another one."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import yaml
from timm.optim._optim_factory import get_optimizer_class, list_optimizers

from tuning.cli.command_line import Command, parse_command
from tuning.cli.optimizer_defaults import OWN, UNDECAYED, defaults_of, takes_momentum
from tuning.errors import UserError
from tuning.optimizers import check_optimizer

ROOT = Path(__file__).parents[2]
PHOTOS = ("--data", "photos")


def parse(*argv: str) -> Command:
    return parse_command(argv, "recipes/finetune.py", "", ROOT / "recipes" / "presets")


def rates(command: Command) -> list[tuple[float, float, float]]:
    return [(stage.lr, stage.weight_decay, stage.warmup_epochs) for stage in command.stages]


def with_stages(folder: Path, text: str, *argv: str) -> Command:
    (folder / "p.yaml").write_text(text)
    return parse(*PHOTOS, "--preset", str(folder / "p.yaml"), *argv)


@pytest.mark.parametrize(
    ("optimizer", "head", "whole", "decay"),
    [
        ("adamw", 1e-3, 3e-4, 0.05),
        ("AdamW", 1e-3, 3e-4, 0.05),
        ("sgd", 0.1, 1e-2, 1e-4),
        ("csgdw", 0.1, 1e-2, 1e-4),
        ("lion", 1e-4, 3e-5, 0.5),
        ("nlars", 3.0, 1.0, 1e-4),
        ("lambw", 3e-3, 1e-3, 0.02),
        ("adanw", 1e-3, 3e-4, 0.02),
        ("muon", 1e-3, 3e-4, 0.05),
        ("adam", 1e-3, 3e-4, 0.0),
        ("rmsproptf", 1e-3, 3e-4, 1e-5),
        ("adadelta", 1.0, 1.0, 0.0),
    ],
)
def test_the_defaults_follow_the_optimizer(optimizer: str, head: float, whole: float, decay: float) -> None:
    command = parse(*PHOTOS, "--optimizer", optimizer)
    assert rates(command) == [(head, decay, 0.0), (whole, decay, 0.0)]
    config = yaml.safe_load(command.config)
    assert [config[key] for key in ("lr", "freeze_lr", "weight_decay", "warmup_epochs")] == [whole, head, decay, 0.0]
    assert command.flags.optimisation.lr == whole


def test_what_is_typed_wins() -> None:
    command = parse(*PHOTOS, "--optimizer", "sgd", "--lr", "3e-4", "--weight-decay", "0", "--freeze-lr", "1e-3")
    assert rates(command) == [(1e-3, 0.0, 0.0), (3e-4, 0.0, 0.0)]


def test_the_demo_is_what_it_was() -> None:
    command = parse()
    assert [(s.optimizer, s.lr, s.weight_decay, s.warmup_epochs) for s in command.stages] == [
        ("adamw", 5e-5, 0.05, 0.1)
    ]
    assert command.flags.optimisation.lr == 3e-4
    assert "lr" in yaml.safe_load(command.config)["stages"][0]


TWO = "stages: [{open: head, epochs: 2}, {name: last, open: all, epochs: 4, optimizer: %s}]\n"


def test_a_stage_with_another_optimizer_gets_its_defaults_and_a_warm_up(tmp_path: Path) -> None:
    command = with_stages(tmp_path, TWO % "sgd")
    assert rates(command) == [(3e-4, 0.05, 0.0), (1e-2, 1e-4, 0.4)]
    assert [stage.new_optimizer for stage in command.stages] == [False, True]
    (tmp_path / "config.yaml").write_text(command.config)
    again = parse("--config", str(tmp_path / "config.yaml"))
    assert again.stages == command.stages
    assert again.config == command.config


def test_what_is_typed_wins_in_such_a_stage_too(tmp_path: Path) -> None:
    typed = with_stages(tmp_path, TWO % "sgd", "--lr", "0.5", "--weight-decay", "0.25", "--warmup-epochs", "0")
    assert rates(typed) == [(0.5, 0.25, 0.0)] * 2
    in_file = with_stages(tmp_path, "lr: 0.5\n" + TWO % "sgd")
    assert rates(in_file) == [(0.5, 0.05, 0.0), (0.5, 1e-4, 0.4)]
    own = "{open: all, epochs: 4, optimizer: lion, lr: 7e-5, weight-decay: 0, warmup-epochs: 0}"
    assert rates(with_stages(tmp_path, f"stages: [{{open: all, epochs: 1}}, {own}]"))[1] == (7e-5, 0.0, 0.0)


@pytest.mark.parametrize("schedule", ["one-cycle", "triangular"])
def test_a_schedule_that_starts_low_gets_no_warm_up(tmp_path: Path, schedule: str) -> None:
    command = with_stages(tmp_path, (TWO % "sgd").replace("epochs: 4", f"epochs: 4, schedule: {schedule}"))
    assert rates(command)[1] == (1e-2, 1e-4, 0.0)
    assert "starts a new optimizer, sgd, without a warm-up" in next(command.stages[1].notes(7))


def test_the_same_optimizer_in_other_letters_is_no_change(tmp_path: Path) -> None:
    command = with_stages(tmp_path, TWO % "AdamW")
    assert rates(command)[1] == (3e-4, 0.05, 0.0)
    assert not command.stages[1].new_optimizer
    assert command.stages[1].keeps_optimizer_of(command.stages[0]), "its state goes on"


@pytest.mark.parametrize("change", ["weight_decay: 0.1", "momentum: 0.5"])
def test_an_optimizer_that_must_start_anew_for_another_reason_is_said(tmp_path: Path, change: str) -> None:
    command = with_stages(tmp_path, TWO % f"adamw, {change}")
    assert [stage.new_optimizer for stage in command.stages] == [False, True]
    assert "starts a new optimizer, adamw, without a warm-up" in next(command.stages[1].notes(7))


@pytest.mark.parametrize(("per_epoch", "steps"), [(1, 1), (5, 2), (100, 40)])
def test_the_learning_rate_rises_in_a_straight_line(tmp_path: Path, per_epoch: int, steps: int) -> None:
    """By hand: (n + 1) / (steps + 1) of the peak; at least one step, however short the epochs."""
    stage = with_stages(tmp_path, (TWO % "sgd").replace("sgd", "sgd, schedule: constant")).stages[1]
    factor = stage.factor(per_epoch)
    expected = [(n + 1) / (steps + 1) for n in range(steps)] + [1.0] * 2
    assert [factor(n) for n in range(steps + 2)] == pytest.approx(expected, abs=1e-12)
    said = next(stage.notes(per_epoch))
    assert said == f"stage 'last' starts a new optimizer, sgd, its learning rate rises over {steps} steps"


def test_a_long_stage_warms_up_for_one_epoch(tmp_path: Path) -> None:
    assert rates(with_stages(tmp_path, (TWO % "sgd").replace("epochs: 4", "epochs: 40")))[1][2] == 1.0


def test_second_derivatives_are_refused() -> None:
    with pytest.raises(UserError, match="--optimizer AdaHessian needs second derivatives"):
        check_optimizer("AdaHessian")


def test_names_in_the_tables_are_timms() -> None:
    names = [str(name) for name in list_optimizers()]
    assert set(UNDECAYED) <= set(names)
    assert all(any(word in name for name in names) for word in OWN)


def test_a_momentum_reaches_those_that_take_one() -> None:
    for name in map(str, list_optimizers()):
        try:
            kind = get_optimizer_class(name, bind_defaults=False)
        except (AssertionError, ImportError):  # its package or a GPU is missing
            continue
        assert takes_momentum(name) == ("momentum" in inspect.signature(kind).parameters), name


def test_the_page_names_every_optimizer_with_its_defaults() -> None:
    """One row a group: names, learning rates, weight decay."""
    page = (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    told = {name.strip(" `"): row for row in rows for name in row[0].split(",")}
    assert set(told) == {str(name) for name in list_optimizers()}
    for name, row in told.items():
        found = defaults_of(name)
        assert [float(cell) for cell in row[1:4]] == [found.head_lr, found.lr, found.weight_decay], name
