"""Recipes that open a run: the data of that run unless another is typed, and no flag without effect."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuning.cli.command_line import Command, parse_command
from tuning.cli.run_defaults import run_of
from tuning.errors import UserError

PRESETS = Path(__file__).parents[2] / "recipes" / "presets"


def parse(*argv: str, recipe: str = "recipes/evaluate.py") -> Command:
    return parse_command(argv, recipe, "", PRESETS)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name in ("model", "checkpoints/step-00000001", "photos", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(
        f"data: {tmp_path}/photos\nval_fraction: 0.4\nlimit_eval: 9\nseed: 3\nlr: 0.5\nimage_size: 64\n"
    )
    return tmp_path


def test_the_run_of_a_folder(run: Path) -> None:
    for name in (".", "model", "checkpoints/step-00000001"):
        assert run_of(run / name) == run
    assert run_of(run / "elsewhere") is None
    assert run_of(run / "nowhere") is None


@pytest.mark.parametrize("part", ["", "model", "checkpoints/step-00000001"])
def test_the_data_of_the_run_is_the_default(run: Path, part: str) -> None:
    flags = parse("--run", str(run / part)).flags
    assert (flags.data.data, flags.data.val_fraction, flags.data.limit_eval) == (f"{run}/photos", 0.4, 9)
    assert (flags.run.seed, flags.optimisation.lr, flags.model.image_size) == (3, 3e-4, None)
    flags = parse("--run", str(run / part), "--limit-eval", "5", "--eval-split", "test").flags
    assert (flags.data.val_fraction, flags.data.limit_eval, flags.data.eval_split) == (0.4, 5, "test")


def test_other_data_comes_with_nothing_of_the_run(run: Path) -> None:
    flags = parse("--run", str(run), "--data", "others").flags
    assert (flags.data.data, flags.data.val_fraction, flags.data.limit_eval, flags.run.seed) == (
        "others",
        0.25,
        None,
        0,
    )


def test_the_same_data_by_another_path_is_the_data_of_the_run(run: Path) -> None:
    flags = parse("--run", str(run), "--data", f"{run}/model/../photos").flags
    assert (flags.data.data, flags.data.val_fraction) == (f"{run}/model/../photos", 0.4)


def test_a_damaged_run_is_refused(run: Path) -> None:
    (run / "config.yaml").write_text("[")
    with pytest.raises(UserError, match=r"config\.yaml can't be read as YAML"):
        parse("--run", str(run))
    (run / "config.yaml").write_text("seed: many\n")
    with pytest.raises(UserError, match=r"config\.yaml, seed: 'many' is not a whole number"):
        parse("--run", str(run))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--run", "RUN", "--lr", "1e-3"), "--lr 0.001 has no effect in recipes/evaluate.py"),
        (("--run", "RUN", "--seed", "4"), "--seed 4 has no effect"),  # it would move the split
        (("--run", "RUN", "--val-fraction", "0.5"), "--val-fraction 0.5 has no effect"),
        (("--run", "RUN", "--images", "x"), "--images x has no effect"),
        (("--run", "RUN", "--model", "test_vit"), "Give one of the two"),
        (("--run", "RUN", "--weights", "w.pth"), "Give one of the two"),
        (("--run", "RUN", "--calibrate", "--tta", "flip"), "leave --tta flip out"),
        (("--run", "RUN", "--calibrate", "--ensemble", "b"), "leave --ensemble out"),
        (("--run", "RUN", "--ensemble", "b", "b"), "the same model twice"),
        (("--run", "RUN", "--ensemble", "RUN"), "the same model twice"),
        (("--model", "test_vit", "--calibrate"), "--calibrate needs --run"),
        (("--model", "test_vit", "--ensemble", "b"), "--ensemble needs --run"),
        (("--run", "RUN", "--bootstrap", "-1"), "--bootstrap is -1; give a whole number from 0"),
        ((), "Give what is to be judged"),
    ],
)
def test_what_has_no_effect_or_no_sense_is_refused(run: Path, argv: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(*(str(run) if word == "RUN" else word for word in argv))
    assert words in str(caught.value)


def test_recipes_that_train_take_no_run(run: Path) -> None:
    with pytest.raises(UserError, match=r"is for recipes/evaluate\.py and recipes/predict\.py and recipes/export\.py"):
        parse("--run", str(run), "--data", "photos", recipe="recipes/finetune.py")
    with pytest.raises(UserError, match=r"--tta flip has no effect in recipes/predict\.py"):
        parse("--run", str(run), "--tta", "flip", recipe="recipes/predict.py")
    with pytest.raises(UserError, match="--top-k is 0; give a whole number from 1"):
        parse("--images", "x", "--top-k", "0", recipe="recipes/predict.py")
