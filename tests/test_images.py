"""The loader of pictures: every scale, layout and kind of file that has one meaning, and the rest.

Each test writes pictures as people and programs do, and looks at what the model would see.
"""

import shutil
import struct
import subprocess
import sys
import zlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, generator, run
from PIL import Image

from sgld_nrg import sample
from sgld_nrg.models import load_model
from sgld_nrg.support import data, image_files, images, metrics, ood
from sgld_nrg.support.commands import parse
from sgld_nrg.support.detector import detector_for
from sgld_nrg.support.errors import UserError
from sgld_nrg.support.images import open_pictures, read_all
from sgld_nrg.support.reading import Reading
from sgld_nrg.support.report import detection

UNIT = np.random.default_rng(0).random((20, 8, 8))  # grey pictures, black 0 and white 1
UNIT.flat[:2] = 0, 1
COLOUR = np.random.default_rng(1).random((5, 3, 8, 8))
COLOUR.flat[:2] = 0, 1
SQUARE = np.zeros((8, 8))
SQUARE[2:6, 2:6] = 1


def read(path, shape=(1, 8, 8), **reading):
    """Return a path's pictures as the model sees them, in [0, 1], and what was found in words."""
    found = open_pictures(Path(path), Reading(**reading))
    return (read_all(found, range(len(found)), shape).numpy() + 1) / 2, found.words


def refusal(path, **reading):
    """Return the sentence with which a path is refused."""
    with pytest.raises(UserError) as caught:
        read(path, **reading)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def written(tmp_path):
    """A function that writes a picture or an array into a folder of its own: its path."""

    def write(name, what, **settings):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(what, bytes):
            path.write_bytes(what)
        elif isinstance(what, Image.Image):
            what.save(path, **settings)
        elif path.suffix in (".npy", ".npz"):
            (np.save if path.suffix == ".npy" else np.savez)(path, what)
        else:
            Image.fromarray(what).save(path, **settings)
        return path

    return write


def in_bytes(unit):
    """Return pictures in [0, 1] as bytes."""
    return np.round(unit * 255).astype(np.uint8)


def png(size, bits, kind, rows, transparent=None):
    """Return a PNG's bytes. size: width, height. kind: 0 grey, 2 colour. rows: bytes of each."""

    def chunk(name, content):
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, kind, 0, 0, 0))]
    if transparent is not None:
        parts.append(chunk(b"tRNS", b"".join(struct.pack(">H", each) for each in transparent)))
    parts.append(chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def tiff(side, bits, numbers, white_is_zero=False, sample_format=1):
    """Return an uncompressed TIFF's bytes: grey, square, with these bits for each number."""
    entries = {256: side, 257: side, 258: bits, 259: 1, 262: 0 if white_is_zero else 1, 273: 8}
    entries |= {277: 1, 278: side, 279: len(numbers), 339: sample_format}
    entries[273] = 8 + 2 + 12 * len(entries) + 4
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, n) for tag, n in sorted(entries.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4) + numbers


# The numbers of arrays: what is black, what is white.

ONE_MEANING = {
    "from 0 to 1": lambda unit: unit.astype(np.float32),
    "from 0 to 1 in half precision": lambda unit: unit.astype(np.float16),
    "from 0 to 1 and what rounding adds": lambda unit: unit * 1.0002 - 1e-4,
    "from 0 to 1, big-endian": lambda unit: unit.astype(">f4"),
    "from 0 to 1, none of them either": lambda unit: unit * 0.6 + 0.2,
    "from -1 to 1": lambda unit: unit * 2 - 1,
    "from -1 to 1 in half precision": lambda unit: (unit * 2 - 1).astype(np.float16),
    "bytes": in_bytes,
    "dark bytes": lambda unit: in_bytes(unit / 4),
    "whole numbers from 0 to 255": lambda unit: np.round(unit * 255),
    "fractions from 0 to 255": lambda unit: unit * 255,
    "int64 from 0 to 255": lambda unit: np.round(unit * 255).astype(np.int64),
    "int16 from 0 to 255": lambda unit: np.round(unit * 255).astype(np.int16),
    "uint32 from 0 to 255": lambda unit: np.round(unit * 255).astype(np.uint32),
    "16 bits": lambda unit: np.round(unit * 65535).astype(np.uint16),
    "16 bits, big-endian": lambda unit: np.round(unit * 65535).astype(">u2"),
    "black and white": lambda unit: unit > 0.5,
    "black and white in floats": lambda unit: (unit > 0.5).astype(np.float32),
    "black and white in bytes": lambda unit: in_bytes(unit > 0.5),
}


@pytest.mark.parametrize("name", ONE_MEANING)
def test_numbers_of_one_meaning_are_read_as_that(name, written):
    array = ONE_MEANING[name](UNIT)
    wanted = UNIT > 0.5 if "and white" in name else UNIT
    wanted = UNIT * 0.6 + 0.2 if "none of them" in name else wanted
    wanted = UNIT / 4 if "dark" in name else wanted
    seen, words = read(written("a.npy", array))
    np.testing.assert_allclose(seen[:, 0], wanted, atol=0.0025)
    assert words.startswith("grey, 8x8, ") and str(array.dtype) in words


def one_stray(unit, value):
    unit = unit.copy()
    unit.flat[7] = value
    return unit


