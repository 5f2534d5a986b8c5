"""From what was typed, and a YAML file under it, to checked flags and stages."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuning.cli import command_line, launcher
from tuning.cli.checks import check_flags, flat
from tuning.cli.coerce import field_types
from tuning.cli.command_line import NOT_IN_CONFIG, Command, dump, parse_command, resolve_stages, run_recipe
from tuning.cli.effects import NEEDS, ONLY_WITHOUT_STAGES
from tuning.cli.optimizer_defaults import resolved
from tuning.errors import UserError
from tuning.flags import Flags
from tuning.safety import interrupts
from tuning.safety.echoes import ProcessLost
from tuning.stage_lists import NOT_KEYS
from tuning.stages import Stage

PRESETS = Path(__file__).parents[2] / "recipes" / "presets"
ALL_FLAGS = flat(Flags())


def parse(*argv: str) -> Command:
    return parse_command(argv, "test", "", PRESETS)


def with_values(**values: Any) -> Flags:
    """Flags with flat *values* put into their groups."""
    flags = Flags()
    for group in dataclasses.fields(Flags):
        content = getattr(flags, group.name)
        own = {key: value for key, value in values.items() if key in field_types(type(content))}
        flags = dataclasses.replace(flags, **{group.name: dataclasses.replace(content, **own)})
    return flags


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    return tmp_path / "preset.yaml"


def test_no_flag_occurs_twice() -> None:
    groups = [vars(group) for group in vars(Flags()).values()]
    assert sum(map(len, groups)) == len(ALL_FLAGS)


def test_every_stage_key_is_a_flag() -> None:
    assert set(field_types(Stage)) - {"name", "open", *NOT_KEYS} <= set(ALL_FLAGS)


def test_defaults_without_the_demo() -> None:
    command = parse("--data", "photos")
    assert command.flags == resolved(with_values(data="photos"))
    assert [stage.open for stage in command.stages] == ["head", "all"]


def test_without_flags_the_demo_preset_is_read() -> None:
    demo = yaml.safe_load((PRESETS / "demo.yaml").read_text())
    for argv in ((), ("--data", "demo"), ("--data=demo",)):
        command = parse(*argv)
        assert command.flags.model.model == demo["model"]
        assert len(command.stages) == len(demo["stages"])


def test_precedence(preset: Path) -> None:
    preset.write_text("data: photos\nlr: 2e-3\nepochs: 5\n")
    command = parse("--preset", str(preset), "--epochs", "7")
    flags = command.flags
    assert (flags.data.data, flags.optimisation.lr, flags.staging.epochs) == ("photos", 2e-3, 7)
    assert flags.batch.batch_size == Flags().batch.batch_size
    assert command.stages[-1].lr == 2e-3
    assert command.stages[-1].epochs == 7


def test_both_spellings_on_the_command_line_and_in_yaml(preset: Path) -> None:
    preset.write_text("batch-size: 12\nlabel_smoothing: 0.1\n")
    flags = parse("--preset", str(preset), "--weight_decay", "0.2", "--lr-floor", "0.01").flags
    assert (flags.batch.batch_size, flags.regularisation.label_smoothing) == (12, 0.1)
    assert (flags.optimisation.weight_decay, flags.optimisation.lr_floor) == (0.2, 0.01)


def test_a_preset_by_name() -> None:
    assert parse("--preset", "demo").stages == parse().stages
    with pytest.raises(UserError, match=r"--preset 'demi' is not known\. Perhaps you meant 'demo'\. Known: .*demo"):
        parse("--preset", "demi")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("epoch: 3", ["unknown key 'epoch'", "Perhaps you meant 'epochs'"]),
        ("lr: fast", ["lr: 'fast' is not a number"]),
        ("epochs: 2.5", ["epochs: 2.5 is not a whole number"]),
        ("schedule: cosin", ["Perhaps you meant 'cosine'"]),
        ("workers: outo", ["Perhaps you meant 'auto'"]),
        ("stages: []", ["must be a list of stages"]),
        ("stages: [{open: all, epoch: 3}]", ["stage 1", "Perhaps you meant 'epochs'"]),
        ("- a\n- b", ["'flag: value' lines", "list"]),
        ("just words", ["'flag: value' lines", "str"]),
        ("lr: [1", ["can't be read as YAML"]),
        ("lr: 2024-13-45", ["can't be read as YAML"]),
        ("lr: !!bool x", ["can't be read as YAML"]),
        ("lr: " + "[" * 500, ["can't be read as YAML"]),
        ("lr: !!python/object:os.system {}", ["can't be read as YAML"]),
        ("seed: 99999999999999999999", ["--seed is 99999999999999999999", "below 2^63"]),
    ],
)
def test_bad_files(preset: Path, content: str, words: list[str]) -> None:
    preset.write_text(content)
    with pytest.raises(UserError) as caught:
        parse("--preset", str(preset))
    assert all(word in str(caught.value) for word in words), caught.value


def test_files_that_are_no_text(preset: Path, tmp_path: Path) -> None:
    preset.write_bytes(b"\xff\xfe\x00lr: 1")
    with pytest.raises(UserError, match="can't be read as YAML"):
        parse("--preset", str(preset))
    with pytest.raises(UserError, match=r"--config .*there is no such file"):
        parse("--config", str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match=r"--config .*there is no such file"):
        parse("--config", str(tmp_path))


def test_config_and_preset_exclude_each_other() -> None:
    with pytest.raises(UserError, match=r"--config a\.yaml and --preset demo exclude each other"):
        parse("--config", "a.yaml", "--preset", "demo")


@pytest.mark.parametrize(
    ("key", "values", "remedy"),
    [
        ("lr", (0.0, -1.0, float("nan"), float("inf")), "above 0"),
        ("freeze_lr", (0.0, -1.0, float("nan"), float("inf")), "above 0"),
        ("val_fraction", (0.0, 1.0, float("nan")), "between 0 and 1"),
        *((key, (-0.1, 1.0, float("nan")), "[0, 1)") for key in ("drop_rate", "drop_path_rate", "label_smoothing")),
        ("focal_gamma", (-0.1, float("nan"), float("inf")), "from 0"),
        ("clip_norm", (-1.0, float("nan"), float("inf")), "0 for off"),
        *((key, (0.0, -1.0, float("nan"), float("inf")), "above 0") for key in ("clip_value", "clip_agc")),
        *((key, (-1,), "from 0") for key in ("workers", "freeze_epochs", "epochs", "seed", "save_every")),
        *((key, (0, -1), "from 1") for key in ("limit_train", "limit_eval", "batch_size", "micro_batch", "lr_batch")),
        *((key, (0, -1), "from 1") for key in ("keep", "log_every", "threads", "max_steps", "max_skipped")),
        ("max_unreadable", (-0.01, 1.01, float("nan")), "in [0, 1]"),
        *((key, (0.0, -1.0, float("nan"), float("inf")), "minutes above 0") for key in ("stop_after", "timeout")),
        ("seed", (2**63, 2**64), "below 2^63"),
    ],
)
def test_single_values_are_refused(key: str, values: tuple[Any, ...], remedy: str) -> None:
    for value in values:
        with pytest.raises(UserError) as caught:
            check_flags(with_values(**{key: value}))
        assert str(caught.value).startswith(f"--{key.replace('_', '-')} is {value!r}; give")
        assert remedy in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"layer_decay": 0.7, "lr_ratio": 0.1}, "--layer-decay 0.7 and --lr-ratio 0.1 exclude each other"),
        ({"clip_value": 1.0, "clip_agc": 0.1}, "--clip-value 1.0 and --clip-agc 0.1 exclude each other"),
        ({"init": "kaiming"}, "Add --weights none, or use --head-init"),
        ({"init": "zero", "weights": "none"}, "--init zero"),
        ({"cache_features": True, "freeze_epochs": 0}, "--freeze-epochs is 0"),
        ({"loss": "focal", "label_smoothing": 0.1}, "--loss focal is defined for one label an image"),
    ],
)
def test_combinations_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_flags(with_values(**values))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("values", "ratio", "decay", "batch_norm"),
    [
        ({}, 0.1, None, "frozen"),
        ({"weights": "none"}, 1.0, None, "train"),
        ({"weights": "file.pth"}, 0.1, None, "frozen"),
        ({"layer_decay": 0.7}, None, 0.7, "frozen"),
        ({"lr_ratio": 0.5, "batch_norm": "train"}, 0.5, None, "train"),
    ],
)
def test_values_that_depend_on_the_weights(
    values: dict[str, Any], ratio: float | None, decay: float | None, batch_norm: str
) -> None:
    for stage in resolve_stages(with_values(**values)):
        assert (stage.lr_ratio, stage.layer_decay, stage.batch_norm) == (ratio, decay, batch_norm)


@pytest.fixture
def files_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave tyro out, which takes a tenth of a second: an empty command line gives the values of the file."""
    monkeypatch.setattr(command_line, "parse_flags", lambda argv, name, description, default: default)


SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
FLOATS = st.floats(1e-12, 0.9)
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)  # what files can hold
VALUES = st.fixed_dictionaries(
    {},
    optional={
        "data": TEXTS,
        "model": TEXTS,
        "run_name": TEXTS,
        "lr": st.floats(1e-300, 1e300),
        "label_smoothing": FLOATS,
        "drop_rate": st.none() | FLOATS,
        "micro_batch": st.just("auto") | st.integers(1, 10**9),
        "limit_train": st.none() | st.integers(1, 10**12),
        "seed": st.integers(0, 2**63 - 1),
        "schedule": st.sampled_from(["sgdr", "cosine", "one-cycle", "step", "triangular", "constant"]),
        "cache_features": st.booleans(),
        "layer_decay": st.none() | FLOATS,
        "warmup_epochs": FLOATS,
        "lr_scaling": st.sampled_from(["none", "linear", "sqrt"]),
        "unfreeze": st.sampled_from(["all", "gradual"]),
        "precision": st.sampled_from([None, "fp32", "bf16"]),
    },
)


@settings(SHARED, max_examples=20)
@given(VALUES)
def test_a_config_repeats_the_run(tmp_path: Path, values: dict[str, Any]) -> None:
    """What ``config.yaml`` holds gives the same flags and stages, whatever the values."""
    _repeats(tmp_path, values)


