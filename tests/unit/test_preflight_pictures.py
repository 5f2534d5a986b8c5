"""One look at a picture: every kind of damage is seen, and nothing sound is called damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pictures import encode, noise
from PIL import Image

from tuning.data.images import UnreadableImage, decode
from tuning.data.tables import picture_dataset
from tuning.preflight.pictures import Facts, examine, examine_all

KINDS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")


def look(source: bytes | str | None, in_full: bool = False) -> Facts:
    return examine(7, source, image_size=32, in_full=in_full)


@pytest.mark.parametrize("in_full", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_picture(kind: str, in_full: bool) -> None:
    facts = look(encode(noise(40, 30), kind), in_full)
    assert (facts.problem, facts.cut, facts.blank) == (None, False, False)
    assert (facts.row, facts.width, facts.height) == (7, 40, 30)
    assert (facts.perceptual is not None) == in_full


@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM"])
def test_a_file_that_ends_early_is_seen_without_a_full_decode(kind: str, share: float) -> None:
    whole = encode(noise(64, 48), kind)
    cut = whole[: int(len(whole) * share)]
    with pytest.raises(UnreadableImage):
        decode(cut)
    facts = look(cut)
    assert facts.problem
    assert facts.cut or facts.width == 0, "without a header it is unreadable, with one it is truncated"


def test_a_thumbnail_in_the_metadata_does_not_hide_a_cut() -> None:
    thumbnail = encode(noise(16, 16), "JPEG")
    exif = Image.Exif()
    exif[0x9286] = thumbnail  # a comment that holds a whole JPEG, end marker and all
    whole = encode(noise(64, 48), "JPEG", exif=exif.tobytes())
    assert whole.count(b"\xff\xd9") == 2
    assert look(whole).problem is None
    assert look(whole[: int(len(whole) * 0.9)]).cut


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_bytes_behind_the_end_do_no_harm(kind: str) -> None:
    assert look(encode(noise(), kind) + b"appended by a camera").problem is None


@pytest.mark.parametrize(
    ("source", "reason"),
    [(b"", "empty"), (b"<html>not found</html>", "known format"), (None, "neither bytes nor a path")],
)
def test_what_is_no_picture(source: bytes | None, reason: str) -> None:
    assert reason in str(look(source).problem)


def test_a_missing_file(tmp_path: Path) -> None:
    assert look(str(tmp_path / "gone.jpg")).problem == "No such file or directory"


def test_damage_inside_a_file_needs_the_full_decode() -> None:
    damaged = bytearray(encode(noise(64, 48), "PNG"))
    damaged[len(damaged) // 2] ^= 0xFF
    assert look(bytes(damaged)).problem is None
    assert look(bytes(damaged), in_full=True).problem


def test_a_picture_of_one_colour() -> None:
    plain = Image.new("RGB", (300, 200), (9, 99, 199))
    assert look(encode(plain), in_full=True).blank
    plain.putpixel((299, 199), (9, 99, 198))
    assert not look(encode(plain), in_full=True).blank


def test_a_huge_jpeg_has_its_true_size() -> None:
    facts = look(encode(Image.new("L", (15_000, 14_000)), "JPEG"))
    assert (facts.width, facts.height, facts.problem) == (15_000, 14_000, None)


def test_other_encodings_of_a_picture_are_near_and_other_pictures_far() -> None:
    def bits(one: bytes, other: bytes) -> int:
        hashes = [np.unpackbits(np.frombuffer(look(e, True).perceptual or b"", np.uint8)) for e in (one, other)]
        return int((hashes[0] != hashes[1]).sum())

    picture = noise(160, 120, seed=3)
    assert bits(encode(picture), encode(picture, "JPEG", quality=60)) <= 6
    assert bits(encode(picture), encode(picture.resize((120, 90)), "PNG")) <= 6
    assert min(bits(encode(picture), encode(noise(160, 120, seed))) for seed in range(4, 12)) > 16


@pytest.mark.parametrize("workers", [0, 2])
def test_all_rows_asked_for_come_in_order(tmp_path: Path, workers: int) -> None:
    paths = [str(tmp_path / f"{n}.png") for n in range(150)]
    for number, path in enumerate(paths):
        noise(20 + number, 20, number).save(path)
    seen: list[int] = []
    table = picture_dataset(paths, [0] * 150, ("a",))
    rows = range(1, 150, 2)
    facts = list(examine_all(table, rows, image_size=32, in_full=False, workers=workers, progress=seen.append))
    assert [f.row for f in facts] == list(rows)
    assert [f.width for f in facts] == [20 + row for row in rows]
    assert sum(seen) == len(rows)