TWO_MEANINGS = {
    "one pixel of 1.02": (lambda unit: one_stray(unit, 1.02), (0, 1.02)),
    "one pixel of 200": (lambda unit: one_stray(unit, 200), (0, 200)),
    "one pixel of -0.1": (lambda unit: one_stray(unit, -0.1), (-0.1, 1)),
    "divided by 255 twice": (lambda unit: unit / 255, (0, 1 / 255)),
    "from -0.98 to 0.98": (lambda unit: (unit * 2 - 1) * 0.98, (-0.98, 0.98)),
    "from -0.5 to 0.5": (lambda unit: unit - 0.5, (-0.5, 0.5)),
    "percent": (lambda unit: unit * 100, (0, 100)),
    "whole percent": (lambda unit: np.round(unit * 100).astype(np.int64), (0, 100)),
    "counts from 0 to 16": (lambda unit: np.round(unit * 16), (0, 16)),
    "bytes from 0 to 16": (lambda unit: np.round(unit * 16).astype(np.uint8), (0, 16)),
    "12 bits in 16": (lambda unit: np.round(unit * 4095).astype(np.uint16), (0, 4095)),
    "bytes in 16 bits": (lambda unit: np.round(unit * 255).astype(np.uint16), (0, 255)),
    "16 bits in 64": (lambda unit: np.round(unit * 65535).astype(np.int64), (0, 65535)),
    "16 bits in floats": (lambda unit: unit * 65535, (0, 65535)),
    "signed bytes": (lambda unit: np.round(unit * 255 - 128).astype(np.int8), (-128, 127)),
    "bytes of 0 and 1": (lambda unit: (unit > 0.5).astype(np.uint8), (0, 1)),
    "int64 of 0 and 1": (lambda unit: (unit > 0.5).astype(np.int64), (0, 1)),
    "standardised": (lambda unit: (unit - 0.5) / 0.25, (-2, 2)),
}


@pytest.mark.parametrize("name", TWO_MEANINGS)
def test_numbers_of_two_meanings_are_refused_and_read_as_told(name, written):
    encode, scale = TWO_MEANINGS[name]
    array = encode(UNIT)
    path = written("a.npz", array)
    sentence = refusal(path)
    low, high = (f"{float(number):.9g}" for number in (array.min(), array.max()))
    for found in ("a.npz", str(array.dtype), "(20, 8, 8)", f"from {low} to {high}"):
        assert found in sentence
    assert "--pixel-range" in sentence
    wanted = UNIT > 0.5 if "0 and 1" in name else UNIT
    span = scale[1] - scale[0]
    kept = wanted.ravel() if "pixel of" not in name else np.delete(UNIT, 7)
    seen, _ = read(path, pixel_range=scale)
    seen = seen.ravel() if "pixel of" not in name else np.delete(seen, 7) * span + scale[0]
    np.testing.assert_allclose(seen, kept, atol=0.035 if "to 16" in name else 0.006)


@pytest.mark.parametrize(
    "value, dtype, grey",
    [
        *[(0, dtype, 0) for dtype in ("u1", "u2", "i8", "f2", "f4", "f8", "?")],
        (255, "u1", 1),
        (51, "u1", 0.2),
        (65535, "u2", 1),
        (1, "?", 1),
        (1, "f4", 1),
        (0.5, "f4", 0.5),
        (-1, "f4", 0),
        (255, "f4", 1),
        (255, "i8", 1),
    ],
)
def test_one_shade_of_grey_is_read_as_that(value, dtype, grey, written):
    seen, _ = read(written("a.npy", np.full((3, 1, 8, 8), value, dtype)))
    np.testing.assert_allclose(seen, grey, atol=1e-6)


@pytest.mark.parametrize(
    "value, dtype", [(1, "u1"), (1, "i8"), (51, "f4"), (0.02, "f4"), (9, "u2")]
)
def test_one_shade_of_a_scale_that_may_be_another_is_refused(value, dtype, written):
    assert "--pixel-range" in refusal(written("a.npy", np.full((3, 1, 8, 8), value, dtype)))


def test_numbers_outside_the_range_that_was_given_are_refused(written):
    for scale in ((0, 0.5), (0.5, 1)):
        sentence = refusal(written("a.npy", UNIT), pixel_range=scale)
        assert "from 0 to 1" in sentence and "--pixel-range" in sentence


