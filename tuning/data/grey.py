"""Whether pictures are grey, so that changes of their colours make no sense."""

from __future__ import annotations

from tuning.data.images import UnreadableImage, decode
from tuning.data.tables import Table, spread

LOOKED_AT = 32  # pictures
DIFFERENCE = 8  # of 255 between green and another channel: what JPEG leaves in a grey picture saved in colour
COLOURED = 0.001  # share of the pixels of a picture that may differ by more


def are_grey(rows: Table) -> bool:
    """Whether every one of `LOOKED_AT` evenly spread pictures is grey; those that can't be read don't count."""
    seen = False
    for row in spread(rows, LOOKED_AT).tolist():
        image = rows[row]["image"]
        try:
            pixels = decode(image["bytes"] if image["bytes"] is not None else image["path"], min_side=64).short()
        except UnreadableImage:
            continue
        seen = True
        red, green, blue = pixels.unbind(2)
        differs = ((red - green).abs() > DIFFERENCE) | ((blue - green).abs() > DIFFERENCE)
        if differs.float().mean() > COLOURED:
            return False
    return seen
