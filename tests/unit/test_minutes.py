"""How much of a run fits into its minutes, and how a command takes the answer in."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuning.cli.command_line import Command, parse_command
from tuning.cli.lengths import Lengths, lengths_in, with_lengths
from tuning.errors import UserError
from tuning.minutes import (
    ENOUGH_EPOCHS,
    MOST_EPOCHS,
    Costs,
    epochs_that_fit,
    images_that_fit,
    size_that_fits,
    smaller_sizes,
)

PRESETS = Path(__file__).parents[2] / "recipes/presets"
PLAIN = Costs(trained=(0.01,), passes=(0,), looked=0.002, fitted=0.0, judged=500, before=10.0, after=5.0)
FITTED = Costs(trained=(0.01,), passes=(0,), looked=0.002, fitted=0.001, judged=500, before=10.0, after=5.0)

SHORTER = "--freeze-epochs 1 --epochs 6 --limit-train 40 --unfreeze gradual"


def parsed(*argv: str) -> Command:
    return parse_command(argv, "recipes/finetune.py", "", PRESETS)


def test_the_seconds_of_a_run() -> None:
    assert PLAIN.seconds([3], 1000) == pytest.approx(10 + 3 * (10 + 1) + 1 + 5)
    saving = dataclasses.replace(PLAIN, saved=0.5)
    assert saving.seconds([3], 1000) == pytest.approx(PLAIN.seconds([3], 1000) + 3 * 0.5)
    assert FITTED.seconds([3], 1000) == pytest.approx(10 + (2 + 1 + 1) + 3 * (10 + 1) + 1 + 5), "features, fit, a look"
    cached = Costs((0.0, 0.01), (2, 0), 0.002, 0.0, 500, 10.0, 5.0)
    assert cached.seconds([50, 3], 1000) == pytest.approx(10 + (2 * 2 + 1) + 3 * (10 + 1) + 1 + 5), (
        "epochs cost nothing"
    )
    part = dataclasses.replace(FITTED, passes=(1,), judging=(0.0005,), sets=2)
    fit, epochs = 1000 * (0.0005 + 0.001) + 500 * 0.0005, 3 * (10 + 500 * 0.0005)
    assert part.seconds([3], 1000) == pytest.approx(10 + (2 + 250 * 0.002) + fit + epochs + 0.5 + 5)
    views = dataclasses.replace(part, passes=(2,))
    assert views.seconds([3], 1000) - part.seconds([3], 1000) == pytest.approx(2 + 1000 * (0.002 - 0.0005))


@pytest.mark.parametrize(
    ("seconds", "epochs"), [(26.9, 1), (27, 1), (37.9, 1), (38.01, 2), (60.01, 4), (10_000, MOST_EPOCHS)]
)
def test_as_many_epochs_as_fit(seconds: float, epochs: int) -> None:
    assert epochs_that_fit([10], PLAIN, 1000, seconds) == [epochs]


def test_stages_keep_their_proportions_and_cached_ones_their_epochs() -> None:
    costs = Costs((0.001, 0.01), (0, 0), 0.0, 0.0, 0, 0.0, 0.0)
    assert epochs_that_fit([3, 10], costs, 1000, 3 + 100.01) == [3, 10]
    assert epochs_that_fit([3, 10], costs, 1000, 6 + 200.01) == [6, 20]
    assert epochs_that_fit([3, 10], costs, 1000, 12) == [1, 1]
    cached = Costs((0.0, 0.01), (1, 0), 0.0, 0.0, 0, 0.0, 0.0)
    assert epochs_that_fit([50, 10], cached, 1000, 40.01) == [50, 4]
    assert epochs_that_fit([90], PLAIN, 1000, 100_000) == [90], "what was asked for is no limit"


def test_less_than_an_epoch_is_fewer_images() -> None:
    assert images_that_fit([1], PLAIN, 1000, 17 + 5.005) == 500
    assert images_that_fit([1], PLAIN, 1000, 5.0) == 0
    assert images_that_fit([1], PLAIN, 1000, 1000.0) == 1000


@pytest.mark.parametrize(
    ("own", "stride", "sizes"),
    [(224, 32, (128, 160, 192, 224)), (256, 32, (160, 192, 224, 256)), (64, 32, (64,)), (56, 14, (42, 56))],
)
def test_sizes_to_choose_from_are_multiples_of_the_stride(own: int, stride: int, sizes: tuple[int, ...]) -> None:
    assert smaller_sizes(own, stride) == sizes


def test_the_largest_size_at_which_enough_epochs_fit() -> None:
    sizes = (128, 160, 192, 224)

    def needed(size: int) -> float:
        times = (size / 128) ** 2
        costs = dataclasses.replace(PLAIN, trained=(0.01 * times,), looked=0.002 * times)
        return costs.seconds([ENOUGH_EPOCHS], 1000)

    for size, smaller in zip(sizes[1:], sizes[:-1], strict=True):
        assert size_that_fits(sizes, PLAIN, 1000, needed(size) + 0.01) == size
        assert size_that_fits(sizes, PLAIN, 1000, needed(size) - 0.01) == smaller
    assert size_that_fits(sizes, PLAIN, 1000, 1.0) == 128, "none fits: the cheapest"
    assert size_that_fits((224,), PLAIN, 1000, 1e9) == 224


@given(
    outline=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    each=st.floats(1e-4, 0.1),
    images=st.integers(1, 5000),
    seconds=st.floats(1, 5000),
)
def test_what_fits_fits_and_one_more_does_not(outline: list[int], each: float, images: int, seconds: float) -> None:
    stages = len(outline)
    costs = Costs((each,) * stages, (0,) * stages, 0.001, 0.0, 300, 1.0, 1.0)
    epochs = epochs_that_fit(outline, costs, images, seconds)
    assert min(epochs) >= 1
    if epochs != [1] * stages:
        assert costs.seconds(epochs, images) <= seconds
    if sum(epochs) < max(MOST_EPOCHS, sum(outline)):
        cheapest = min(costs.seconds([n + (i == at) for i, n in enumerate(epochs)], images) for at in range(stages))
        assert cheapest > seconds
    if costs.seconds(epochs, images) > seconds:
        kept = images_that_fit(epochs, costs, images, seconds)
        assert kept == 0 or costs.seconds(epochs, kept) <= seconds * (1 + 1e-9)


def test_lengths_go_into_the_command_and_come_back_from_its_config() -> None:
    import yaml

    asked = parsed("--data", "photos", "--freeze-epochs", "2", "--epochs", "9", "--unfreeze", "gradual")
    lengths = Lengths.of(asked, [1, 1, 1, 2, 2], limit_train=40)
    assert {name: lengths.flags[name] for name in ("freeze_epochs", "epochs", "limit_train")} == {
        "freeze_epochs": 1,
        "epochs": 6,
        "limit_train": 40,
    }
    longer = with_lengths(asked, lengths)
    typed = parsed("--data", "photos", *SHORTER.split())
    assert (longer.flags, longer.stages, longer.config) == (typed.flags, typed.stages, typed.config)
    assert lengths_in(yaml.safe_load(longer.config), asked) == lengths


def test_lengths_of_listed_stages() -> None:
    import yaml

    asked = parsed("--preset", "progressive-resize", "--data", "photos")
    longer = with_lengths(asked, Lengths.of(asked, [2, 1, 5]))
    assert [stage.epochs for stage in longer.stages] == [2, 1, 5]
    assert [stage.lr for stage in longer.stages] == [stage.lr for stage in asked.stages]
    assert lengths_in(yaml.safe_load(longer.config), asked).listed == (2, 1, 5)
    assert lengths_in({"epochs": 3}, asked).listed == tuple(stage.epochs for stage in asked.stages), "of another run"


@pytest.mark.parametrize("part", [{"open": 0.5}, {"open": 0.5, "cache_features": True, "lr": 4e-4}])
def test_a_size_and_a_depth_go_into_the_command_and_come_back_from_its_config(part: dict[str, Any]) -> None:
    import yaml

    asked = parsed("--data", "photos", "--max-minutes", "2")
    lengths = dataclasses.replace(Lengths.of(asked, [2], image_size=160, augment="light"), part=part)
    chosen = with_lengths(asked, lengths)
    assert [(stage.open, stage.epochs, stage.augment, stage.lr) for stage in chosen.stages] == [
        (0.5, 2, "light", part.get("lr", asked.stages[0].lr))
    ]
    assert chosen.stages[0].cache_features == ("cache_features" in part)
    assert chosen.flags.model.image_size == 160
    assert lengths_in(yaml.safe_load(chosen.config), asked) == lengths
    assert with_lengths(asked, lengths_in(yaml.safe_load(chosen.config), asked)).config == chosen.config


def test_a_rate_that_is_typed_stays_in_a_run_that_goes_on() -> None:
    config = {"epochs": 5, "stages": [{"open": 0.5, "cache_features": True, "lr": 4e-4, "epochs": 5}]}
    for typed, part in (((), {"lr": 4e-4}), (("--lr", "1e-3"), {})):
        asked = parsed("--data", "photos", "--max-minutes", "2", *typed)
        assert lengths_in(config, asked).part == {"open": 0.5, "cache_features": True} | part


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ((), {"image_size": 160, "augment": "light", "flip": "horizontal"}),
        (("--image-size", "192"), {"image_size": 192, "augment": "light", "flip": "horizontal"}),
        (("--augment", "strong"), {"image_size": 160, "augment": "strong", "flip": "none"}),
        (("--augment", "none"), {"image_size": 160, "augment": "none", "flip": "none"}),
        (("--preset", "progressive-resize"), {"augment": "light", "flip": "horizontal"}),
    ],
)
def test_a_run_that_goes_on_does_not_overrule_what_is_said(typed: tuple[str, ...], kept: dict[str, object]) -> None:
    """Else another --augment would be taken for the run's, and not refused."""
    config = {"epochs": 9, "image_size": 160, "augment": "light", "flip": "horizontal"}
    asked = parsed("--data", "photos", "--max-minutes", "2", *typed)
    found = lengths_in(config, asked).flags
    assert {name: found[name] for name in kept} == kept