@pytest.mark.parametrize("script", ["train_classifier", "train_jem", "sample", "evaluate"])
@pytest.mark.parametrize("scale", [("1", "0"), ("3", "3"), ("nan", "1"), ("0", "inf")])
def test_a_range_that_is_none_is_refused(script, scale, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(script, ["--pixel-range", *scale])
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.startswith(f"error: --pixel-range {scale[0]}")
    assert message.count("\n") == 1


# The axes of arrays.


@pytest.mark.parametrize(
    "layout, kind",
    [
        (lambda colour: colour, "colour"),
        (lambda colour: colour.transpose(0, 2, 3, 1), "colour"),
        (lambda colour: np.asfortranarray(colour), "colour"),
        (lambda colour: np.concatenate([colour, np.ones((5, 1, 8, 8))], 1), "colour with alpha"),
        (lambda c: np.insert(c.transpose(0, 2, 3, 1), 3, 1, axis=3), "colour with alpha"),
    ],
)
def test_the_channels_of_an_array_are_where_its_shape_says(layout, kind, written):
    seen, words = read(written("a.npy", layout(COLOUR)), (3, 8, 8))
    np.testing.assert_allclose(seen, COLOUR, atol=1e-6)
    assert words.startswith(f"{kind}, 8x8, float64 from 0 to 1")
    grey, _ = read(written("a.npy", layout(COLOUR)))
    luma = 0.299 * COLOUR[:, 0] + 0.587 * COLOUR[:, 1] + 0.114 * COLOUR[:, 2]
    np.testing.assert_allclose(grey[:, 0], luma, atol=1e-6)


@pytest.mark.parametrize("shape", [(20, 8, 8), (20, 1, 8, 8), (20, 8, 8, 1)])
def test_grey_arrays_of_any_layout_fill_every_channel(shape, written):
    seen, words = read(written("a.npy", UNIT.reshape(shape)), (3, 8, 8))
    np.testing.assert_allclose(seen, np.stack([UNIT] * 3, axis=1), atol=1e-6)
    assert words.startswith("grey, 8x8")


@pytest.mark.parametrize("shape", [(5, 8, 8), (5, 1, 16, 16), (5, 8, 8, 3), (5, 30, 20)])
@pytest.mark.parametrize("suffix", [".npy", ".npz", ".NPY"])
def test_arrays_of_any_size_are_brought_to_the_models_shape(shape, suffix, written):
    array = np.full(shape, 51, np.uint8)
    path = written("a.npz" if suffix == ".npz" else "a.npy", array)
    seen, _ = read(path.rename(path.with_name(f"bilder ü 数{suffix}")))
    assert seen.shape == (5, 1, 8, 8)
    np.testing.assert_allclose(seen, 0.2, atol=1e-6)


@pytest.mark.parametrize("axis", [1, 3])
@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("encode", [lambda x: x, in_bytes, lambda x: x * 2 - 1])
def test_alpha_is_laid_over_paper_and_no_colour(axis, channels, encode, written):
    pictures = np.zeros((20, channels, 8, 8))
    pictures[:, -1] = UNIT  # black ink, the darker the less of the paper shows
    path = written("a.npy", np.moveaxis(encode(pictures), 1, axis))
    seen, words = read(path)
    np.testing.assert_allclose(seen[:, 0], 1 - UNIT, atol=0.0025)
    assert "with alpha" in words
    dark, _ = read(path, background="black")
    assert (dark < 1e-6).all()


@pytest.mark.parametrize(
    "colours, alpha", [(255.0, 1.0), (1.0, 255.0), (np.uint8(255), np.uint8(1)), (2.0, 1.0)]
)
def test_alpha_on_a_scale_of_its_own_is_refused(colours, alpha, written):
    pictures = np.full((5, 8, 8, 4), alpha) * np.ones(1, np.asarray(colours).dtype)
    pictures[..., :3] = colours
    assert "--pixel-range" in refusal(written("a.npy", pictures))


def test_alpha_of_minus_one_to_one_is_not_taken_for_zero_to_one(written):
    pictures = np.insert(COLOUR.transpose(0, 2, 3, 1) * 2 - 1, 3, 0.5, axis=3)
    sentence = refusal(written("a.npy", pictures))
    assert "alpha" in sentence and "from 0.5 to 0.5" in sentence
    seen, _ = read(written("a.npy", pictures), (3, 8, 8), pixel_range=(-1, 1))
    np.testing.assert_allclose(seen, COLOUR * 0.75 + 0.25, atol=1e-6)


@pytest.mark.parametrize("shape", [(20, 4, 8, 4), (20, 3, 9, 3), (20, 1, 9, 2), (5, 3, 3, 3)])
def test_two_axes_that_may_be_the_channels_are_refused_and_read_as_told(shape, written):
    array = np.random.default_rng(2).integers(0, 256, shape, dtype=np.uint8)
    array[:, -1] = array[..., -1] = 255  # opaque, if that is alpha
    path = written("a.npy", array)
    sentence = refusal(path)
    assert str(shape) in sentence and "uint8" in sentence and "--channel-axis" in sentence
    for asked, other in (("first", array), ("last", np.moveaxis(array, 3, 1))):
        _, words = read(path, channel_axis=asked)
        height, width = other.shape[2:]
        assert f"{width}x{height}" in words


def test_a_flag_that_is_not_needed_changes_nothing(written):
    path = written("a.npy", COLOUR)
    for asked in ("first", "last"):
        np.testing.assert_array_equal(read(path, channel_axis=asked)[0], read(path)[0])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_one_picture_by_itself_is_not_taken_for_many_grey_ones(channels, written):
    picture = np.random.default_rng(2).random((8, 8, channels))
    picture[:, :, 3:] = 1
    last, first = written("last.npy", picture), written("first.npy", picture.transpose(2, 0, 1))
    sentence = refusal(last)
    assert str(picture.shape) in sentence and "--channel-axis last" in sentence
    wanted = np.broadcast_to(picture.transpose(2, 0, 1)[:3], (3, 8, 8))
    seen, _ = read(last, (3, 8, 8), channel_axis="last")
    np.testing.assert_allclose(seen, wanted[None], atol=1e-6)
    seen, words = read(last, channel_axis="first")
    assert seen.shape == (8, 1, 8, 8) and f"{channels}x8" in words
    if channels > 1:
        assert "--channel-axis first" in refusal(first)
        seen, words = read(first, channel_axis="last")
        assert seen.shape == (channels, 1, 8, 8) and words.startswith("grey, 8x8")
    seen, _ = read(first, (3, 8, 8), channel_axis="first")
    np.testing.assert_allclose(seen, wanted[None], atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 8), (64,), (), (2, 5, 1, 8, 8), (0, 8, 8), (3, 0, 8)])
