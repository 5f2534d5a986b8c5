"""The public surface: what users type, what a run leaves behind and what can be imported, name by name.

A change here is a change for everybody's scripts: it needs a line in `CHANGELOG.md`. What each name does is tested
where it lives; that a run leaves these files and numbers, in `tests/recipes`.
"""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from launch.command_line import TARGETS
from tuning import depth, groups, lr_curve, schedules
from tuning.cli.checks import flat
from tuning.cli.command_line import parse_command
from tuning.errors import UserError
from tuning.flags import Flags
from tuning.tracking import run_folder

ROOT = Path(__file__).parents[2]
PRESETS = ROOT / "recipes" / "presets"
RECIPES = "finetune find_lr overfit check evaluate predict export"

# A flag and a value of it that is not the default; None where it takes none. {...} lists every choice.
FLAGS: dict[str, str | set[str] | None] = {
    "data": "photos",
    "image-column": "picture",
    "label-column": "kind",
    "train-split": "training",
    "eval-split": "test",
    "val-fraction": "0.3",
    "workers": "3",
    "streaming": None,
    "cache": {"none", "ram", "disk"},
    "model": "local-dir:folder",
    "weights": {"pretrained", "none", "folder/model.safetensors"},
    "head-init": {"default", "kaiming", "xavier", "orthogonal", "zero"},
    "init": {"default", "kaiming", "xavier", "orthogonal"},  # a network of zeros learns nothing: zero is refused
    "drop-rate": "0.2",
    "drop-path-rate": "0.1",
    "batch-size": "48",
    "micro-batch": {"8", "auto"},
    "optimizer": {"adamw", "sgd", "lamb", "lion"},
    "lr": {"0.001", "auto"},
    "lr-scaling": {"none", "linear", "sqrt"},
    "lr-batch": "512",
    "weight-decay": "0.01",
    "layer-decay": "0.7",
    "lr-ratio": "0.05",
    "schedule": {"sgdr", "cosine", "one-cycle", "step", "triangular", "constant"},
    "warmup-epochs": "0.5",
    "cycle-epochs": "2",
    "cycle-mult": "3",
    "lr-floor": "0.01",
    "clip-norm": "2",
    "clip-value": "0.5",
    "clip-agc": "0.01",
    "freeze-epochs": {"0", "2"},
    "epochs": {"0", "7"},
    "unfreeze": {"all", "gradual"},
    "label-smoothing": "0.1",
    "mixup": "0.2",
    "cutmix": "1",
    "augment": {"none", "light", "medium", "strong"},
    "random-erasing": "0.25",
    "ema-decay": "0.99",
    "image-size": "64",
    "train-sizes": "48 64",
    "multi-scale": "0.25",
    "output": "runs/mine",
    "run-name": "first",
    "seed": "5",
    "resume": {"auto", "never", "runs/first/checkpoints/step-00000001"},
    "save-every": "100",
    "log-every": "7",
    "tracker": {"wandb", "tensorboard", "none"},
    "project": "mine",
    "limit-train": "100",
    "limit-eval": "50",
    "max-steps": "9",
    "max-minutes": "20",
    "stop-after": "30",
    "dry-run": None,
    "precision": {"fp32", "bf16", "fp16"},
    "preset": "lp-ft",
    "print-config": None,
}
WITH: dict[str, tuple[str, ...]] = {  # what a flag needs beside it to have an effect
    "lr-batch": ("--lr-scaling", "linear"),
    "cycle-epochs": ("--schedule", "sgdr"),
    "cycle-mult": ("--schedule", "sgdr"),
    "init": ("--weights", "none"),
    "epochs": ("--freeze-epochs", "1"),
}


def parsed(flag: str, value: str | None) -> Any:
    """The field that ``--flag value`` sets."""
    own = (f"--{flag}", *(value or "").split())
    data = () if flag == "data" else ("--data", "photos")
    command = parse_command([*data, *WITH.get(flag.replace("_", "-"), ()), *own], "recipes/finetune.py", "", PRESETS)
    return flat(command.flags)[flag.replace("-", "_")]


def choices(value: str | set[str] | None) -> list[str | None]:
    return sorted(value) if isinstance(value, set) else [value]  # type: ignore[return-value]


@pytest.mark.parametrize(("flag", "value"), [(flag, one) for flag, many in FLAGS.items() for one in choices(many)])
def test_flags_in_both_spellings(flag: str, value: str | None) -> None:
    read = parsed(flag, value)
    assert parsed(flag.replace("-", "_"), value) == read
    if value is None:
        assert read is True
    elif isinstance(read, tuple):
        assert " ".join(map(str, read)) == value
    elif isinstance(read, float):
        assert read == float(value)
    else:
        assert str(read) == value


def test_the_values_above_are_not_the_defaults() -> None:
    """Else a flag that is read and thrown away would pass."""
    before = flat(Flags())
    changed = [flag for flag, many in FLAGS.items() for v in choices(many) if parsed(flag, v) != before[_key(flag)]]
    assert sorted({*changed}) == sorted(FLAGS)


def _key(flag: str) -> str:
    return flag.replace("-", "_")


