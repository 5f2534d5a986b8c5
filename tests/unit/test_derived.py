"""What follows from the data and the model where no flag says it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tuning.cli.command_line import Command, parse_command
from tuning.cli.derived import FEWEST_STEPS, MOST_TO_FIT, SMALLEST, derived
from tuning.errors import UserError
from tuning.sizes import plan_batch

PRESETS = Path(__file__).parents[2] / "recipes" / "presets"


def parse(*argv: str) -> Command:
    return parse_command(("--data", "photos", *argv), "test", "", PRESETS)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("images", [3, 7, 12, 31, 63, 64, 199, 450, 639])
def test_few_images_get_a_batch_of_several_steps_an_epoch(images: int, processes: int) -> None:
    command, reasons = derived(parse(), images, processes, fits=False)
    batch = plan_batch(command.flags.batch.batch_size, "auto", processes, images)  # not refused
    steps = batch.steps_per_epoch(images)
    assert steps >= FEWEST_STEPS or batch.batch_size <= max(SMALLEST, processes)
    assert steps <= 2 * FEWEST_STEPS * processes
    assert reasons == (
        f"--batch-size {batch.batch_size}: {steps} optimizer steps an epoch of {images} training images.",
    )


@pytest.mark.parametrize("images", [640, 10**6])
def test_many_images_change_nothing(images: int) -> None:
    command = parse()
    assert derived(command, images, 1, fits=False) == (command, ())


def test_a_micro_batch_that_was_typed_divides_it() -> None:
    command, _ = derived(parse("--micro-batch", "12"), 200, 2, fits=False)
    assert command.flags.batch.batch_size == 24
    command, reasons = derived(parse("--micro-batch", "32"), 200, 2, fits=False)
    assert (command.flags.batch.batch_size, reasons) == (64, ())


def test_the_stages_and_the_config_say_the_same() -> None:
    asked = parse("--lr-scaling", "linear", "--lr", "1e-3", "--lr-batch", "64", "--freeze-epochs", "2")
    command, _ = derived(asked, 85, 1, fits=True)
    assert command.flags.batch.batch_size == 8 == yaml.safe_load(command.config)["batch_size"]
    assert {stage.batch_size for stage in command.stages} == {8}
    assert command.stages[-1].lr == pytest.approx(1e-3 / 8)


def test_a_batch_that_was_typed_stays_and_is_refused_where_it_is_too_large() -> None:
    command, reasons = derived(parse("--batch-size", "50"), 40, 1, fits=False)
    assert (command.flags.batch.batch_size, reasons) == (50, ())
    with pytest.raises(UserError, match="--batch-size 50 is larger than the training data"):
        plan_batch(50, "auto", 1, 40)


def test_the_batch_of_a_preset_gives_way_only_where_it_does_not_fit() -> None:
    assert derived(parse("--preset", "tiny-data"), 20, 1, fits=True)[1] == ()
    command, _ = derived(parse("--preset", "tiny-data"), 9, 1, fits=True)
    assert command.flags.batch.batch_size == 8
    command, _ = derived(parse("--preset", "lp-ft"), 40, 1, fits=True)
    assert {stage.batch_size for stage in command.stages} == {8}


@pytest.mark.parametrize("typed", [(), ("--head-init", "fitted")], ids=" ".join)
def test_a_pretrained_head_begins_fitted_without_epochs_of_its_own(typed: tuple[str, ...]) -> None:
    command, (reason,) = derived(parse(*typed), 1000, 1, fits=True)
    assert [(stage.open, stage.epochs) for stage in command.stages] == [("all", 10)]
    assert command.flags.model.head_init == "fitted"
    config = yaml.safe_load(command.config)
    assert (config["head_init"], config["freeze_epochs"]) == ("fitted", 0)
    assert reason.startswith("--head-init fitted --freeze-epochs 0: ")


@pytest.mark.parametrize(
    "flags",
    [
        ("--head-init", "default"),
        ("--freeze-epochs", "3"),
        ("--freeze-epochs=3",),
        ("--freeze-lr", "1e-3"),
        ("--cache-features",),
        ("--epochs", "0"),
        ("--lr", "auto"),
        ("--preset", "vit"),
    ],
    ids=" ".join,
)
def test_what_says_how_the_head_begins_stays(flags: tuple[str, ...]) -> None:
    command = parse(*flags)
    assert derived(command, 1000, 1, fits=True) == (command, ())


def test_a_head_that_can_not_be_fitted_and_too_many_images_begin_with_the_head_alone() -> None:
    command = parse()
    assert derived(command, 1000, 1, fits=False) == (command, ())
    assert derived(command, MOST_TO_FIT + 1, 1, fits=True) == (command, ())


def test_a_config_repeats_what_was_derived(tmp_path: Path) -> None:
    first, _ = derived(parse(), 100, 1, fits=True)
    (tmp_path / "config.yaml").write_text(first.config)
    again = parse("--config", str(tmp_path / "config.yaml"))
    assert derived(again, 100, 1, fits=True) == (again, ())
    assert again.stages == first.stages