def test_arrays_of_no_pictures_are_refused_with_their_shape(shape, written):
    sentence = refusal(written("a.npy", np.zeros(shape)))
    assert str(shape) in sentence and "(N, H, W)" in sentence


def test_five_channels_are_refused(written):
    assert "1 to 4 channels" in refusal(written("a.npy", np.zeros((2, 5, 8, 8))))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(value, written):
    sentence = refusal(written("a.npy", one_stray(UNIT, value)), pixel_range=(0, 1))
    assert "finite" in sentence
    picture = written("a.tif", one_stray(SQUARE, value).astype(np.float32))
    for scale in (None, (0, 1)):
        assert "finite" in refusal(picture, pixel_range=scale)


@pytest.mark.parametrize("dtype", [complex, "datetime64[s]", "U3"])
def test_arrays_of_no_numbers_are_refused_with_their_type(dtype, written):
    array = np.zeros((3, 8, 8), dtype)
    assert str(array.dtype) in refusal(written("a.npy", array))


# Files: bits, colours, transparency.

SQUARE_FILES = {
    "a.png": in_bytes(SQUARE),
    "16 bits.png": (SQUARE * 65535).astype(np.uint16),
    "16 bits.tif": (SQUARE * 65535).astype(np.uint16),
    "16 bits, big-endian.tif": Image.frombytes(
        "I;16B", (8, 8), (SQUARE * 65535).astype(">u2").tobytes()
    ),
    "16 bits.pgm": b"P5\n8 8\n65535\n" + (SQUARE * 65535).astype(">u2").tobytes(),
    "12 bits.pgm": b"P5\n8 8\n4095\n" + (SQUARE * 4095).astype(">u2").tobytes(),
    "text.pgm": b"P2 8 8 9 " + b" ".join(b"%d" % (9 * each) for each in SQUARE.ravel()),
    "floats.tif": SQUARE.astype(np.float32),
    "floats to 255.tif": (SQUARE * 255).astype(np.float32),
    "floats from -1.tif": (SQUARE * 2 - 1).astype(np.float32),
    "32 bits to 255.tif": (SQUARE * 255).astype(np.int32),
    "a bit.png": Image.fromarray(SQUARE > 0),
    "a bit.bmp": Image.fromarray(SQUARE > 0),
    "a bit.tif": Image.fromarray(SQUARE > 0),
    "a bit.pbm": b"P1 8 8 " + b" ".join(b"%d" % (1 - each) for each in SQUARE.ravel()),
    "colour.bmp": Image.fromarray(in_bytes(SQUARE)).convert("RGB"),
    "palette.png": Image.fromarray(in_bytes(SQUARE)).convert("RGB").convert("P"),
    "palette.gif": Image.fromarray(in_bytes(SQUARE)).convert("RGB").convert("P"),
    "lossless.webp": Image.fromarray(in_bytes(SQUARE)),
    "a.jfif": Image.fromarray(in_bytes(SQUARE)),
    "16 bits, white is 0.tif": tiff(8, 16, (65535 - SQUARE * 65535).astype("<u2").tobytes(), True),
    "floats, white is 0.tif": tiff(8, 32, (1 - SQUARE).astype("<f4").tobytes(), True, 3),
    "bytes, white is 0.tif": tiff(8, 8, (255 - in_bytes(SQUARE)).tobytes(), True),
    "12 bits.tif": tiff(8, 12, np.packbits(np.repeat(SQUARE > 0, 12)).tobytes()),
}


@pytest.mark.parametrize("name", SQUARE_FILES)
def test_files_of_any_depth_have_the_same_black_and_white(name, written):
    settings = {"lossless.webp": {"lossless": True}, "a.jfif": {"format": "JPEG", "quality": 100}}
    seen, words = read(written(name, SQUARE_FILES[name], **settings.get(name, {})))
    np.testing.assert_allclose(seen[0, 0], SQUARE, atol=0.02)
    assert "8x8" in words and ("16-bit" in words) == (name[:2] in ("16", "12"))


@pytest.mark.parametrize("name, dtype", [("a.tif", np.uint16), ("a.png", np.uint16)])
def test_sixteen_bits_that_hold_twelve_are_read_as_told(name, dtype, written):
    path = written(name, (SQUARE * 4095).astype(dtype))
    assert read(path)[0].max() < 0.07  # by the full scale of 16 bits
    np.testing.assert_allclose(read(path, pixel_range=(0, 4095))[0][0, 0], SQUARE, atol=1e-6)
    assert "--pixel-range" in refusal(path, pixel_range=(0, 255))


