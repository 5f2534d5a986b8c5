"""HTML pages that stand alone, for a run and for a check: templates that escape every value, style, pictures inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from tuning.data.images import UnreadableImage, decode

THUMBNAIL = 128  # pixels of the longer side
LARGEST_PICTURE = 1_000_000  # bytes of a PNG inside a page


def render(template: str, values: Mapping[str, Any]) -> str:
    """The page of *template*, a file in `tuning/templates`; a value is text, never markup, unless it is a `Markup`."""
    environment = Environment(
        loader=PackageLoader("tuning", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values) + "\n"


def thumbnail(row: Mapping[str, Any], side: int = THUMBNAIL) -> bytes | None:
    """The picture of a row as a JPEG of at most *side* pixels; None where it can't be read."""
    image = row["image"]
    try:
        picture = Image.fromarray(decode(image["bytes"] or image["path"], min_side=side).numpy())
    except (UnreadableImage, TypeError, OSError):
        return None
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def image_tag(picture: bytes | None, kind: str = "jpeg", alt: str = "") -> Markup:
    """An ``<img>`` that holds the picture itself; a grey square for None."""
    if picture is None:
        return Markup('<div class="none"></div>')
    encoded = base64.b64encode(picture).decode()
    return Markup('<img alt="{}" src="data:image/{};base64,{}">').format(alt, kind, encoded)


def plot_tag(path: Path, alt: str) -> Markup | None:
    """A PNG of a run as an ``<img>`` that holds it; None where there is none, or one too large for a page."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return image_tag(content, "png", alt) if 0 < len(content) <= LARGEST_PICTURE else None
