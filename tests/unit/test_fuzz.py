"""Files and command lines of any content end in a result or in one clear message, never in a traceback."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuning.cli.coerce import field_types
from tuning.cli.command_line import COMMAND_LINE_ONLY, Command, parse_command
from tuning.errors import UserError
from tuning.flags import Flags
from tuning.stages import Stage
from tuning.tracking.plots import draw_curves
from tuning.tracking.records import keep_until, order, read_records
from tuning.tracking.run_folder import RunFolder, refuse_other_run, settled_hash
from tuning.tracking.summary import make_summary

PRESETS = Path(__file__).parents[2] / "recipes" / "presets"
STEADY = settings(
    derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
FLAG_TYPES = {key: t for group in field_types(Flags).values() for key, t in field_types(group).items()}
FILE_KEYS = sorted(FLAG_TYPES.keys() - {*COMMAND_LINE_ONLY})
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 100),
    st.floats(),
    st.floats(0, 1),
    st.text(max_size=12),
    st.dates(),
    st.binary(max_size=5),
    st.sampled_from(
        [10**400, -(10**400), 2**63, 1e308, 5e-324, math.inf, -math.inf, math.nan, "", "auto", "40%", "1e999"]
    ),
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(SCALARS, inner, max_size=3)),
    max_leaves=8,
)


def words(wanted: Any) -> list[str]:
    members = get_args(wanted) if get_origin(wanted) is not Literal else (wanted,)
    return [str(word) for member in members if get_origin(member) is Literal for word in get_args(member)]


def plausible(wanted: Any) -> st.SearchStrategy[Any]:
    """Values that are often, but not always, right for a field of this type."""
    likely = st.sampled_from(words(wanted) or [1])
    return st.one_of(likely, st.integers(0, 70), st.floats(0, 2), SCALARS)


def some_of(types: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={key: plausible(wanted) for key, wanted in types.items()})


def few(of: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(of, st.integers(0, 4)).map(lambda drawn: dict(list(drawn[0].items())[: drawn[1]]))


DEPTHS = st.one_of(st.sampled_from(["head", "all", 1, 2, 0.5, "50%"]), SCALARS)
STAGES = st.lists(
    st.tuples(few(some_of(field_types(Stage))), DEPTHS).map(lambda drawn: {**drawn[0], "open": drawn[1]}), max_size=3
)
OWN_KEYS = few(some_of({key: FLAG_TYPES[key] for key in FILE_KEYS}))
PRESET = st.tuples(OWN_KEYS, st.one_of(st.none(), STAGES, ANYTHING)).map(
    lambda drawn: drawn[0] if drawn[1] is None else {**drawn[0], "stages": drawn[1]}
)


def parse(*argv: str) -> Command | None:
    """What a command line means; None when it is refused in one of the two ways there are."""
    refused: UserError | SystemExit
    try:
        return parse_command(argv, "test", "", PRESETS)
    except (UserError, SystemExit) as error:
        refused = error
    assert refused.code == 2 if isinstance(refused, SystemExit) else 10 < len(str(refused)) < 3000
    return None


def goes_round(command: Command | None, folder: Path) -> None:
    """What was accepted can be written to config.yaml, means the same there, and can be resumed."""
    if command is None:
        return
    again = folder / "again.yaml"
    again.write_text(command.config, encoding="utf-8")
    repeated = parse("--config", str(again), "--data", command.flags.data.data)
    assert repeated is not None
    assert repeated.stages == command.stages
    assert settled_hash(repeated.config) == settled_hash(command.config)
    for stage in command.stages:
        factor = stage.factor(7)
        assert all(0 <= factor(step) <= 1 for step in (0, 1, 20, 10**6))


def as_yaml(value: Any) -> bytes:
    try:
        return yaml.dump(value, allow_unicode=True).encode("utf-8")
    except (ValueError, TypeError):  # a half surrogate; keys that can't be sorted
        return repr(value).encode("utf-8", errors="replace")


@STEADY
@given(content=st.one_of(PRESET, ANYTHING).map(as_yaml))
def test_presets_of_any_content(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "preset.yaml"
    path.write_bytes(content)
    goes_round(parse("--preset", str(path)), tmp_path)
    parse("--config", str(path), "--lr", "0.1", "--open", "3")


@STEADY
@given(content=st.one_of(st.binary(max_size=200), st.text("{}[]&*!<>|:,-? \n'\"a0%@`#\t", max_size=60).map(str.encode)))
def test_presets_of_any_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "preset.yaml"
    path.write_bytes(content)
    parse("--preset", str(path))
    with suppress(UserError):
        (tmp_path / "config.yaml").write_bytes(content)
        refuse_other_run(RunFolder(tmp_path), "auto", "lr: 0.001\n")


LINES = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 40))
BOMBS = {
    "billion laughs": "a0: &a0 lol\n" + LINES,
    "billion laughs in a stage": "a0: &a0 lol\n" + LINES + "stages: *a39\n",
    "billion laughs in a known key": "lr: &a0 lol\n" + LINES.replace("a39:", "lr:"),
    "merge keys": "a0: &a0 {x: 1}\n" + LINES.replace("[", "{<<: [").replace("]", "]}"),
    "itself": "stages: &a [*a]\n",
    "a key of itself": "&a {*a : 1}\n",
    "deep list": "[" * 20_000,
    "deep mapping": "{a: " * 20_000,
    "deep indentation": "\n".join(" " * n + "a:" for n in range(700)),
    "digits": "lr: " + "9" * 100_000,
    "hexadecimal digits": "lr: 0x" + "f" * 100_000,
    "stage of many digits": "stages: [{open: 0x" + "f" * 9_000 + "}]",
    "name of many digits": "stages: [{open: head, name: 0x" + "f" * 9_000 + "}]",
    "key of many digits": "? 0x" + "f" * 9_000 + "\n: 1",
    "key of many digits in a stage": "stages: [{open: head, ? 0x" + "f" * 9_000 + " : 1}]",
    "epochs of many digits": "epochs: 0x" + "f" * 9_000,
    "batch beyond any memory": "batch_size: " + "9" * 300,
    "long text": "optimizer: " + "x" * 100_000,
    "long key": "x" * 1000 + ": 1",
    "more than a preset": "# " + "x" * 10**7,
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.yaml").write_text(BOMBS[name])
    began = time.process_time()
    with suppress(UserError):  # a long text is a text
        command = parse("--preset", str(tmp_path / "config.yaml"))
        assert command is None or name == "long text"
        refuse_other_run(RunFolder(tmp_path), "auto", "lr: 0.001\n")
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch {}']",
        "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{}']]",
        "!!python/object/new:os.system ['touch {}']",
        "!!python/name:os.system",
        "!!python/module:antigravity",
    ],
)
def test_nothing_in_a_file_is_executed(tmp_path: Path, tag: str) -> None:
    made = tmp_path / "made"
    for line in ("lr: ", "stages: ", "stages:\n- open: ", ""):
        (tmp_path / "config.yaml").write_text(line + tag.format(made))
        assert parse("--preset", str(tmp_path / "config.yaml")) is None
        with pytest.raises(UserError):
            refuse_other_run(RunFolder(tmp_path), "auto", "lr: 0.001\n")
        assert not made.exists()


ARGUMENTS = [f"--{key.replace('_', '-')}" for key in FLAG_TYPES if key not in ("preset", "config")]
TYPED = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8),
    st.sampled_from(
        ["1e999", "nan", "-inf", "1" + "0" * 400, "-1", "0", "None", "auto", "1e-320", "٣", "True", "9" * 25]
    ),
    st.integers().map(str),
    st.floats().map(str),
)


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    argv: list[str] = []
    for flag in draw(st.lists(st.sampled_from(ARGUMENTS), max_size=2)):
        own = st.sampled_from(words(FLAG_TYPES[flag[2:].replace("-", "_")]) or ["3"])
        argv += [flag, draw(st.one_of(own, TYPED))] if draw(st.integers(0, 9)) else [flag]
    return argv


@STEADY
@given(argv=command_lines())
def test_any_command_line(tmp_path: Path, argv: list[str]) -> None:
    goes_round(parse("--data", "photos", *argv), tmp_path)


@pytest.mark.parametrize(
    ("kind", "value"), [(int, "1" + "0" * 400), (float, "nan"), (str, "half \udcff"), (str, "a\0b")]
)
def test_odd_values_of_every_flag(tmp_path: Path, kind: type, value: str) -> None:
    for flag in ARGUMENTS:
        wanted = FLAG_TYPES[flag[2:].replace("-", "_")]
        if kind in (wanted, *get_args(wanted)) and flag not in ("--data", "--output"):
            goes_round(parse("--data", "photos", flag, value), tmp_path)


NUMBERS = st.one_of(SCALARS, st.integers(0, 10), st.lists(st.integers(), max_size=2))
KEYS = st.sampled_from(
    [
        "epoch",
        "stage",
        "train/loss",
        "train/grad_norm",
        "eval/loss",
        "eval/top1",
        "eval/balanced_accuracy",
        "lr/a",
        "lr/$b_",
    ]
)
RECORDS = st.lists(
    st.tuples(st.one_of(st.integers(0, 9), NUMBERS), st.dictionaries(KEYS, NUMBERS, max_size=5)), max_size=6
)


def as_lines(records: Sequence[tuple[Any, dict[str, Any]]]) -> bytes:
    return b"".join(json.dumps({"step": s, **own}, default=str).encode() + b"\n" for s, own in records)


def read_everywhere(folder: Path, content: bytes, pictures: bool) -> None:
    run = RunFolder(folder)
    run.metrics.write_bytes(content)
    json.dumps(make_summary(run, ("eval",), "top1", {}), allow_nan=False)
    if pictures:
        draw_curves(run.metrics, run.plots / "curves.png")
        assert (run.plots / "curves.png").stat().st_size
    before = read_records(run.metrics)
    keep_until(run.metrics, 5)
    assert read_records(run.metrics) == [record for record in before if order(record) <= (5, 0, 0)]


@STEADY
@given(content=st.one_of(RECORDS.map(as_lines), st.binary(max_size=100)), cut=st.integers(0, 40))
def test_metrics_of_any_content(tmp_path: Path, content: bytes, cut: int) -> None:
    read_everywhere(tmp_path, content[: len(content) - cut] if cut < 20 else content, pictures=False)


@settings(STEADY, max_examples=3)
@given(content=RECORDS.map(as_lines))
def test_pictures_of_any_metrics(tmp_path: Path, content: bytes) -> None:
    read_everywhere(tmp_path, content, pictures=True)


def test_pictures_of_extreme_values(tmp_path: Path) -> None:
    own = {"train/loss": 1e308, "train/grad_norm": -1e308, "lr/a": 5e-324, "lr/$\\frac$": "x", "eval/loss": 10**400}
    records = [(0, own), (2**63 - 1, {**own, "train/loss": -1e308}), (3, {"lr/$\\frac$": 1.0, "eval/top1": None})]
    read_everywhere(tmp_path, as_lines(records), pictures=True)
