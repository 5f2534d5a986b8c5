"""From an encoded picture to `(H, W, 3)` bytes, whatever a camera, a scanner or a web crawl left in the file."""

from __future__ import annotations

import io
import warnings
from functools import cache
from importlib import import_module
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, ImageFile, JpegImagePlugin, UnidentifiedImageError


def _optional(name: str) -> ModuleType | None:
    try:
        return import_module(name)
    except ImportError:
        return None


simplejpeg = _optional("simplejpeg")  # only a speed-up: PIL decodes to the same pixels

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 178_956_970  # PIL's own limit against decompression bombs: 512 MiB as RGB
STRIP_PIXELS = 16_000_000  # converted at a time, so that a large picture exists once, not three times
# Share of the limit that keeps a decode near 1 GB; for some the decoder holds copies of its own.
_SHARES = {"WEBP": 0.4, "AVIF": 0.4, "JPEG2000": 0.4, "TIFF": 0.4}
_OTHER_SHARE = 0.65
REDUCE_ABOVE = 16_000_000  # below it a full decode is quick, and random crops keep their detail

# What people train on; among PIL's other formats are some that start programs (EPS).
_FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO")
_JPEG_START = b"\xff\xd8\xff"


class UnreadableImage(Exception):
    """A picture that cannot be decoded; the message holds its path (or size in bytes) and the reason.

    Attributes:
        reason: without the path.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.reason = reason


def decode(source: bytes | str, *, min_side: int = 0) -> torch.Tensor:
    """Decode the first frame of a picture to uint8 RGB `(H, W, 3)`, upright and contiguous.

    EXIF orientation is applied, transparency is laid on white, 16-bit grey is scaled to 8 bits. A JPEG above
    16 megapixels whose short side exceeds `2 * min_side` pixels is decoded at a reduced scale that keeps at least
    that many; `min_side=0` never reduces.

    Args:
        source: the encoded bytes, or the path of a file.
        min_side: the short side in pixels that the caller needs after cropping and resizing.

    Raises:
        UnreadableImage: for a missing, empty, truncated, foreign or too large file, and nothing else.
    """
    try:
        pixels = _decode(_read(source), min_side)
        return torch.from_numpy(np.ascontiguousarray(pixels))
    except Exception as error:  # PIL's plugins raise nearly every type on damaged files
        name = source if isinstance(source, str) else f"a picture of {len(source or b''):,} bytes"
        raise UnreadableImage(name, _reason(error)) from error


def _read(source: bytes | str) -> bytes:
    if not isinstance(source, str):
        return source
    with open(source, "rb") as file:
        return file.read()


def _decode(data: bytes, min_side: int) -> Pixels:
    if not data:
        raise ValueError("it is empty")
    if not data.startswith(_JPEG_START):
        return _decode_with_pil(data)
    pixels = _decode_plain_jpeg(data, min_side)
    if pixels is None:
        return _decode_jpeg_with_pil(data, min_side)
    metadata = _metadata(data)
    if b"Exif" in metadata or b"tiff:Orientation" in metadata:  # a look that costs microseconds; PIL's costs more
        return _upright(pixels, _jpeg_orientation(data))
    return pixels


def _decode_plain_jpeg(data: bytes, min_side: int) -> Pixels | None:
    """The fast path; None where PIL has to judge: CMYK, damaged data, simplejpeg not installed."""
    if simplejpeg is None:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("RGB", "YCbCr", "Gray"):
            return None
        least = _least_side(width, height, min_side)
        if width * height > MAX_PIXELS * (_OTHER_SHARE if b"\xff\xc2" in _metadata(data) else 1.0):  # progressive
            return None
        pixels: Pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", min_height=least, min_width=least)
        return pixels
    except ValueError:  # also for data that PIL still decodes completely, such as stray bytes between segments
        return None


def _least_side(width: int, height: int, min_side: int) -> int:
    """The side in pixels that a reduced decode has to keep; 0 means decode in full."""
    large = width * height > REDUCE_ABOVE and min(width, height) > 2 * min_side
    return 2 * min_side if min_side > 0 and large else 0


def _decode_jpeg_with_pil(data: bytes, min_side: int) -> Pixels:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        # Not Image.open, which refuses by the full size before a reduced scale can be asked for.
        with JpegImagePlugin.JpegImageFile(io.BytesIO(data)) as image:
            full = image.size
            least = _least_side(*full, min_side)
            if least and not image.info.get("progressive"):  # a progressive file holds all coefficients at once
                image.draft(None, (least, least))
                _refuse_bomb(image.size)
            else:
                _refuse_bomb(full, _OTHER_SHARE if image.info.get("progressive") else 1.0)
            return _to_rgb(image)


def _decode_with_pil(data: bytes) -> Pixels:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        with Image.open(io.BytesIO(data), formats=_known_formats()) as image:
            _refuse_bomb(image.size, _SHARES.get(image.format or "", _OTHER_SHARE))
            return _to_rgb(image)


@cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _refuse_bomb(size: tuple[int, int], share: float = 1.0) -> None:
    width, height = size
    limit = int(MAX_PIXELS * share)
    if width * height > limit:
        raise ValueError(f"{width} x {height} pixels exceed the limit of {limit:,}; save it smaller")


def _to_rgb(image: ImageFile.ImageFile) -> Pixels:
    image.load()
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; save it with 8 or 16 bits a channel")
    width, height = image.size
    rows = max(1, STRIP_PIXELS // width)
    if rows >= height:
        return _upright(_strip_to_rgb(image, image.format), _orientation(image))
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(height, top + rows)))
        pixels[top : top + rows] = _strip_to_rgb(strip, image.format)
    return _upright(pixels, _orientation(image))


def _strip_to_rgb(strip: Image.Image, kind: str | None) -> Pixels:
    if strip.mode.startswith("I"):
        return _from_16_bit(strip, kind)
    if strip.has_transparency_data:
        layer = strip.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        strip = Image.alpha_composite(white, layer)
    return np.array(strip.convert("RGB"))


def _from_16_bit(image: Image.Image, kind: str | None) -> Pixels:
    """Grey 0 ... 65535 to 0 ... 255, rounded; PIL's own conversion would clip everything above 255."""
    values = np.asarray(image).astype(np.int32)
    if (kind == "TIFF" and image.mode == "I") or values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit integer pixels have no agreed range; save it with 8 or 16 bits a channel")
    grey = ((values + 128) // 257).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _metadata(data: bytes) -> bytes:
    """The segments of a JPEG ahead of its first scan: marker `ff xx`, then a length of two bytes that counts itself."""
    place = 2
    while data[place : place + 1] == b"\xff" and data[place + 1 : place + 2] != b"\xda":
        padded = data[place + 1 : place + 2] == b"\xff"
        place += 1 if padded else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return data[:place]


def _jpeg_orientation(data: bytes) -> int:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            with JpegImagePlugin.JpegImageFile(io.BytesIO(data)) as image:
                return _orientation(image)
    except Exception:  # the pixels are sound: damaged metadata must not cost the picture
        return 1


def _orientation(image: ImageFile.ImageFile) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as above
        return 1
    return value if isinstance(value, int) else 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undo EXIF orientation 1 ... 8 (what the stored rows and columns mean); any other value changes nothing."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a picture in a known format, or its header is damaged"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
