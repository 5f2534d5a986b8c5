"""Every file in recipes/presets: its header, its plan for models of several families, and a short run."""

from __future__ import annotations

import json
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import timm
from pictures import write_classes
from recipe_runs import ROOT, Finished, Run, run_in_turn
from safetensors.torch import save_file

from tuning.cli.command_line import Command, parse_command
from tuning.errors import UserError

FOLDER = ROOT / "recipes" / "presets"
PRESETS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
FAMILIES = ("test_resnet", "test_vit", "test_convnext")  # with BatchNorm, a transformer, with LayerNorm
TWO_HEADS = "deit_tiny_distilled_patch16_224"
NO_DROP_PATH = "ghostnet_050"
RECIPE = "recipes/finetune.py"


def parsed(preset: str, *flags: str) -> Command:
    return parse_command(["--data", "photos", "--preset", preset, *flags], RECIPE, "", FOLDER)


def fitted(preset: str) -> bool:
    """Whether it asks for a head that is one linear layer."""
    command = parsed(preset)
    return command.flags.model.head_init == "fitted" or any(stage.cache_features for stage in command.stages)


def drops_paths(preset: str) -> bool:
    return bool(parsed(preset).flags.model.drop_path_rate)


FITTED = [preset for preset in PRESETS if fitted(preset)]
DROPPING = [preset for preset in PRESETS if drops_paths(preset)]


class Plans:
    """Dry runs on a folder of small pictures, with weights that look pretrained."""

    def __init__(self, home: Path) -> None:
        self.home = home
        write_classes(home / "photos/train", {"cat": 280, "dog": 240})  # a batch of 512 must fit
        write_classes(home / "photos/val", {"cat": 5, "dog": 4})
        self.of = cache(self._of)

    def weights(self, model: str) -> str:
        file = self.home / f"{model}.safetensors"
        if not file.exists():
            save_file(timm.create_model(model, num_classes=7).state_dict(), file)
        return str(file)

    def flags(self, preset: str, model: str) -> tuple[str, ...]:
        flags = ("--preset", preset, "--model", model, "--data", "photos", "--dry-run")
        flags += ("--output", f"{model}/{preset}")
        if parsed(preset).flags.model.weights == "none":
            return flags
        return (*flags, "--weights", self.weights(model))

    def _of(self, model: str, presets: tuple[str, ...], *more: str) -> dict[str, Finished]:
        runs = [(*self.flags(preset, model), *more) for preset in presets]
        return dict(zip(presets, run_in_turn(self.home, runs), strict=True))


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Plans:
    return Plans(tmp_path_factory.mktemp("plans"))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("model", FAMILIES)
def test_every_preset_has_a_plan_for_every_family(plans: Plans, model: str, preset: str) -> None:
    done = plans.of(model, tuple(PRESETS))[preset]
    assert done.returncode == 0, done.stderr
    assert "Dry run: nothing was trained." in done.stdout
    _, _, table = done.stdout.partition("\nStages\n")
    rows = re.findall(r"^(\S+) .* (\S+) \.\. (\S+) ", table.partition("\nParameter groups")[0], re.MULTILINE)
    rows = [row for row in rows if row[0] != "stage"]  # the names of the columns
    assert [name for name, _, _ in rows] == [stage.name for stage in parsed(preset).stages]
    assert all(0 < float(stem) <= float(head) <= 1e-2 for _, stem, head in rows)
    assert (plans.home / model / preset / "plots/schedule.png").exists()


@pytest.mark.parametrize("preset", FITTED)
def test_a_head_of_two_classifiers_is_refused_where_it_is_fitted(plans: Plans, preset: str) -> None:
    done = plans.of(TWO_HEADS, tuple(FITTED))[preset]
    assert done.returncode == 2
    assert "head of VisionTransformerDistilled is" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("preset", DROPPING)
def test_drop_path_is_refused_where_the_model_has_none(plans: Plans, preset: str) -> None:
    done = plans.of(NO_DROP_PATH, tuple(DROPPING))[preset]
    assert done.returncode == 2
    assert f"{NO_DROP_PATH} takes no --drop-path-rate (got 0.1): leave it out." in done.stderr


def test_what_the_page_says_to_do_about_it(plans: Plans) -> None:
    done = plans.of(TWO_HEADS, ("vit",), "--head-init", "default")["vit"]
    assert done.returncode == 0, done.stderr
    done = plans.of(NO_DROP_PATH, ("convnext",), "--drop-path-rate", "0")["convnext"]
    assert done.returncode == 0, done.stderr


