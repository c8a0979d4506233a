"""Image files of every kind become 8-bit RGB or gray images, or are refused by name; what is left out is said."""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fixify.data import decoding
from fixify.data.decoding import (
    ANIMATED,
    INTEGERS,
    ROTATED,
    SIXTEEN_BITS,
    TRANSPARENT,
    convert_mode,
    decode,
    remarks_on,
)
from fixify.errors import DataError, LoaderError

GRAY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
RGB = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def save(image: Image.Image, path: Path, **given: Any) -> Path:
    image.save(path, **given)
    return path


def read(path: Path, mode: str = "RGB") -> np.ndarray[Any, Any]:
    return np.asarray(convert_mode(decode(path, path), mode, path))


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp", "ppm"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_ordinary_images_are_pillows(tmp_path: Path, suffix: str, mode: str) -> None:
    path = save(Image.fromarray(RGB), tmp_path / f"a.{suffix}")
    with Image.open(path) as pillows:
        assert np.array_equal(read(path, mode), np.asarray(pillows.convert(mode)))
    assert remarks_on(decode(path, path)) == []


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
@pytest.mark.parametrize("factor", [257, 256])
def test_16_bits_are_read_as_their_8_bit_twins(tmp_path: Path, suffix: str, mode: str, factor: int) -> None:
    path = save(Image.fromarray(GRAY.astype(np.uint16) * factor), tmp_path / f"a.{suffix}")
    assert np.array_equal(read(path, mode), np.asarray(Image.fromarray(GRAY).convert(mode)))
    assert remarks_on(decode(path, path)) == [SIXTEEN_BITS.format(16, "65,535")]


@pytest.mark.parametrize(("most", "stated"), [(4095, True), (1023, True), (4095, False), (5000, False)])
def test_a_tiff_may_say_that_it_has_fewer_bits(tmp_path: Path, most: int, stated: bool) -> None:
    path = tmp_path / "a.tif"
    values = np.array([[0, 255, most // 2, most]], np.uint16)
    limit = most if stated else 4095
    Image.fromarray(values).save(path, tiffinfo={281: limit} if stated or most > limit else {})
    image = decode(path, path)
    known = limit if stated else 65_535  # nothing is said, or a value contradicts it
    found = np.asarray(convert_mode(image, "L", "")).astype(int)
    assert np.abs(found - values * (255 / known)).max() <= 1
    assert remarks_on(image) == [SIXTEEN_BITS.format(known.bit_length(), f"{known:,}")]


@pytest.mark.parametrize("byte_order", ["I;16", "I;16B"])
def test_16_bits_in_either_byte_order(byte_order: str) -> None:
    values = (GRAY.astype(np.uint16) * 257).astype("<u2" if byte_order == "I;16" else ">u2")
    image = Image.frombytes(byte_order, (8, 8), values.tobytes())
    assert np.array_equal(np.asarray(convert_mode(image, "L", "")), GRAY)
    assert remarks_on(image) == [SIXTEEN_BITS.format(16, "65,535")]


@pytest.mark.parametrize("most", [1, 255, 65_535])
def test_floats_are_scaled_by_their_range(tmp_path: Path, most: int) -> None:
    values = GRAY.astype(np.float32) / np.float32(255) * np.float32(most)
    path = save(Image.fromarray(values), tmp_path / "a.tif")
    assert np.array_equal(read(path, "L"), GRAY)
    assert [f"{most:,}" in remark for remark in remarks_on(decode(path, path))] == [True]


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5, 70_000])
def test_floats_without_a_known_range_are_refused(tmp_path: Path, value: float) -> None:
    values = GRAY.astype(np.float32)
    values[3, 4] = value
    path = save(Image.fromarray(values), tmp_path / "a.tif")
    image = decode(path, path)
    with pytest.raises(DataError, match=r"a\.tif"):
        convert_mode(image, "RGB", path)
    assert remarks_on(image) == []


@pytest.mark.parametrize(("factor", "remarks"), [(1, []), (257, [INTEGERS])])
def test_32_bit_integers(tmp_path: Path, factor: int, remarks: list[str]) -> None:
    path = save(Image.fromarray(GRAY.astype(np.int32) * factor), tmp_path / "a.tif")
    assert np.array_equal(read(path, "L"), GRAY)
    assert remarks_on(decode(path, path)) == remarks


@pytest.mark.parametrize("value", [-1, 65_536])
def test_32_bit_integers_beyond_16_bits_are_refused(tmp_path: Path, value: int) -> None:
    path = save(Image.fromarray(np.full((4, 4), value, np.int32)), tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif.*65,53[56]|a\.tif.*-1"):
        read(path)


def _palette(transparency: bytes | int) -> tuple[Image.Image, dict[str, Any]]:
    image = Image.fromarray(RGB).quantize(4)
    return image, {"transparency": transparency}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: (Image.fromarray(np.dstack([RGB, GRAY])), {}), [TRANSPARENT]),
        (lambda: (Image.fromarray(np.dstack([RGB, np.full_like(GRAY, 255)])), {}), []),
        (lambda: (Image.merge("LA", [Image.fromarray(GRAY), Image.fromarray(GRAY)]), {}), [TRANSPARENT]),
        (lambda: _palette(b"\x00\x80\xff\xff"), [TRANSPARENT]),
        (lambda: _palette(1), [TRANSPARENT]),
        (lambda: _palette(b"\xff\xff\xff\xff"), []),
        (lambda: (Image.fromarray(RGB), {"transparency": tuple(RGB[0, 0].tolist())}), [TRANSPARENT]),
        (lambda: (Image.fromarray(GRAY), {"transparency": 8}), [TRANSPARENT]),
        (lambda: (Image.fromarray(GRAY), {"transparency": 7}), []),
    ],
)
def test_transparency_is_dropped_aloud(
    tmp_path: Path, make: Callable[[], tuple[Image.Image, dict[str, Any]]], said: list[str]
) -> None:
    image, given = make()
    path = save(image, tmp_path / "a.png", **given)
    assert remarks_on(decode(path, path)) == said
    assert np.array_equal(read(path), np.asarray(image.convert("RGB")))  # the palette's warning would be an error here


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk(tmp_path: Path, suffix: str) -> None:
    path = save(Image.new("RGB", (8, 8), (250, 20, 20)).convert("CMYK"), tmp_path / f"a.{suffix}")
    assert np.abs(read(path).astype(int) - [250, 20, 20]).max() < 8
    assert remarks_on(decode(path, path)) == []


