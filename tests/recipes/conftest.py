"""Pictures and the recipe for every test of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from pictures import write_classes, write_colours
from recipe_runs import Finished, Run, run_forked


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train and val folders of three classes: 37 and 11 pictures."""
    root = tmp_path_factory.mktemp("photos")
    write_classes(root / "train", {"cat": 15, "dog": 12, "emu": 10})
    write_classes(root / "val", {"cat": 5, "dog": 4, "emu": 2})
    return root


@pytest.fixture
def finetune(tmp_path: Path) -> Run:
    """``finetune(*flags)`` runs the recipe on one process in an empty folder."""

    def run(*flags: str) -> Finished:
        return run_forked(tmp_path, *flags)

    return run


@pytest.fixture(scope="session")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classes that differ in colour: easy to learn, so that a sweep has something to find."""
    return write_colours(tmp_path_factory.mktemp("coloured"), train=16, val=4, strength=200)
