"""Pictures and the recipe for every test of this folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pictures import write_classes
from PIL import Image
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


COLOURS = {"blue": (60, 60, 200), "green": (60, 200, 60), "red": (200, 60, 60)}


@pytest.fixture(scope="session")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classes that differ in colour: easy to learn, so that a sweep has something to find."""
    root, generator = tmp_path_factory.mktemp("coloured"), np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(generator.normal(colour, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root