@pytest.mark.parametrize("white", [1.5, 100, 65535])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_floats_and_32_bits_of_no_clear_scale_are_refused_and_read_as_told(white, dtype, written):
    array = (SQUARE * white).astype(dtype)
    path = written("a.tif", array)
    sentence = refusal(path)
    for found in ("a.tif", array.dtype.name, "(8, 8)", f"from 0 to {array.max():g}"):
        assert found in sentence
    assert "--pixel-range" in sentence
    seen, _ = read(path, pixel_range=(0, int(white) if dtype is np.int32 else white))
    np.testing.assert_allclose(seen[0, 0], SQUARE, atol=1e-6)


@pytest.mark.parametrize("other", [SQUARE * 255, SQUARE * 2 - 1])
def test_floating_point_files_of_one_folder_have_one_scale(other, written, tmp_path):
    written("set/a.tif", SQUARE.astype(np.float32))
    written("set/b.tif", other.astype(np.float32))
    assert "--pixel-range" in refusal(tmp_path / "set")
    assert read(tmp_path / "set", pixel_range=(-1, 255))[0].shape == (2, 1, 8, 8)


def ink(mode):
    """Return a drawing on transparent paper: a black square that half lets through its paper."""
    picture = np.zeros((8, 8, 4), np.uint8)
    picture[..., 3] = in_bytes(SQUARE * 0.6)
    return Image.fromarray(picture).convert(mode)


def coloured_palette():
    """Return a picture of a palette: red, with a square of white."""
    picture = Image.fromarray(SQUARE.astype(np.uint8), "P")
    picture.putpalette([255, 0, 0, 255, 255, 255])
    return picture


def test_a_palette_gives_colours(written):
    seen, words = read(written("a.png", coloured_palette()), (3, 8, 8))
    np.testing.assert_array_equal(seen[0], np.stack([np.ones((8, 8)), SQUARE, SQUARE]))
    assert words == "colour; 8x8"


def test_a_palette_of_greys_is_grey(written):
    picture = Image.fromarray(SQUARE.astype(np.uint8), "P")
    picture.putpalette([204] * 3 + [51] * 3)
    seen, words = read(written("a.png", picture))
    np.testing.assert_allclose(seen[0, 0], 0.8 - 0.6 * SQUARE, atol=1e-6)
    assert words == "grey; 8x8"
    _, words = read(written("b.png", picture, transparency=1))
    assert words == "grey with alpha; 8x8"


PAPER = {
    "RGBA.png": (ink("RGBA"), {}),
    "LA.png": (ink("LA"), {}),
    "RGBA.tif": (ink("RGBA"), {}),
    "RGBA.webp": (ink("RGBA"), {"lossless": True, "exact": True}),
}


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("background, paper", [("white", 1), ("black", 0)])
def test_a_drawing_on_transparent_paper_lies_on_white_or_black(name, background, paper, written):
    picture, settings = PAPER[name]
    seen, words = read(written(name, picture, **settings), background=background)
    np.testing.assert_allclose(seen[0, 0], paper * (1 - 0.6 * SQUARE), atol=0.002)
    assert "with alpha" in words


def packed(bits):
    """Return rows of a grey picture whose square is white, and what white is."""
    white = 2**bits - 1
    if bits == 16:
        return [(row * white).astype(">u2").tobytes() for row in SQUARE], white
    each = np.repeat(SQUARE > 0, bits, axis=1)  # all ones or all zeros
    return [row.tobytes() for row in np.packbits(each, axis=1)], white


GREY, DEEP = ([np.repeat(in_bytes(0.2 * row), n).tobytes() for row in SQUARE] for n in (3, 6))
KEYED = {  # bits, kind, rows, the square's number, and its shade
    **{f"grey of {bits} bits": (bits, 0, *packed(bits), 1) for bits in (1, 2, 4, 8, 16)},
    "colour": (8, 2, GREY, 51, 0.2),
    "colour of 16 bits": (16, 2, DEEP, 51 * 257, 0.2),
}


@pytest.mark.parametrize("name", KEYED)
def test_the_colour_that_stands_for_transparent_is_transparent(name, written):
    bits, kind, rows, number, shade = KEYED[name]
    for key, seen_on_white in ((number, SQUARE), (0, shade * SQUARE + (1 - SQUARE))):
        path = written("a.png", png((8, 8), bits, kind, rows, [key] * (3 if kind else 1)))
        seen, words = read(path)
        np.testing.assert_allclose(seen[0, 0], seen_on_white, atol=1e-6)
        assert "with alpha" in words
        seen, _ = read(path, background="black")
        np.testing.assert_allclose(seen[0, 0], 0 if key else shade * SQUARE, atol=1e-6)


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_a_transparent_entry_of_a_palette_is_transparent(suffix, written):
    picture = coloured_palette()
    path = written("a" + suffix, picture, transparency=0)
    seen, words = read(path, (3, 8, 8), background="black")
    np.testing.assert_array_equal(seen[0], np.stack([SQUARE] * 3))
    assert "colour with alpha" in words


def test_a_palette_with_shades_of_transparency(written):
    path = written("a.png", coloured_palette(), transparency=bytes([51, 255]))
    seen, _ = read(path, (3, 8, 8), background="black")
    np.testing.assert_allclose(seen[0, 0], 0.2 + 0.8 * SQUARE, atol=0.002)
    np.testing.assert_array_equal(seen[0, 1], SQUARE)