@settings(SHARED, max_examples=150)
@given(VALUES)
def test_reading_a_config_repeats_the_run(tmp_path: Path, files_only: None, values: dict[str, Any]) -> None:
    _repeats(tmp_path, values)


def _repeats(tmp_path: Path, values: dict[str, Any]) -> None:
    flags = with_values(**values)
    (tmp_path / "config.yaml").write_text(dump(flags), encoding="utf-8")
    again = parse("--config", str(tmp_path / "config.yaml"))
    assert again.config == dump(flags)
    kept = {key: value for key, value in flat(resolved(flags)).items() if key not in NOT_IN_CONFIG}
    assert {key: value for key, value in flat(again.flags).items() if key in kept} == kept
    assert again.stages == resolve_stages(flags)


@pytest.mark.parametrize("name", ["Zürich", "a\x85b", "a\u2028b", "a\u2029", " \n", "1e-3", "null"])
def test_a_config_keeps_names(tmp_path: Path, files_only: None, name: str) -> None:
    _repeats(tmp_path, {"data": name})


def test_a_config_with_stages_repeats_the_run(tmp_path: Path) -> None:
    first = parse("--lr-scaling", "linear", "--lr-batch", "100", "--layer-decay", "0.9")
    (tmp_path / "config.yaml").write_text(first.config, encoding="utf-8")
    again = parse("--config", str(tmp_path / "config.yaml"))
    assert again.stages == first.stages
    assert again.config == first.config


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
SCALARS |= (
    st.dates()
    | st.binary(max_size=4)
    | st.sampled_from(["head", "all", "40%", "1e-3", "auto", "cosine", "none", "", "x%"])
)
STAGE_KEYS = st.sampled_from(sorted(field_types(Stage)))
TREES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3))
STAGES = st.lists(st.dictionaries(STAGE_KEYS, SCALARS, max_size=4), max_size=3)
DOCUMENTS = st.dictionaries(st.sampled_from(sorted(ALL_FLAGS)), SCALARS | TREES, max_size=3)


@settings(SHARED, max_examples=300)
@given(TREES | DOCUMENTS | st.builds(lambda d, s: d | {"stages": s}, DOCUMENTS, STAGES | TREES))
def test_any_document_gives_a_command_or_one_message(preset: Path, files_only: None, document: Any) -> None:
    preset.write_text(yaml.safe_dump(document), encoding="utf-8")
    _parses_or_refuses(preset)