def test_a_config_is_a_flag_too(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(parse_command(["--data", "photos", "--lr", "0.007"], "recipes/finetune.py", "", PRESETS).config)
    again = parse_command(["--config", str(config)], "recipes/finetune.py", "", PRESETS)
    assert again.flags.optimisation.lr == 0.007
    assert again.config == config.read_text()


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        ("evaluate", ("--run", "runs/first")),
        ("predict", ("--run", "runs/first", "--images", "new")),
        ("export", ("--run", "runs/first", "--format", "onnx")),
    ],
)
def test_recipes_after_a_run(recipe: str, flags: tuple[str, ...]) -> None:
    read = flat(parse_command(flags, f"recipes/{recipe}.py", "", PRESETS).flags)
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        assert read[flag.removeprefix("--")] in (value, (value,))


def test_recipes_and_launch_targets_by_name() -> None:
    assert all((ROOT / "recipes" / f"{name}.py").is_file() for name in RECIPES.split())
    assert {*TARGETS} >= {"local", "slurm", "kubernetes", "sky"}


def test_names_in_the_folder_of_a_run(tmp_path: Path) -> None:
    folder = run_folder.RunFolder(tmp_path)
    folder.create("seed: 1\n")
    folder.write_summary({"status": "done"})
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "summary.json", "plots"}
    assert folder.metrics == tmp_path / "metrics.jsonl"
    assert folder.model == tmp_path / "model"
    assert folder.report == tmp_path / "report.html"


def test_the_default_output() -> None:
    chosen = run_folder.choose(None, "never", "resnet18", "photos", now=0).path
    assert chosen.parent == Path("runs")
    assert chosen.name.endswith("-resnet18-photos")


SIGNATURES = {
    schedules.constant: "()",
    schedules.cosine: "(steps, floor=0.0)",
    schedules.sgdr: "(first_cycle, mult=1, floor=0.0, peak_decay=1.0)",
    schedules.one_cycle: "(steps, warm_fraction=0.3, start=0.04, floor=4e-06)",
    schedules.step_decay: "(every, gamma=0.1)",
    schedules.triangular: "(half_cycle, floor=0.0)",
    schedules.exponential_rise: "(steps, start, end)",
    schedules.with_warmup: "(schedule, steps)",
    depth.layer_ids: "(model)",
    groups.param_groups: "(model, lr, layer_decay=1.0, weight_decay=0.0)",
    lr_curve.suggest: "(lrs, losses)",
}


@pytest.mark.parametrize(("function", "expected"), SIGNATURES.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_signatures(function: Any, expected: str) -> None:
    """Names, order and defaults; an added argument with a default goes here."""
    found = inspect.signature(function)
    plain = [one.replace(annotation=inspect.Parameter.empty) for one in found.parameters.values()]
    assert str(inspect.Signature(plain)) == expected


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (schedules.constant(), {0: 1.0, 1000: 1.0}),
        (schedules.sgdr(first_cycle=10, mult=2, floor=0.0), {0: 1.0, 5: 0.5, 10: 1.0, 20: 0.5, 30: 1.0, 50: 0.5}),
        (schedules.cosine(steps=150, floor=0.0), {0: 1.0, 50: 0.75, 75: 0.5, 150: 0.0, 900: 0.0}),
        (schedules.triangular(half_cycle=20, floor=0.1), {0: 0.1, 10: 0.55, 20: 1.0, 30: 0.55, 40: 0.1, 60: 1.0}),
        (schedules.step_decay(every=30, gamma=0.1), {0: 1.0, 29: 1.0, 30: 0.1, 60: 0.01}),
        (schedules.one_cycle(steps=101), {0: 0.04, 100: 4e-6}),
        (schedules.exponential_rise(steps=3, start=0.01, end=1.0), {0: 0.01, 1: 0.1, 2: 1.0}),
        (schedules.with_warmup(schedules.constant(), 4), {0: 0.2, 3: 0.8, 4: 1.0}),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value.__qualname__.partition(".")[0],
)
def test_a_schedule_is_a_function_of_the_step(schedule: schedules.Schedule, factors: dict[int, float]) -> None:
    assert {step: schedule(step) for step in factors} == pytest.approx(factors)
    assert all(isinstance(schedule(step), float) for step in factors)


def test_layers_and_groups() -> None:
    model = timm.create_model("test_vit", num_classes=3)
    ids = depth.layer_ids(model)
    assert ids.keys() == {name for name, _ in model.named_parameters()}
    assert min(ids.values()) == 0
    assert {ids[name] for name in ids if name.startswith("head.")} == {max(ids.values())}
    made = groups.param_groups(model, lr=0.1, layer_decay=0.5, weight_decay=0.05)
    assert all({"params", "name", "peak_lr", "lr", "weight_decay"} <= group.keys() for group in made)
    assert {group["peak_lr"] for group in made} == {0.1 * 0.5 ** (max(ids.values()) - d) for d in {*ids.values()}}
    torch.optim.AdamW(made)  # as they are


def test_a_suggestion_has_these_names() -> None:
    lrs = [10 ** (-6 + 0.06 * n) for n in range(100)]
    falling = [2 - 1.5 / (1 + math.exp(-(n - 40) / 6)) + max(0, n - 75) ** 2 * 0.01 for n in range(100)]
    found = lr_curve.suggest(lrs, falling)
    assert None not in (found.valley, found.steep, found.minimum, found.chosen)
    flat_curve = lr_curve.suggest(lrs, [1.0] * 100)
    assert (flat_curve.valley, flat_curve.steep, flat_curve.minimum, flat_curve.chosen) == (None,) * 4


def test_unknown_names_are_refused_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("batchsize: 8\n")
    with pytest.raises(UserError, match=r"'batchsize'.*Perhaps you meant 'batch_size'"):
        parse_command(["--preset", str(tmp_path / "run.yaml")], "recipes/finetune.py", "", PRESETS)
