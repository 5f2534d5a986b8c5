"""What a person sees: a live bar in a terminal, plain lines in a log file, nothing on other ranks than 0."""

from __future__ import annotations

import io
import sys

import pytest

from tuning.tracking.console import Speaker

LATEST = {"loss": 0.5, "lr": 1e-3, "images_per_second": 64.0}


class Terminal(io.StringIO):
    """Looks like one."""

    def isatty(self) -> bool:
        return True


def said(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, is_main: bool) -> str:
    """What a stage of three steps and one line writes."""
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stdout", stream)
    with Speaker(is_main) as speaker:
        for step in range(1, 4):
            speaker.show_progress("head", step, 3, LATEST)
            speaker._bar.refresh()
        speaker.say("epoch [1] is over")
    return stream.getvalue()


def test_a_terminal_shows_a_bar_with_the_latest_values(monkeypatch: pytest.MonkeyPatch) -> None:
    text = said(monkeypatch, Terminal(), is_main=True)
    for part in ("head", "3/3", "loss 0.500", "lr 1.0e-03", "64 images/s", "\x1b["):
        assert part in text, part
    assert "epoch [1] is over\n" in text.replace("\r", "")


def test_a_log_file_has_plain_lines_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(monkeypatch, io.StringIO(), is_main=True) == "epoch [1] is over\n"


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_other_ranks_are_quiet(monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO]) -> None:
    assert said(monkeypatch, stream(), is_main=False) == ""
