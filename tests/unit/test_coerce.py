"""Values from YAML take the type that a dataclass field declares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from tuning.cli.coerce import as_key, coerce, field_types, parse_yaml, read_yaml, shown
from tuning.errors import UserError

Schedule = Literal["cosine", "sgdr"]


@pytest.mark.parametrize(
    ("text", "wanted", "expected"),
    [
        ("1e-3", float, 1e-3),  # a string to YAML
        ("3", float, 3.0),
        (".5", float, 0.5),
        ("3", int, 3),
        ("3.0", int, 3),
        ("1e3", int, 1000),
        ("9007199254740993", int, 9007199254740993),  # 2^53 + 1, no float
        ("true", bool, True),
        ("none", str, "none"),
        ("5", str, "5"),
        ("2024-05-01", str, "2024-05-01"),  # a date to YAML
        ("null", int | None, None),
        ("none", float | None, None),
        ("None", int | None, None),
        ("7", int | None, 7),
        ("auto", int | Literal["auto"], "auto"),
        ("4", int | Literal["auto"], 4),
        ("sgdr", Schedule, "sgdr"),
        ("null", str | None, None),
    ],
)
def test_accepts(text: str, wanted: Any, expected: Any) -> None:
    value = coerce(yaml.safe_load(text), wanted, "here")
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("value", "wanted", "words"),
    [
        (1.5, int, "a whole number"),
        (float("inf"), int, "a whole number"),
        (float("nan"), int, "a whole number"),
        (10**400, float, "a number"),
        ("fast", float, "a number"),
        (True, int, "a whole number"),
        (True, float, "a number"),
        (False, str, "a text"),
        (1, bool, "true or false"),
        ("yes", bool, "true or false"),
        (None, float, "a number"),
        ([1], float, "a number"),
        ({"a": 1}, str, "a text"),
        ({1}, str, "a text"),
        (b"x", str, "a text"),
        ("a\0b", str, "a text"),
        ("\ud800", str, "a text"),
        (10**41, int, "It is too large"),
        ("1e50", int, "a whole number"),
        ("cosin", Schedule, "Perhaps you meant 'cosine'"),
        ([], Schedule, "'cosine' or 'sgdr'"),
        ("outo", int | Literal["auto"], "Perhaps you meant 'auto'"),
        ("x", int | None, "a whole number or None"),
    ],
)
def test_refuses(value: Any, wanted: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        coerce(value, wanted, "file.yaml, lr")
    assert words in str(caught.value)
    assert str(caught.value).startswith("file.yaml, lr: ")
    assert shown(value) in str(caught.value)


@pytest.mark.parametrize("wanted", [int, float, str, Schedule])
def test_thousands_of_digits_are_refused(wanted: Any) -> None:
    with pytest.raises(UserError, match="x: 16610-bit number is not"):
        coerce(10**5000, wanted, "x")


def test_shown() -> None:
    assert shown("a") == "'a'"
    assert shown(-(10**5000)) == "-16610-bit number"
    assert shown([10**5000]) == "a list"
    assert len(shown("x" * 10**6)) < 300
    assert shown("x" * 10**6).endswith("x'")


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{f'*a{n - 1}, ' * 9}]}}\n" for n in range(1, 30))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "unfold"),
        (MERGES, "unfold"),
        ("a: &a [*a]", "unfold"),
        (f"a: &a {'x' * 10_000}\nb: [{'*a, ' * 200}]", "unfold"),
        ("{a: " * 5_000, "nested too deeply"),
        ("x" * 2**18 + "x", "larger than"),
        ("a: !!python/object/apply:os.system ['echo executed']", "could not determine a constructor"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("a: 2024-99-99", "month"),
        ("a: !!bool maybe", "maybe"),
        ("a: !!timestamp never", "group"),
        ("a: " + "9" * 5_000, "4300 digits"),
        ("? [a]\n: b", "unhashable"),
        ("a: 1\n---\na: 2", "single document"),
        ("\x00", "special characters"),
    ],
    ids=lambda value: repr(value[:25]),
)
def test_odd_yaml_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "preset.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        read_yaml(path, "--preset x")
    assert str(caught.value).startswith("--preset x can't be read as YAML: ")
    assert "\n" not in str(caught.value)


def test_yaml_is_read(tmp_path: Path) -> None:
    path = tmp_path / "preset.yaml"
    path.write_text("batch-size: 3\nstages:\n- &a {open: head}\n- {<<: *a, lr: 1}\n- *a\n")
    assert read_yaml(path, "x") == {
        "batch_size": 3,
        "stages": [{"open": "head"}, {"open": "head", "lr": 1}, {"open": "head"}],
    }
    path.write_text("# nothing\n")
    assert read_yaml(path, "x") == {}
    assert parse_yaml(b"") is None


def test_what_is_no_mapping_in_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(UserError, match="x must hold 'flag: value' lines; it holds list"):
        read_yaml(tmp_path / "list.yaml", "x")
    for path in (tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(UserError, match="x: there is no such file"):
            read_yaml(path, "x")


def test_keys() -> None:
    assert as_key("batch-size") == "batch_size"
    assert as_key(None) == "None"
    assert as_key(10**5000) == "16610_bit number"


def test_field_types_are_resolved() -> None:
    @dataclass
    class Example:
        rate: float = 0.0
        size: int | None = None

    assert field_types(Example) == {"rate": float, "size": int | None}
