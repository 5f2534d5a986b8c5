"""What follows from the data where no flag says it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tuning.cli.command_line import Command, parse_command
from tuning.cli.derived import FEWEST_STEPS, with_fitting_batch
from tuning.errors import UserError
from tuning.sizes import plan_batch

PRESETS = Path(__file__).parents[2] / "recipes" / "presets"


def parse(*argv: str) -> Command:
    return parse_command(("--data", "photos", *argv), "test", "", PRESETS)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("images", [3, 7, 12, 31, 63])
def test_few_images_get_a_batch_that_they_fill(images: int, processes: int) -> None:
    command, reason = with_fitting_batch(parse(), images, processes)
    batch = plan_batch(command.flags.batch.batch_size, "auto", processes, images)  # not refused
    assert batch.steps_per_epoch(images) >= min(FEWEST_STEPS, images // processes)
    assert 2 * batch.batch_size > images / FEWEST_STEPS - processes  # no smaller than that
    assert f"--batch-size {batch.batch_size}:" in reason
    assert f"{images} training images" in reason


@pytest.mark.parametrize("images", [64, 65, 1000])
def test_images_that_fill_a_batch_change_nothing(images: int) -> None:
    command = parse()
    assert with_fitting_batch(command, images, 1) == (command, "")


def test_the_stages_and_the_config_say_the_same() -> None:
    command, _ = with_fitting_batch(parse("--lr-scaling", "linear", "--lr", "1e-3", "--lr-batch", "64"), 40, 1)
    assert command.flags.batch.batch_size == 8 == yaml.safe_load(command.config)["batch_size"]
    assert {stage.batch_size for stage in command.stages} == {8}
    assert command.stages[-1].lr == pytest.approx(1e-3 / 8)


def test_what_was_typed_stays_and_is_refused() -> None:
    command, reason = with_fitting_batch(parse("--batch-size", "50"), 40, 1)
    assert (command.flags.batch.batch_size, reason) == (50, "")
    with pytest.raises(UserError, match="--batch-size 50 is larger than the training data"):
        plan_batch(50, "auto", 1, 40)


def test_the_batch_of_a_preset_gives_way_too_and_its_stages_follow() -> None:
    command, _ = with_fitting_batch(parse("--preset", "tiny-data"), 9, 1)
    assert command.flags.batch.batch_size == 2
    command, _ = with_fitting_batch(parse("--preset", "lp-ft"), 40, 1)
    assert {stage.batch_size for stage in command.stages} == {8}
