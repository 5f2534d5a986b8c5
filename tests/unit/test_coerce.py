"""Values from YAML take the type that a dataclass field declares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest
import yaml

from tuning.coerce import coerce, field_types
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
    assert repr(value) in str(caught.value)


def test_field_types_are_resolved() -> None:
    @dataclass
    class Example:
        rate: float = 0.0
        size: int | None = None

    assert field_types(Example) == {"rate": float, "size": int | None}