@pytest.mark.parametrize(("mode", "expected"), [("RGB", [200, 30, 60]), ("L", [84])])
def test_lab(tmp_path: Path, mode: str, expected: list[int]) -> None:
    path = save(Image.new("RGB", (8, 8), (200, 30, 60)).convert("LAB"), tmp_path / "a.tif")
    assert decode(path, path).mode == "LAB"
    assert np.abs(read(path, mode).reshape(64, -1).astype(int) - expected).max() < 4


@pytest.mark.parametrize(
    "mode", ["1", "P", "PA", "La", "RGBa", "RGBX", "YCbCr", "HSV", "LAB", "CMYK", "I", "F", "I;16N"]
)
@pytest.mark.parametrize("to", ["RGB", "L"])
def test_every_mode_of_pillow_is_converted(mode: str, to: str) -> None:
    image = Image.new(mode, (3, 2))
    assert convert_mode(image, to, "").mode == to
    assert all(isinstance(remark, str) for remark in remarks_on(image))


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    path = save(Image.fromarray(GRAY > 100), tmp_path / "a.png")
    assert decode(path, path).mode == "1"
    assert np.array_equal(read(path, "L"), np.where(GRAY > 100, 255, 0))


@pytest.mark.parametrize(("orientation", "said"), [(6, [ROTATED]), (1, [])])
def test_an_exif_rotation_is_left_out_aloud(tmp_path: Path, orientation: int, said: list[str]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(Image.fromarray(RGB), tmp_path / "a.png", exif=exif)
    assert remarks_on(decode(path, path)) == said
    assert np.array_equal(read(path), RGB)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_the_first_frame_is_taken_aloud(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if suffix == "webp" else {}))
    for file in (path, io.BytesIO(path.read_bytes())):
        image = decode(file, path)
        assert remarks_on(image) == [ANIMATED]
        assert np.array_equal(np.asarray(convert_mode(image, "RGB", "")), np.asarray(frames[0]))


def test_damage_behind_the_first_page_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(RGB).save(path, save_all=True, append_images=[Image.fromarray(RGB)])
    path.write_bytes(path.read_bytes()[:-150])
    assert np.array_equal(read(path), RGB)


ERRORS = [
    RuntimeError("Failed to decode frame 0"),
    NotImplementedError("Unimplemented DXGI format 5"),
    AttributeError("'NoneType' object has no attribute 'seek'"),
    MemoryError(),
    AssertionError(),
    IndexError("index out of range"),
    KeyError(259),
    ZeroDivisionError("division by zero"),
    RecursionError("maximum recursion depth exceeded"),
    OSError(errno.EIO, "Input/output error"),
    SyntaxError("broken PNG file"),
    ValueError("conversion from X to Y not supported"),
    Image.DecompressionBombError("Image size exceeds limit"),
]


@pytest.mark.parametrize("error", ERRORS, ids=[type(error).__name__ for error in ERRORS])
@pytest.mark.parametrize("step", ["open", "load", "convert"])
def test_every_exception_names_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, step: str
) -> None:
    path = save(Image.fromarray(GRAY), tmp_path / "a.png")

    def fail(*_given: Any, **_more: Any) -> Any:
        raise error

    where = {"open": "PIL.Image.open", "load": "PIL.ImageFile.ImageFile.load", "convert": "PIL.Image.Image.convert"}
    monkeypatch.setattr(where[step], fail)
    with pytest.raises(DataError) as caught:
        read(path)
    assert not isinstance(caught.value, LoaderError)
    assert re.search(r"a\.png: \S", caught.value.message) and "\n" not in caught.value.message


def test_a_reason_has_no_addresses_and_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    words = []
    for address in ("0x7f12ab", "0x7f99cd"):
        error = ValueError(f"<BytesIO at {address}>\n" + 300 * "long ")
        words.append(decoding.unreadable(error, "a.png").message)
    assert words[0] == words[1] and len(words[0]) < 260


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_too_many_open_files_are_no_fault_of_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = save(Image.fromarray(GRAY), tmp_path / "a.png")

    def fail(_file: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(LoaderError, match="too many files") as caught:
        decode(path, path)
    assert "ulimit" in str(caught.value.hint)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "nothing", "link to nothing"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to nothing":
        path.symlink_to(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"a\.png"):
        decode(path, path)


def test_a_damaged_avif_under_another_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    pixels = (150 + np.random.default_rng(0).normal(0, 25, (96, 96, 3))).clip(0, 255).astype(np.uint8)
    try:
        Image.fromarray(pixels).save(path, "AVIF")
    except (KeyError, OSError):
        pytest.skip("This Pillow has no AVIF.")
    assert read(path).shape == pixels.shape
    data, messages = path.read_bytes(), []
    for position in range(len(data) // 4, len(data), len(data) // 50):
        path.write_bytes(data[:position] + b"\xff" * 16 + data[position + 16 :])
        try:
            read(path)
        except DataError as error:
            messages.append(error.message)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError):
        read(path)
    assert all("a.jpg" in message for message in messages)