def test_transparency_survives_being_made_small(written):
    large = ink("RGBA").resize((800, 800), Image.Resampling.NEAREST)
    seen, _ = read(written("a.png", large))
    middle, paper = slice(3, 5), [0, 0, -1, -1]
    np.testing.assert_allclose(seen[0, 0, middle, middle], 0.4, atol=0.002)
    np.testing.assert_allclose(seen[0, 0, paper, [0, -1, 0, -1]], 1, atol=0.002)


def test_cmyk_of_a_jpeg_has_the_colours_that_viewers_show(written):
    picture = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    seen, words = read(written("a.jpg", picture, quality=100), (3, 8, 8))
    np.testing.assert_allclose(seen[0].mean((1, 2)), (1, 0, 0), atol=0.1)
    assert words == "colour; 32x32"


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG", "MPO"])
def test_of_several_frames_the_first_is_read_and_it_says_so(kind, written):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black", "red")]
    path = written("a.png", frames[0], format=kind, save_all=True, append_images=frames[1:])
    seen, words = read(path)
    assert seen.shape == (1, 1, 8, 8) and seen.min() > 0.99
    assert "the first frame of each" in words


SHOWN = {  # orientation: what viewers make of the stored picture
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).T,
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", SHOWN)
@pytest.mark.parametrize(
    "suffix, settings, dtype",
    [
        (".jpg", {"quality": 100}, np.uint8),
        (".png", {}, np.uint8),
        (".png", {}, np.uint16),
        (".webp", {"lossless": True}, np.uint8),
        (".tif", {}, np.uint8),
        (".tif", {}, np.uint16),
        (".tif", {}, np.float32),
        (".tif", {"compression": "tiff_lzw"}, np.uint8),
    ],
)
def test_a_camera_may_be_held_in_eight_ways(orientation, suffix, settings, dtype, written):
    stored = np.zeros((32, 64))
    stored[:16, :32], stored[:16, 32:], stored[16:, :32] = 1, 0.6, 0.2
    shown = SHOWN[orientation](stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    white = {np.uint8: 255, np.uint16: 65535, np.float32: 1}[dtype]
    path = written("a" + suffix, (stored * white).astype(dtype), exif=exif, **settings)
    height, width = shown.shape
    seen, words = read(path, (1, height, width))
    np.testing.assert_allclose(seen[0, 0], shown, atol=0.03)
    assert f"{width}x{height}" in words


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_orientation_that_there_is_not_is_ignored(orientation, written):
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen, _ = read(written("a.png", in_bytes(SQUARE), exif=exif))
    np.testing.assert_array_equal(seen[0, 0], SQUARE)


# Files that are not what they seem.


def test_postscript_that_is_called_a_png_is_not_run(written):
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    assert "no image of a known kind" in refusal(written("a.png", content))


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_a_wrong_suffix_does_not_matter(kind, written):
    seen, _ = read(written("a.png", Image.new("L", (8, 8), 255), format=kind))
    assert (seen > 0.99).all()


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 1000, b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"II*\0", b"P5", b"BM"],
)
def test_files_without_a_picture_are_refused(content, written):
    assert "remove or replace it" in refusal(written("a.png", content))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".bmp", ".tif", ".webp", ".pgm"])
def test_files_that_were_cut_short_anywhere_are_refused_or_read(suffix, written):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    whole = written("whole" + suffix, pixels).read_bytes()
    refused = 0
    for length in range(1, len(whole) * 3 // 4, max(len(whole) // 60, 1)):
        try:
            read(written("a" + suffix, whole[:length]))
        except UserError as error:
            assert "remove or replace it" in str(error)
            refused += 1
    assert refused > 30


def test_headers_that_were_overwritten_end_in_a_sentence_or_a_picture(written):
    random = np.random.default_rng(0)
    for suffix in (".png", ".jpg", ".gif", ".bmp", ".tif", ".webp", ".pgm"):
        whole = written("whole" + suffix, in_bytes(UNIT[0])).read_bytes()
        for _ in range(40):
            damaged = bytearray(whole)
            for place in random.integers(0, min(len(whole), 100), 3):
                damaged[place] = random.integers(256)
            try:
                read(written("a" + suffix, bytes(damaged)))
            except UserError as error:
                assert "\n" not in str(error)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [(20_000, 10_000), (2**31 - 1, 2**31 - 1), (12_000, 10_000)])
def test_a_header_that_promises_too_many_pixels_is_refused(size, written):
    assert "cannot be read as an image" in refusal(written("a.png", png(size, 8, 0, [b"\0"])))


def test_pictures_beyond_the_limit_are_refused(written, monkeypatch):
    path = written("a.png", in_bytes(SQUARE))
    monkeypatch.setattr(image_files, "MOST_PIXELS", 64)
    assert read(path)[0].shape == (1, 1, 8, 8)
    monkeypatch.setattr(image_files, "MOST_PIXELS", 63)
    assert "cannot be read as an image" in refusal(path)