@settings(SHARED, max_examples=300)
@given(st.text(alphabet=st.sampled_from("abe:- \n[]{}&*!|>'\"%@`,?#<=~.0123456789+_xo"), max_size=40) | st.text())
def test_any_text_gives_a_command_or_one_message(preset: Path, files_only: None, text: str) -> None:
    preset.write_text(text, encoding="utf-8", errors="replace")
    _parses_or_refuses(preset)


def _parses_or_refuses(preset: Path) -> None:
    try:
        command = parse("--preset", str(preset))
    except UserError:
        return
    assert command.stages
    for stage in command.stages:
        assert 0 <= stage.factor(5)(3) <= 1
        stage.cut_cycle(5)


# A value of every flag that needs another one, and is not its default.
WITHOUT_EFFECT = {
    "cycle_epochs": "2.0",
    "cycle_mult": "3",
    "cycle_decay": "0.5",
    "step_epochs": "1.0",
    "step_gamma": "0.2",
    "plateau_patience": "3",
    "lr_floor": "0.1",
    "lr_batch": "128",
    "focal_gamma": "3.0",
    "color": "keep",
    "cache_folder": "kept",
}


@pytest.mark.parametrize("key", NEEDS)
def test_a_flag_that_needs_another_is_refused_without_it(key: str) -> None:
    switch, allowed = NEEDS[key]
    flag, other = f"--{key.replace('_', '-')}", f"--{switch.replace('_', '-')}"
    without = {"schedule": "constant", "loss": "cross-entropy", "augment": "light"}.get(switch, "none")
    with pytest.raises(UserError) as caught:
        parse("--data", "photos", other, without, flag, WITHOUT_EFFECT[key])
    assert str(caught.value) == (
        f"{flag} {WITHOUT_EFFECT[key]} has no effect with {other} {without}. "
        f"Drop it, or choose {other} {' or '.join(allowed)}."
    )
    for value in allowed:
        command = parse("--data", "photos", other, value, flag, WITHOUT_EFFECT[key])
        assert str(flat(command.flags)[key]) == WITHOUT_EFFECT[key]
    if ALL_FLAGS[key] is not None:
        parse("--data", "photos", other, without, flag, str(ALL_FLAGS[key]))


@pytest.mark.parametrize(
    ("argv", "words", "mended"),
    [
        (
            "--lr 1e-2 --epochs 0 --freeze-lr 1e-3",
            "--lr 0.01 has no effect with --epochs 0: the rate of the head alone",
            "--freeze-lr 1e-2 --epochs 0",
        ),
        ("--lr auto --epochs 0", "--lr auto has no effect with --epochs 0", "--lr auto"),
        (
            "--freeze-lr 0.1 --freeze-epochs 0",
            "--freeze-lr 0.1 has no effect with --freeze-epochs 0",
            "--freeze-lr 0.1",
        ),
        ("--momentum 0.5", "--momentum 0.5 has no effect with --optimizer adamw", "--optimizer sgd --momentum 0.5"),
        ("--clip-norm 2 --clip-value 1", "--clip-norm 2.0 has no effect with --clip-value 1.0", "--clip-norm 2"),
        ("--clip-norm 2 --clip-agc 0.1", "--clip-norm 2.0 has no effect with --clip-agc 0.1", "--clip-agc 0.1"),
    ],
)
def test_a_flag_that_reaches_no_step_is_refused(argv: str, words: str, mended: str) -> None:
    with pytest.raises(UserError) as caught:
        parse("--data", "photos", *argv.split())
    assert str(caught.value).startswith(words)
    parse("--data", "photos", *mended.split())


def test_the_head_alone_takes_the_one_rate_that_is_given(preset: Path) -> None:
    (stage,) = parse("--data", "photos", "--epochs", "0", "--lr", "1e-2").stages
    assert (stage.open, stage.lr) == ("head", 1e-2)
    assert parse("--data", "photos", "--lr", "1e-2").stages[0].lr == 1e-3
    preset.write_text("epochs: 0\nfreeze_lr: 1e-4\n")
    with pytest.raises(UserError, match=r"--lr 0\.01 has no effect with --epochs 0"):
        parse("--preset", str(preset), "--lr", "1e-2")


def test_what_another_optimizer_of_a_list_takes_is_no_flag_for_nothing(preset: Path) -> None:
    preset.write_text("stages: [{open: head, epochs: 1}, {open: all, epochs: 1, optimizer: sgd}]\n")
    assert parse("--preset", str(preset), "--momentum", "0.5").stages[1].momentum == 0.5


