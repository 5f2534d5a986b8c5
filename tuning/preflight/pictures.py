"""One look at every picture: header, end of file and hash of its bytes; with a full decode where that is asked for."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import imagehash
import numpy as np
from PIL import Image, JpegImagePlugin
from torch.utils.data import Dataset

from tuning.data.images import UnreadableImage, decode
from tuning.data.streamed import StreamedRows
from tuning.data.tables import Table
from tuning.data.workers import WorkerLoader

CHUNK = 64  # pictures a worker hands over at a time
# 100 bits: within 4 of them are nearly all pictures saved anew or resized, and a tenth as many pairs of different
# photos from one machine as within 4 of the usual 64. Longer hashes see the noise of JPEG in smooth pictures.
HASH_SIDE, HASH_BYTES = 10, 16
# Formats whose header names the picture and whose end can be told from the bytes; others are decoded to be sure.
_CHECKED_END = frozenset(("JPEG", "MPO", "PNG", "GIF", "BMP", "WEBP"))


class Facts(NamedTuple):
    """What is known of one picture.

    Attributes:
        row: of its part of the data.
        width, height: in pixels as stored; 0 when the header can't be read.
        size: of the encoded bytes.
        digest: 128-bit BLAKE2b of the encoded bytes.
        problem: why it can't be decoded; None when it can, or when nothing speaks against it.
        cut: it can't be decoded because the file ends early.
        blank: all pixels are equal; False when it was not decoded.
        perceptual: perceptual hash, 100 bits and zeros; None when it was not asked for.
    """

    row: int
    width: int = 0
    height: int = 0
    size: int = 0
    digest: bytes = b""
    problem: str | None = None
    cut: bool = False
    blank: bool = False
    perceptual: bytes | None = None


def examine(row: int, source: bytes | str | None, *, image_size: int, in_full: bool) -> Facts:
    """Read one picture. Whether it is unreadable is decided by the decoder that training uses, not by the header.

    Args:
        source: encoded bytes or a path, as in the data.
        image_size: side of the model's input: very large JPEGs are decoded at a reduced scale, as in training.
        in_full: decode every picture, for damage inside a file, blank pictures and perceptual hashes; else only those
            whose header or end looks wrong.
    """
    try:
        encoded = _bytes(source)
    except (OSError, ValueError) as error:
        return Facts(row, problem=getattr(error, "strerror", None) or str(error))
    digest = hashlib.blake2b(encoded, digest_size=16).digest()
    kind, (width, height) = _header(encoded)
    whole = kind in _CHECKED_END and _is_whole(kind, encoded)
    facts = Facts(row, width, height, len(encoded), digest)
    if whole and not in_full:
        return facts
    try:
        pixels = decode(encoded, min_side=image_size).numpy()
    except UnreadableImage as error:
        cut = "truncated" in error.reason or (kind in _CHECKED_END and not whole)
        return facts._replace(problem=error.reason, cut=cut)
    if not width:
        facts = facts._replace(width=pixels.shape[1], height=pixels.shape[0])
    return facts if not in_full else facts._replace(blank=_is_blank(pixels), perceptual=_perceptual(pixels))


def _bytes(source: bytes | str | None) -> bytes:
    if source is None:
        raise ValueError("it has neither bytes nor a path")
    if isinstance(source, bytes):
        return source
    with open(source, "rb") as file:
        return file.read()


def _header(encoded: bytes) -> tuple[str, tuple[int, int]]:
    """Format and (width, height); ('', (0, 0)) when the header says neither."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            # Not Image.open, which refuses by the full size before a reduced scale can be asked for.
            jpeg = encoded.startswith(b"\xff\xd8\xff")
            opened = JpegImagePlugin.JpegImageFile if jpeg else Image.open
            with opened(io.BytesIO(encoded)) as image:
                return image.format or "", image.size
    except Exception:  # PIL's plugins raise nearly every type on damaged files
        return "", (0, 0)


def _is_whole(kind: str, encoded: bytes) -> bool:
    """Whether the end that the format calls for is there; bytes behind it are allowed, as decoders allow them."""
    match kind:
        case "JPEG" | "MPO":  # thumbnails in the metadata have ends of their own, the last scan comes after all of them
            return encoded.rfind(b"\xff\xd9") > encoded.rfind(b"\xff\xda")
        case "PNG":
            return b"IEND\xaeB`\x82" in encoded
        case "GIF":
            return b";" in encoded[-64:]
        case "BMP":
            return int.from_bytes(encoded[2:6], "little") <= len(encoded)
        case _:  # WEBP, in a RIFF container
            return int.from_bytes(encoded[4:8], "little") + 8 <= len(encoded)


def _is_blank(pixels: np.ndarray) -> bool:
    flat = pixels.reshape(-1, 3)
    return bool((flat[::101] == flat[0]).all() and (flat == flat[0]).all())  # mostly the first few tell


def _perceptual(pixels: np.ndarray) -> bytes:
    """DCT hash of the grey picture (Zauner 2010), packed."""
    bits = imagehash.phash(Image.fromarray(pixels), hash_size=HASH_SIDE).hash
    return np.packbits(bits).tobytes().ljust(HASH_BYTES, b"\0")


@dataclass(frozen=True)
class _Chunks(Dataset[list[Facts]]):
    """Whole chunks of pictures at a time; stateless, so any worker may take any of them."""

    rows: Table
    image_size: int
    in_full: bool

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, numbers: list[int]) -> list[Facts]:
        return [
            examine(number, _source(self.rows[number]), image_size=self.image_size, in_full=self.in_full)
            for number in numbers
        ]


def _source(row: dict[str, Any]) -> bytes | str | None:
    image = row["image"]
    return image["bytes"] if image["bytes"] is not None else image["path"]  # type: ignore[no-any-return]


def examine_all(
    table: Table,
    numbers: Sequence[int],
    *,
    image_size: int,
    in_full: bool,
    workers: int,
    progress: Callable[[int], None],
) -> Iterator[Facts]:
    """`examine` every row of *numbers*, in that order, in *workers* processes.

    Args:
        progress: told how many more are done.
    """
    if isinstance(table, StreamedRows):  # a row group a chunk, so that none is read twice
        chunks = [part.tolist() for part in table.by_block(numbers)]
    else:
        chunks = [list(numbers[first : first + CHUNK]) for first in range(0, len(numbers), CHUNK)]
    loader = WorkerLoader(_Chunks(table, image_size, in_full), chunks, workers, keep=False, pin=False)
    for facts in loader:
        progress(len(facts))
        yield from facts