def test_which_flags_were_typed() -> None:
    given = parsed("--data=photos", "--max_minutes", "2", "--image-size", "160", "--preset", "quick")
    assert given.typed == {"data", "max_minutes", "image_size", "preset"}


def test_minutes_without_a_preset_take_the_quick_one() -> None:
    plain, quick = (parsed("--data", "photos", *more) for more in ((), ("--preset", "quick")))
    for typed in (("--max-minutes", "2"), ("--max_minutes=2",)):
        chosen = parsed("--data", "photos", *typed)
        assert (chosen.stages, chosen.config) == (quick.stages, quick.config)
        assert chosen.where.endswith("quick.yaml")
        assert parsed("--data", "photos", *typed, "--lr", "1e-4").stages[-1].lr == 1e-4, "the command line wins"
    assert (
        parsed("--data", "photos", "--max-minutes", "2", "--weights", "none").stages
        == parsed("--data", "photos", "--weights", "none").stages
    )
    assert plain.where == ""
    assert parsed("--max-minutes", "2").where.endswith("demo.yaml")
    named = parsed("--data", "photos", "--preset", "progressive-resize", "--max-minutes", "2")
    assert named.where.endswith("progressive-resize.yaml")


def test_the_minutes_are_not_part_of_what_a_run_is() -> None:
    assert "max_minutes" not in parsed("--data", "photos", "--max-minutes", "2").config


@pytest.mark.parametrize("recipe", ["find_lr", "overfit", "check", "sweep", "evaluate"])
def test_other_recipes_have_no_length(recipe: str) -> None:
    with pytest.raises(UserError, match=r"--max-minutes 2\.0 (is for recipes/finetune\.py and )?has no effect in"):
        parse_command(("--data", "photos", "--max-minutes", "2"), f"recipes/{recipe}.py", "", PRESETS)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--max-minutes 0", "minutes above 0"),
        ("--max-minutes nan", "minutes above 0"),
        ("--max-minutes 2 --lr auto", "--lr auto: how long the search takes"),
        ("--max-minutes 2 --max-steps 10", "--max-steps 10 both say when the run ends"),
    ],
)
def test_what_minutes_do_not_go_with(flags: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parsed("--data", "photos", *flags.split())
