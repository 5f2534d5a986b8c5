"""Pictures of a run: whatever is in them, and wherever they go, no run ends for one."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from PIL import Image

from tuning.tracking.figures import plt, save


def test_letters_without_a_font_say_nothing_on_stderr(tmp_path: Path) -> None:
    figure, axes = plt.subplots(figsize=(1, 1))
    axes.set_title("猫")  # in none of the fonts that matplotlib brings
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(figure, tmp_path / "plots" / "cat.png")
    assert Image.open(tmp_path / "plots" / "cat.png").size == (110, 110)
    assert plt.get_fignums() == []


def test_a_place_that_refuses_costs_the_picture_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plots").write_text("a file")
    save(plt.figure(), tmp_path / "plots" / "cat.png")
    assert capsys.readouterr().err.startswith(f"warning: {tmp_path}/plots/cat.png can't be written (")
    assert plt.get_fignums() == []
