from __future__ import annotations

import io
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encode, noise
from PIL import Image, ImageOps

from tuning.data import images
from tuning.data.images import UnreadableImage, decode


@pytest.fixture(params=["simplejpeg", "pil"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with the fast JPEG decoder and without it."""
    if request.param == "pil":
        monkeypatch.setattr(images, "simplejpeg", None)
    elif images.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")
    return str(request.param)


def as_array(source: bytes | str, min_side: int = 0) -> np.ndarray:
    pixels = decode(source, min_side=min_side)
    assert pixels.dtype == torch.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.is_contiguous()
    return pixels.numpy()


def pil(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")
    )


# --- sound pictures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subsampling", [0, 1, 2, "4:1:1"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_equals_pil(decoder: str, subsampling: int | str, progressive: bool, mode: str) -> None:
    data = encode(noise(203, 147).convert(mode), "JPEG", subsampling=subsampling, progressive=progressive, quality=85)
    np.testing.assert_array_equal(as_array(data), pil(data))


def test_simplejpeg_is_used_when_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    if images.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")

    def refuse(*_: object) -> None:
        raise AssertionError("PIL decoded a plain JPEG")

    monkeypatch.setattr(images, "_decode_jpeg_with_pil", refuse)
    as_array(encode(noise(), "JPEG"))


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", "RGB"), ("PNG", "L"), ("PNG", "1"), ("PNG", "P"), ("BMP", "RGB"), ("GIF", "P"), ("TIFF", "RGB"),
     ("PPM", "RGB"), ("PPM", "L"), ("WEBP", "RGB"), ("TIFF", "CMYK"), ("JPEG2000", "RGB")],
)  # fmt: skip
def test_other_formats_equal_pil(kind: str, mode: str) -> None:
    data = encode(noise().convert(mode), kind)
    np.testing.assert_array_equal(as_array(data), pil(data))


def test_a_path_equals_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "grün und blau 猫.jpg"
    path.write_bytes(encode(noise(), "JPEG"))
    np.testing.assert_array_equal(as_array(str(path)), as_array(path.read_bytes()))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind: str) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(values / 257).astype(np.uint8)
    result = as_array(encode(Image.fromarray(values), kind))
    for channel in range(3):
        np.testing.assert_array_equal(result[:, :, channel], expected)


def test_sixteen_bit_pgm_and_big_endian_tiff() -> None:
    values = np.array([[0, 257], [32896, 65535]], np.uint16)
    pgm = b"P5 2 2 65535\n" + values.astype(">u2").tobytes()
    big = Image.frombytes("I;16B", (2, 2), values.astype(">u2").tobytes())
    for data in (pgm, encode(big, "TIFF")):
        assert as_array(data)[:, :, 0].tolist() == [[0, 1], [128, 255]]


def test_alpha_is_laid_on_white() -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    rgba[0, 1] = (10, 20, 30, 0)
    rgba[1, 0] = (0, 0, 0, 128)
    pixels = as_array(encode(Image.fromarray(rgba)))
    assert pixels[0, 0].tolist() == [10, 20, 30]
    assert pixels[0, 1].tolist() == [255, 255, 255]
    assert pixels[1, 0].tolist() == [127, 127, 127]


def test_grey_with_alpha_is_laid_on_white() -> None:
    pixels = as_array(encode(Image.fromarray(np.array([[[50, 255], [50, 0]]], np.uint8), "LA")))
    assert pixels[0].tolist() == [[50, 50, 50], [255, 255, 255]]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_transparent_palette_is_laid_on_white(kind: str) -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.putpixel((1, 0), 1)
    pixels = as_array(encode(image, kind, transparency=0))
    assert pixels[0].tolist() == [[255, 255, 255], [0, 0, 200]]


def test_transparent_colour_of_an_rgb_png() -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    assert as_array(encode(image, transparency=(1, 2, 3)))[0].tolist() == [[255, 255, 255], [9, 9, 9]]


def test_cmyk_jpeg_equals_pil(decoder: str) -> None:
    data = encode(noise().convert("CMYK"), "JPEG")
    np.testing.assert_array_equal(as_array(data), pil(data))


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_several_frames_give_the_first(kind: str) -> None:
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = as_array(encode(first, kind, save_all=True, append_images=[second], **options))
    assert pixels[4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_equals_pil(decoder: str, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(noise(), kind, exif=exif)
    image = Image.open(io.BytesIO(data))
    image.load()
    np.testing.assert_array_equal(as_array(data), np.asarray(ImageOps.exif_transpose(image).convert("RGB")))


def test_orientation_changes_something() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert as_array(encode(noise(40, 30), "JPEG", exif=exif)).shape == (40, 30, 3)


def test_damaged_exif_does_not_cost_the_picture(decoder: str) -> None:
    data = encode(noise(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(range(40)))
    np.testing.assert_array_equal(as_array(data), pil(data))


def test_orientation_is_found_behind_other_segments(decoder: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(noise(), "JPEG", exif=exif, icc_profile=b"\xff\xda" * 40_000, comment=b"x" * 60_000)
    place = data.index(b"\xff\xe1")
    length = 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    moved = data[:place] + data[place + length :]
    scan = moved.rindex(b"\xff\xdb\x00")
    late = moved[:scan] + b"\xff\xff" + data[place : place + length] + moved[scan:]
    for variant in (data, late):
        assert as_array(variant).shape == (40, 30, 3)


def test_stray_bytes_behind_a_jpeg_are_harmless(decoder: str) -> None:
    data = encode(noise(), "JPEG")
    np.testing.assert_array_equal(as_array(data + b"trailing rubbish"), as_array(data))


# --- large pictures -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def enormous() -> bytes:
    """108 megapixels, 12000 x 9000."""
    return encode(Image.new("L", (12_000, 9_000), 77), "JPEG", quality=30)


def test_an_enormous_jpeg_is_reduced(decoder: str, enormous: bytes) -> None:
    pixels = as_array(enormous, min_side=224)
    assert 448 <= min(pixels.shape[:2]) <= 1200
    assert pixels.shape[1] / pixels.shape[0] == pytest.approx(4 / 3, rel=0.01)
    assert np.abs(pixels.astype(int) - 77).max() <= 2


def test_an_ordinary_jpeg_is_decoded_in_full(decoder: str) -> None:
    assert as_array(encode(noise(1200, 900), "JPEG"), min_side=16).shape == (900, 1200, 3)


def test_the_short_side_is_never_reduced_below_twice_the_need(monkeypatch: pytest.MonkeyPatch, decoder: str) -> None:
    monkeypatch.setattr(images, "REDUCE_ABOVE", 1000)
    data = encode(noise(800, 600), "JPEG")
    for need in (10, 33, 74, 149, 299, 300, 301):
        assert min(as_array(data, min_side=need).shape[:2]) >= min(2 * need, 600)
    assert min(as_array(data, min_side=10).shape[:2]) < 600
    assert min(as_array(data).shape[:2]) == 600


def test_a_jpeg_above_the_bound_is_read_reduced_or_not_at_all(monkeypatch: pytest.MonkeyPatch, decoder: str) -> None:
    monkeypatch.setattr(images, "REDUCE_ABOVE", 1000)
    monkeypatch.setattr(images, "MAX_PIXELS", 100_000)
    data = encode(noise(800, 600), "JPEG")
    assert as_array(data, min_side=32).shape == (75, 100, 3)
    with pytest.raises(UnreadableImage, match="800 x 600 pixels exceed the limit of 100,000"):
        decode(data)
    with pytest.raises(UnreadableImage, match="800 x 600 pixels"):
        decode(encode(noise(800, 600), "JPEG", progressive=True), min_side=32)


@pytest.mark.parametrize("size", [(60_000, 60_000), (20_000, 9_000)])
def test_a_decompression_bomb_is_refused_by_its_size(size: tuple[int, int]) -> None:
    with pytest.raises(UnreadableImage, match=r"pixels"):
        decode(png_header(*size))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "L", "1", "I;16"])
def test_large_pictures_are_converted_in_strips_without_a_change(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    image = noise(203, 147)
    image.putalpha(noise(203, 147, 1).convert("L"))
    grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
    data = encode(Image.fromarray(grey) if mode == "I;16" else image.convert(mode))
    whole = as_array(data)
    monkeypatch.setattr(images, "STRIP_PIXELS", 1000)
    np.testing.assert_array_equal(as_array(data), whole)


@pytest.mark.parametrize(("kind", "fits"), [("PNG", True), ("GIF", True), ("WEBP", False), ("TIFF", False)])
def test_formats_whose_decoders_keep_copies_have_a_lower_limit(
    monkeypatch: pytest.MonkeyPatch, kind: str, fits: bool
) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 10_000)
    data = encode(noise(80, 80), kind)
    if fits:
        assert as_array(data).shape == (80, 80, 3)
    else:
        with pytest.raises(UnreadableImage, match=r"80 x 80 pixels exceed the limit of 4,000"):
            decode(data)


@pytest.mark.parametrize("kind", ["gif", "webp", "tiff"])
def test_a_header_that_promises_too_much_costs_nothing(kind: str) -> None:
    side = 16_383
    canvas = (side - 1).to_bytes(3, "little") * 2
    webp = b"VP8X" + struct.pack("<I", 10) + bytes(4) + canvas + encode(noise(), "WEBP")[12:]
    tags = [(256, side), (257, side), (258, 8), (259, 8), (262, 1), (273, 8), (277, 1), (278, side), (279, 9)]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    header = {
        "gif": b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + bytes(3) + encode(noise(), "GIF")[13:],
        "webp": b"RIFF" + struct.pack("<I", len(webp) + 4) + b"WEBP" + webp,
        "tiff": b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory + bytes(4),
    }[kind]
    tracemalloc.start()
    try:
        with pytest.raises(UnreadableImage):
            decode(header)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"iTXt"])
def test_a_compressed_text_does_not_unfold(kind: bytes) -> None:
    bomb = zlib.compress(bytes(100_000_000), 1)
    body = b"name\0" + (b"\1\0\0\0" if kind == b"iTXt" else b"\0") + bomb
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    sound = encode(noise())
    place = 33  # behind the header
    tracemalloc.start()
    survives(sound[:place] + chunk + sound[place:])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000


def test_a_large_png_does_not_warn() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        survives(png_header(12_000, 9_000))
    assert [str(warning.message) for warning in seen if "PIL" in (warning.filename or "")] == []


# --- pictures that cannot be read -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty"), (b"hello, world", "not a picture"), (b"\xff\xd8\xff", "pictur|JPEG|truncated|marker|EOF|file"),
     (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a picture"), (png_header(10, 10), "truncated")],
)  # fmt: skip
def test_foreign_content_is_named(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason):
        decode(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncated_files_are_named_with_path(decoder: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "cut off.img"
    data = encode(noise(200, 200), kind)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UnreadableImage, match=r"cut off\.img: .*truncated"):
        decode(str(path))


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match=r"gone\.jpg: No such file"):
        decode(str(tmp_path / "gone.jpg"))
    with pytest.raises(UnreadableImage, match="directory"):
        decode(str(tmp_path))


def test_float_and_32_bit_pixels_are_refused_with_the_reason() -> None:
    with pytest.raises(UnreadableImage, match="floating-point"):
        decode(encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))
    with pytest.raises(UnreadableImage, match="32-bit integer"):
        decode(encode(Image.fromarray(np.ones((4, 4), np.int32)), "TIFF"))


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0"])
)
def test_random_bytes_raise_nothing_else(data: bytes, start: bytes) -> None:
    survives(start + data)


SAMPLES = [
    encode(noise(), "JPEG"),
    encode(
        noise(),
        "JPEG",
        progressive=True,
        exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0",
    ),
    encode(noise()),
    encode(noise().convert("P"), "GIF"),
    encode(noise(), "TIFF"),
    encode(noise(), "WEBP"),
]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(SAMPLES),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8),
    st.floats(0, 1),
    st.booleans(),
)
def test_mutated_pictures_raise_nothing_else(
    data: bytes, changes: list[tuple[float, int]], length: float, cut: bool
) -> None:
    broken = bytearray(data)
    for place, value in changes:
        broken[int(place * (len(broken) - 1))] = value
    survives(bytes(broken[: int(length * len(broken))] if cut else broken))


def survives(data: bytes) -> None:
    try:
        pixels = decode(data, min_side=8)
    except UnreadableImage as error:
        assert len(str(error)) > 10  # noqa: PT017 (either outcome is fine)
    else:
        assert pixels.shape[2] == 3
        assert pixels.dtype == torch.uint8
