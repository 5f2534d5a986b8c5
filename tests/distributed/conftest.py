"""Pictures for every test of this folder."""

from pathlib import Path

import pytest
from pictures import write_classes


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train and val folders of three classes: 37 and 11 pictures, so that the last window of every batch is short."""
    root = tmp_path_factory.mktemp("photos")
    write_classes(root / "train", {"cat": 15, "dog": 12, "emu": 10}, ".png")
    write_classes(root / "val", {"cat": 5, "dog": 4, "emu": 2}, ".png")
    return root