def test_a_file_that_may_not_be_read_is_named(written, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    path = written("a.png", in_bytes(SQUARE))
    monkeypatch.setattr(Path, "open", denied)  # the tests may run as root, who may read everything
    sentence = refusal(path)
    assert "a.png" in sentence and "Permission denied" in sentence


@pytest.mark.parametrize("name", ["a.npz", "a.npy"])
def test_damaged_arrays_are_refused(name, written, tmp_path):
    whole = written("whole" + name[1:], np.random.default_rng(0).random((20, 8, 8)))
    if name == "a.npz":
        np.savez_compressed(whole, images=UNIT)
    content = whole.read_bytes()
    for length in (0, 1, 10, 60, 100, len(content) // 2, len(content) - 1):
        assert "no .npz or .npy file" in refusal(written(name, content[:length]))
    damaged = bytearray(content)
    damaged[200:260] = bytes(60)
    if name == "a.npz":  # an .npy has no checksum
        assert "no .npz or .npy file" in refusal(written(name, bytes(damaged)))
    assert "no .npz or .npy file" in refusal(written(name, in_bytes(UNIT[0]).tobytes()))


# Folders of files.


def test_a_folder_gives_the_files_of_its_folders_and_says_what_it_leaves_out(written, tmp_path):
    folder = tmp_path / "set"
    for name in ("b.png", "a.PNG", "below/c.jpeg", "below/x.png/d.gif", "e.pgm", "f.jfif"):
        written(f"set/{name}", in_bytes(SQUARE), **{"format": "JPEG"} if "jf" in name else {})
    for name in (".hidden.png", ".hidden/g.png", "notes.txt", "h.heic", "README"):
        written(f"set/{name}", b"none")
    (folder / "directory.png").mkdir()
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    seen, words = read(folder)
    assert seen.shape == (6, 1, 8, 8)
    assert "skipped 6 other files (.heic, .png, .txt, no suffix)" in words
    _, words = read(folder / "below")
    assert "skipped" not in words


def test_links_to_files_are_read(written, tmp_path):
    path = written("a.png", in_bytes(SQUARE))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link.png").symlink_to(path)
    assert read(tmp_path / "set")[0].shape == (1, 1, 8, 8)


def test_folders_without_pictures_are_refused(written, tmp_path):
    (tmp_path / "empty" / "directory.png").mkdir(parents=True)
    written("hidden/.a.png", in_bytes(SQUARE))
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.png").symlink_to(tmp_path / "nowhere.png")
    for name in ("empty", "hidden", "links"):
        assert "holds no image files" in refusal(tmp_path / name)
    for name in ("nowhere", "links/a.png"):
        assert "there is no" in refusal(tmp_path / name)


def test_what_a_folder_holds_is_said(written, tmp_path):
    written("set/a.png", in_bytes(SQUARE))
    written("set/b.png", Image.new("RGB", (20, 10)))
    written("set/c.png", Image.new("RGBA", (40, 40)))
    written("set/d.png", (SQUARE * 65535).astype(np.uint16))
    written("set/e.gif", Image.new("P", (30, 30)))
    _, words = read(tmp_path / "set")
    kinds, sizes = words.split("; ")
    assert kinds == "16-bit grey, colour, colour with alpha, grey"
    assert sizes == "8x8, 20x10, 30x30 and 1 other sizes"


# The same pictures whatever they are written as, and through every door.


def save_all(folder, pictures, suffix=".png", **settings):
    """Write pictures, arrays or Pillow's, as files of a folder."""
    folder.mkdir()
    for number, picture in enumerate(pictures):
        if isinstance(picture, np.ndarray):
            picture = Image.fromarray(picture)
        picture.save(folder / f"{number:03}{suffix}", **settings)


def write_encodings(folder, unit):
    """Write pictures (N, 8, 8) in [0, 1] in every way that means the same."""
    inked = np.stack([np.zeros_like(unit), 1 - unit], axis=3)  # black ink on paper
    arrays = {
        "floats": unit.astype(np.float32),
        "half": unit.astype(np.float16)[:, None],
        "doubles from -1": unit * 2 - 1,
        "bytes": in_bytes(unit),
        "floats to 255": unit * 255,
        "int64": np.round(unit * 255).astype(np.int64),
        "16 bits": np.round(unit * 65535).astype(np.uint16),
        "colour": np.repeat(in_bytes(unit)[:, None], 3, axis=1),
        "colour last": np.repeat(unit[..., None], 3, axis=3),
        "ink": inked,
        "opaque": np.insert(np.repeat(in_bytes(unit)[..., None], 3, axis=3), 3, 255, axis=3),
    }
    for name, array in arrays.items():
        np.savez_compressed(folder / f"{name}.npz", images=array)
    grey = [Image.fromarray(picture) for picture in in_bytes(unit)]
    save_all(folder / "png", grey)
    save_all(folder / "png of 16 bits", list(arrays["16 bits"]))
    save_all(folder / "tiff of floats", list(arrays["floats"]), ".tif")
    save_all(folder / "tiff of 16 bits", list(arrays["16 bits"]), ".tiff")
    save_all(folder / "gif", grey, ".gif")
    save_all(folder / "rgba", [picture.convert("RGBA") for picture in grey])
    save_all(folder / "ink on paper", [*in_bytes(inked)])
    exif = Image.Exif()
    exif[0x0112] = 6
    save_all(folder / "turned", [picture.rotate(90) for picture in grey], exif=exif)
    return sorted(map(str, folder.iterdir()))


def test_the_test_set_is_not_told_from_itself_however_it_is_written(checkpoint, digits, tmp_path):
    unit = (digits.test.images[:, 0].numpy().astype(np.float64) + 1) / 2
    names = write_encodings(tmp_path, unit)
    asked = {"seed": 0, "data_dir": "unused", "download": False, "background": "white"}
    args = Namespace(ood=names, pixel_range=None, channel_axis=None, **asked)
    sets, described, _ = detection.ood_sets(digits, args, 1000, torch.device("cpu"))
    counts = tmp_path / "counts from 0 to 16.npy"
    np.save(counts, np.round(unit * 16))
    args = Namespace(ood=[str(counts)], pixel_range=[0, 16], channel_axis=None, **asked)
    sets |= detection.ood_sets(digits, args, 1000, torch.device("cpu"))[0]
    detector = detector_for(load_model(checkpoint).eval(), digits)
    inside = detection.ood_scores(detector, digits.test.images, -3.0)
    assert len(sets) == 20 and all("360 images" in words for words in described.values())
    for name, found in sets.items():
        assert (found - digits.test.images).abs().max() < 0.005, name
        for score, values in detection.ood_scores(detector, found, -3.0).items():
            auroc = metrics.detection(inside[score], values, name)["auroc"]
            slack = 0.01 if score == "detector" else 0.005  # it rounds pixels to a few levels
            assert auroc == pytest.approx(0.5, abs=slack), (name, score)


@pytest.mark.parametrize("background, paper", [("white", 1), ("black", 0)])
def test_every_door_reads_a_drawing_alike(background, paper, tiny_run, digits, tmp_path):
    drawing, wanted = tmp_path / "drawing.png", paper * (1 - 0.6 * SQUARE)
    ink("RGBA").save(drawing)
    reading = Reading(background=background)
    for number in range(40):
        place = tmp_path / "classes" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(drawing, place / f"{number}.png")
    trained = data.load("folder", tmp_path / "classes", None, reading).train.images[0, 0]
    found, _ = ood.load_ood(
        str(drawing), digits.test.images, "unused", 1, generator(), False, reading
    )
    array = tmp_path / "a.npz"
    flags = ("--from-images", drawing, "--background", background, "--steps", 0, "--num", 1)
    files = ("--checkpoint", tiny_run / "jem.pt", "--out-dir", tmp_path, "--save-array", array)
    run("sample", *files, *flags)
    with np.load(array) as arrays:
        np.testing.assert_allclose(arrays["images"][0, 0], wanted, atol=0.002)
    for seen in (trained, found[0, 0]):  # every channel of the colours is alike
        np.testing.assert_allclose((seen.numpy() + 1) / 2, wanted, atol=0.002)


def opaque_square():
    """Return an RGBA mask: a white square on transparent paper."""
    picture = np.full((8, 8, 4), 255, np.uint8)
    picture[..., 3] = in_bytes(SQUARE)
    return Image.fromarray(picture)


MASKS = {
    "bytes.png": in_bytes(SQUARE),
    "16 bits.png": (SQUARE * 65535).astype(np.uint16),
    "a bit.png": Image.fromarray(SQUARE > 0),
    "floats.tif": SQUARE.astype(np.float32),
    "bool.npy": SQUARE[None] > 0,
    "opaque.png": Image.fromarray(in_bytes(SQUARE)).convert("RGBA"),
    "inked.png": Image.fromarray(np.stack([np.zeros((8, 8), np.uint8), in_bytes(1 - SQUARE)], 2)),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_may_be_any_picture(name, written):
    free = sample.part_to_sample(str(written(name, MASKS[name])), (1, 8, 8))
    np.testing.assert_array_equal(free[0, 0].numpy(), SQUARE > 0)


def test_a_white_mask_on_transparent_paper_needs_a_black_background(written):
    path = str(written("mask.png", opaque_square()))
    with pytest.raises(UserError, match="nothing to sample or nothing to hold"):
        sample.part_to_sample(path, (1, 8, 8))
    free = sample.part_to_sample(path, (1, 8, 8), Reading(background="black"))
    np.testing.assert_array_equal(free[0, 0].numpy(), SQUARE > 0)


PEAK = """
import resource, sys
from pathlib import Path
from sgld_nrg.support.images import open_pictures, read_all
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
found = open_pictures(Path(sys.argv[1]))
read_all(found, range(len(found)), (1, 32, 32))
print("peak", peak() - before)
"""


def test_forty_large_pictures_need_the_memory_of_one(written, tmp_path):
    first = written("set/0.png", Image.new("L", (2000, 2000), 100))
    for number in range(1, 40):
        shutil.copy(first, tmp_path / "set" / f"{number}.png")
    command = [sys.executable, "-c", PEAK, str(tmp_path / "set")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout.split("peak ")[1]) < 80  # MiB; all of them are 160


def test_too_little_memory_is_said_with_flags_that_help(monkeypatch, written):
    def none_left(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    path = written("a.npy", UNIT)
    monkeypatch.setattr(images.torch, "empty", none_left)
    sentence = refusal(path)
    assert "20 pictures of 1x8x8" in sentence and "--image-size" in sentence
