"""The demo: 2,624 photos of solar cells, functional or defective, from the pip package `elpv-dataset`.

Images stay inside the installed package. Deitsch et al., *Automatic classification of defective photovoltaic module
cells in electroluminescence images*, Solar Energy 185 (2019); Buerhop-Lutz et al., EU PVSEC 2018.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

from tuning.data.tables import Opened, picture_dataset
from tuning.errors import UserError

CLASSES = ("defective", "functional")
LICENCE = "The demo's photos (ELPV, Buerhop-Lutz et al. 2018) are under CC-BY-NC-SA 4.0: not for commercial use."


def open_demo() -> Opened:
    """Read the table of the ELPV package; a cell with a probability of defect above 0.5 is `defective`.

    Raises:
        UserError: when the package is not installed or not complete.
    """
    spec = find_spec("elpv_dataset")  # not imported: its own loader would decode every picture
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "--data demo needs the pictures of the package elpv-dataset, which is not installed: "
            "pip install 'fine-tuning[demo]' (in a checkout: pip install -e '.[demo]')."
        )
    folder = os.path.join(spec.submodule_search_locations[0], "data")
    paths, labels = _read_labels(folder)
    return Opened(picture_dataset(paths, labels, CLASSES), None, CLASSES, (LICENCE,), folder)


def _read_labels(folder: str) -> tuple[list[str], list[int]]:
    """Lines such as `images/cell0001.png  1.0  mono`: path, probability of defect, kind of cell."""
    table = os.path.join(folder, "labels.csv")
    try:
        with open(table, encoding="utf-8") as file:
            rows = [line.split() for line in file if line.strip()]
        paths = [os.path.join(folder, *row[0].split("/")) for row in rows]
        labels = [CLASSES.index("defective" if float(row[1]) > 0.5 else "functional") for row in rows]
    except (OSError, ValueError, IndexError) as error:
        raise UserError(
            f"The package elpv-dataset is damaged: {table} cannot be read ({error}); "
            "pip install --force-reinstall elpv-dataset."
        ) from error
    return paths, labels