@pytest.mark.parametrize("key", ["cycle_mult", "lr_batch"])
def test_the_same_under_listed_stages(preset: Path, key: str) -> None:
    """What the stages themselves choose counts."""
    argv = ("--preset", str(preset), f"--{key.replace('_', '-')}", WITHOUT_EFFECT[key])
    preset.write_text("stages: [{open: head, epochs: 1}, {open: all, epochs: 1, schedule: constant}]\n")
    with pytest.raises(UserError, match="has no effect with"):
        parse(*argv)
    preset.write_text("lr_scaling: sqrt\nstages: [{open: head, epochs: 1}, {open: all, epochs: 9, schedule: sgdr}]\n")
    parse(*argv)


TYPED = {"freeze_epochs": "7", "freeze_lr": "0.5", "epochs": "7", "unfreeze": "gradual"}


@pytest.mark.parametrize("key", ONLY_WITHOUT_STAGES)
def test_flags_that_describe_stages_are_refused_beside_a_list_of_them(preset: Path, key: str) -> None:
    preset.write_text("stages: [{open: all, epochs: 1}]\n")
    flag = f"--{key.replace('_', '-')}"
    argv = [flag] if ALL_FLAGS[key] is False else [flag, TYPED[key]]
    with pytest.raises(UserError) as caught:
        parse("--preset", str(preset), *argv)
    words = f"{flag} {TYPED.get(key, 'True')}: the stages listed in {preset} set that themselves."
    assert str(caught.value).startswith(words)
    assert "give it as --preset" in str(caught.value)
    if ALL_FLAGS[key] is not False:
        parse("--preset", str(preset), flag, str(ALL_FLAGS[key]))


@pytest.mark.parametrize("flag", [("--lr", "0.5"), ("--epochs", "4")])
def test_a_flag_that_the_stages_of_the_demo_set_is_refused(flag: tuple[str, str]) -> None:
    with pytest.raises(UserError, match=rf"{flag[0]} {flag[1]}: .*demo\.yaml set that themselves"):
        parse(*flag)
    parse(flag[0], str(ALL_FLAGS[flag[0][2:].replace("-", "_")]))


def test_a_flag_that_no_stage_sets_reaches_them_all() -> None:
    command = parse("--weight-decay", "0.3", "--seed", "5", "--schedule", "one-cycle")
    assert command.flags.run.seed == 5
    assert {(stage.weight_decay, stage.schedule) for stage in command.stages} == {(0.3, "one-cycle")}


@pytest.mark.parametrize("key", ["preset", "config", "print_config", "print-config"])
def test_flags_of_the_command_line_alone_are_unknown_in_a_file(preset: Path, key: str) -> None:
    preset.write_text(f"{key}: demo\n")
    with pytest.raises(UserError, match=rf"preset\.yaml has the unknown key '{key.replace('-', '_')}'"):
        parse("--preset", str(preset))


def test_frozen_statistics_without_weights_are_refused(preset: Path) -> None:
    preset.write_text("weights: none\nstages: [{open: head, epochs: 1}, {name: b, open: all, epochs: 1, %s}]\n")
    text = preset.read_text()
    preset.write_text(text % "batch_norm: frozen")
    with pytest.raises(
        UserError, match=r"stage 'b': --batch-norm frozen with --weights none: .*Use --batch-norm train"
    ):
        parse("--preset", str(preset))
    preset.write_text(text % "batch_norm: train")
    assert [stage.batch_norm for stage in parse("--preset", str(preset)).stages] == ["train", "train"]
    with pytest.raises(UserError, match="there are no statistics to keep"):
        parse("--data", "photos", "--weights", "none", "--batch-norm", "frozen")


def test_bounds_of_the_crop() -> None:
    for value in (0.0, -0.5, 1.01, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"--crop-pct is .*; give a share in \(0, 1\]"):
            check_flags(with_values(crop_pct=value))
    for value in (None, 0.01, 1.0):
        check_flags(with_values(crop_pct=value))


def test_bounds_that_are_allowed() -> None:
    for values in ({"max_unreadable": 0.0}, {"max_unreadable": 1.0}, {"stop_after": 0.01}, {"timeout": 0.1}):
        check_flags(with_values(**values))
    for save_every in ("auto", 0, 100):
        check_flags(with_values(save_every=save_every))