def test_presets_of_pretrained_weights_are_refused_without() -> None:
    for preset in ("quick", "mobile"):
        with pytest.raises(UserError, match=r"there are no statistics to keep\. Use --batch-norm train"):
            parsed(preset, "--weights", "none")


def test_what_they_mean() -> None:
    """What the page says of them, where flags work together."""
    (probe,) = parsed("linear-probe").stages
    assert (probe.open, probe.cache_features, probe.lr) == ("head", True, 1e-4)
    (large,) = parsed("large-data", "--batch-size", "1024").stages
    assert large.lr == pytest.approx(3e-4 * 2)
    (scratch,) = parsed("scratch").stages
    assert (scratch.lr, scratch.lr_ratio, scratch.batch_norm) == (pytest.approx(2.5e-4), 1, "train")
    assert scratch.erases == 0.25
    (tiny,) = parsed("tiny-data").stages
    assert (tiny.may_end_early, tiny.lr * (tiny.lr_ratio or 0)) == (True, pytest.approx(2e-6))
    (best,) = parsed("best").stages
    assert (best.swa_epochs, parsed("best").flags.run.best_of) == (10, "any")
    assert [stage.open for stage in parsed("cpu").stages] == [0.25]


def header(preset: str) -> dict[str, str]:
    """The parts of the comment that the file begins with: ``# For: ...`` and so on."""
    comment = re.match(r"(?:#.*\n)+", (FOLDER / f"{preset}.yaml").read_text(encoding="utf-8"))
    assert comment, f"{preset} has no header"
    parts = re.split(r"^# (\w+): ", comment[0], flags=re.MULTILINE)
    assert parts[0] == "", f"the header of {preset} begins with a part"
    return {
        name: " ".join(re.sub(r"\n# *", " ", text).split()) for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_headers_say_what_it_is_for_why_how_and_what_it_reached(preset: str) -> None:
    said = header(preset)
    assert list(said) == ["For", "Run", "Why", "Reached"]
    assert len(said["For"].split()) > 5
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|docs/[\w-]+\.md", said["Why"]), "a source"
    unmeasured = said["Reached"].startswith("not measured yet")
    figures = (r"\d\.\d{3}", r"\bseeds?\b", r"\b(CPU|GPU|H\d+)", r"\b20\d\d\b", "docs/|README|--preset")
    assert unmeasured or all(re.search(pattern, said["Reached"]) for pattern in figures), said["Reached"]


@pytest.mark.parametrize("preset", PRESETS)
def test_commands_of_headers_are_taken(preset: str) -> None:
    before, _, flags = header(preset)["Run"].partition(f"{RECIPE}")
    assert before.startswith("accelerate launch ")
    command = parse_command(shlex.split(flags), RECIPE, "", FOLDER)
    wanted = ["--preset", preset] if preset != "demo" else []
    assert shlex.split(flags)[:2] == wanted
    assert command.stages == parse_command(["--preset", preset], RECIPE, "", FOLDER).stages


def test_the_page_has_every_preset_and_who_is_refused() -> None:
    page = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    (heads,) = re.findall(r"^\| a fitted head or cached features .*: all but (.*) \|.*\|$", page, re.MULTILINE)
    assert sorted(re.findall(r"`([\w-]+)`", heads)) == sorted({*PRESETS} - {*FITTED})
    (paths,) = re.findall(r"^\| drop-path for a model without .*: (.*) \|.*\|$", page, re.MULTILINE)
    assert sorted(re.findall(r"`([\w-]+)`", paths)) == DROPPING
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", page.partition("## ")[0], re.MULTILINE)) == PRESETS


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains(plans: Plans, finetune: Run, tmp_path: Path, preset: str) -> None:
    """Two epochs' worth of steps on photos of the demo."""
    flags = (
        "--preset",
        preset,
        "--model",
        "test_resnet",
        "--data",
        "demo",
        "--limit-train",
        "64",
        "--limit-eval",
        "24",
    )
    flags += ("--batch-size", "16", "--max-steps", "8", "--workers", "0", "--tracker", "none", "--output", "run")
    if parsed(preset).flags.model.weights != "none":
        flags += ("--weights", plans.weights("test_resnet"))
    done = finetune(*flags)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["status"] == "done"
    assert timm.create_model(f"local-dir:{tmp_path / 'run/model'}", pretrained=True).num_classes == 2
