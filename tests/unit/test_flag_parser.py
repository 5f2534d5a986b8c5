"""What the parser is told of the flags, and what it makes of them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Sequence

import pytest

from tuning.cli import flag_parser
from tuning.cli.coerce import WholeNumbers, field_types
from tuning.cli.flag_parser import help_text, parse_flags
from tuning.flags import Flags


def parsed(*argv: str, default: Flags | None = None) -> Flags:
    return parse_flags(argv, "test", "", default or Flags())


@pytest.mark.parametrize("group", field_types(Flags).values(), ids=field_types(Flags))
def test_every_flag_has_its_text(group: type) -> None:
    for field in dataclasses.fields(group):
        text = help_text(group, field.name)
        assert text, f"--{field.name} has no text under it"
        assert text == " ".join(text.split())


def test_texts_belong_to_the_field_above_them() -> None:
    assert str(help_text(field_types(Flags)["model"], "weights")).startswith("pretrained, none, or the path")


def test_without_a_source_there_are_no_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_source(module: object) -> str:
        raise OSError("could not get source code")

    monkeypatch.setattr(flag_parser.inspect, "getsource", no_source)
    flag_parser._help_texts.cache_clear()
    try:
        assert help_text(field_types(Flags)["model"], "weights") is None
    finally:
        flag_parser._help_texts.cache_clear()


@pytest.mark.parametrize(
    ("argv", "group", "name", "value"),
    [
        (("--lr", "1e-3"), "optimisation", "lr", 1e-3),
        (("--lr", "auto"), "optimisation", "lr", "auto"),
        (("--limit-train", "None"), "data", "limit_train", None),
        (("--limit_train=7",), "data", "limit_train", 7),
        (("--no-streaming",), "data", "streaming", False),
        (("--streaming",), "data", "streaming", True),
        (("--train-sizes", "96", "128"), "model", "train_sizes", WholeNumbers((96, 128))),
        (("--train-sizes",), "model", "train_sizes", WholeNumbers()),
        (("--images", "a b.jpg", "c"), "predict", "images", ("a b.jpg", "c")),
        (("--schedule", "sgdr"), "optimisation", "schedule", "sgdr"),
        (("--seed", "3", "--seed", "4"), "run", "seed", 4),
    ],
)
def test_values_have_their_types(argv: Sequence[str], group: str, name: str, value: object) -> None:
    found = getattr(getattr(parsed(*argv), group), name)
    assert (type(found), found) == (type(value), value)


def test_what_is_not_typed_is_the_default() -> None:
    data = dataclasses.replace(Flags().data, data="photos", limit_eval=5)
    default = dataclasses.replace(Flags(), data=data)
    assert parsed("--limit-eval", "6", default=default).data == dataclasses.replace(data, limit_eval=6)
    assert parsed(default=default) == default


@pytest.mark.parametrize("argv", [("--limit-train", "many"), ("--schedule", "cosin"), ("--train-sizes", "9x")])
def test_wrong_values_end_with_2(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed(*argv)
    assert ended.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_only_rank_0_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        parsed("--modle", "x")
    assert capsys.readouterr() == ("", "")


def test_the_flags_themselves_need_no_parser() -> None:
    script = "import sys, tuning.flags; print({'tyro', 'yaml'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