def test_when_a_run_stops_is_not_what_it_is() -> None:
    assert parse("--data", "photos", "--stop-after", "3").config == parse("--data", "photos").config


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Any]]:
    """``ended(error, *flags)``: exit status and stderr of a recipe that raises *error*."""
    numbers = [getattr(signal, name) for name in interrupts.NAMES if hasattr(signal, name)]
    handlers = [signal.getsignal(number) for number in numbers]

    def end(error: BaseException | None, *flags: str) -> tuple[Any, str]:
        def recipe(command: Command) -> None:
            """A recipe."""
            if error is not None:
                raise error

        monkeypatch.setattr(sys, "argv", ["recipe.py", "--data", "photos", *flags])
        with pytest.raises(SystemExit) as caught:
            run_recipe(recipe, "recipe.py", PRESETS)
        return caught.value.code, capsys.readouterr().err

    yield end
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


def of_run(folder: str) -> KeyboardInterrupt:
    error = KeyboardInterrupt("SIGTERM")
    error.add_note(folder)
    return error


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (None, 0, ""),
        (UserError("too few"), 2, "error: too few"),
        (KeyboardInterrupt(), 75, "stopped on Ctrl-C; --resume auto"),
        (KeyboardInterrupt("SIGTERM, after step 12"), 75, "stopped on SIGTERM, after step 12; --resume auto"),
        (of_run("my run"), 75, "stopped on SIGTERM; --resume auto --output 'my run' goes on from the last checkpoint."),
        (ProcessLost("process 1 hangs."), 1, "error (process 0): process 1 hangs."),
        (OSError(errno.ENOSPC, "No space left", "run/x"), 2, "error: run/x: No space left. Free some space; then"),
        (OSError(errno.EDQUOT, "Quota exceeded"), 2, "error: a file: Quota exceeded. Free some space; then"),
        (OSError(errno.EROFS, "Read-only", "out/run"), 2, "error: out/run: Read-only. Make it writable"),
        (OSError(errno.EACCES, "Denied", "out/run/x"), 2, "or choose another --output; --resume auto"),
        (OSError(errno.EACCES, "Denied", "photos/x"), 2, "error: photos/x: Denied. Give this user the right;"),
        (OSError(errno.ENOENT, "No such file", "out/run/x"), 2, "error: out/run/x: No such file. It was there before"),
    ],
)
def test_exit_status(ended: Callable[..., Any], error: BaseException | None, status: int, words: str) -> None:
    code, said = ended(error, "--output", "out/run")
    assert code == status
    assert said.startswith(words) or words in said
    assert "Traceback" not in said
    assert bool(said) == bool(words)


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "No such file", "x"), OSError(errno.EIO, "IO"), ValueError()])
def test_a_defect_keeps_its_traceback(ended: Callable[..., Any], error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        ended(error, "--output", "out")
    assert caught.value is error


@pytest.mark.parametrize(("restarts", "status"), [("0", 75), ("3", 0)])
def test_a_launcher_that_restarts_does_not_restart_a_stop_on_request(
    ended: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, restarts: str, status: int
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    assert ended(KeyboardInterrupt("--stop-after"))[0] == status
    assert ended(UserError("too few"))[0] == 2


@pytest.mark.parametrize("held", [False, True])
def test_what_rank_0_said_is_not_repeated(
    ended: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    """The launcher ends the other processes after rank 0: they add nothing, no traceback either."""
    monkeypatch.setenv("RANK", "1")
    for name, value in (("wish", None), ("held", False)):  # and again after the test
        monkeypatch.setattr(interrupts._state, name, value)
    wait = launcher.ends_us_within

    def wait_for_signal(seconds: float) -> bool:
        if held:
            interrupts.hold()
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return wait(seconds)

    monkeypatch.setattr(launcher, "ends_us_within", wait_for_signal)
    assert ended(UserError("too few")) == (2, "")


def test_a_flag_of_another_recipe_is_refused() -> None:
    with pytest.raises(UserError, match=r"--overfit-steps 5 is for recipes/overfit\.py and has no effect in recipes/f"):
        parse_command(["--overfit-steps", "5"], "recipes/finetune.py", "", PRESETS)
    assert parse_command(["--overfit-steps", "5"], "recipes/overfit.py", "", PRESETS).flags.overfit.overfit_steps == 5
