"""Image files, which Pillow opens: where they lie, what they are, and the pictures in them."""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION
from torch import Tensor

from sgld_nrg.support.errors import UserError, first_line
from sgld_nrg.support.reading import Reading, check_within, fitted, range_of, span

# by the format that a file's content has, not by its name: a .png may hold PostScript
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
PLAIN = ("PNG", "JPEG", "BMP", "WEBP")  # counting the frames of the others moves among them
TURNED = range(2, 9)  # orientations in Exif's numbers; 1 is as it is stored
JPEG, NETPBM = (".jpg", ".jpeg", ".jfif"), (".pgm", ".ppm", ".pnm", ".pbm")
SUFFIXES = (".png", *JPEG, ".bmp", ".gif", ".webp", ".tif", ".tiff", *NETPBM)
MOST_PIXELS = 178_956_970  # of a picture, twice Pillow's own limit against decompression bombs


def files_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return a folder's image files and all others, also of the folders below it.

    Hidden files are others, and so are links to folders, which are not followed.
    """
    images, others = [], []
    for entry, hidden in _entries(folder, False):
        image = not hidden and os.path.splitext(entry.name)[1].lower() in SUFFIXES
        # an entry knows its type without another look at the disk, unless it is a link
        if image and (Path(entry.path).is_file() if entry.is_symlink() else entry.is_file()):
            images.append(entry.path)
        elif not entry.is_dir(follow_symlinks=False):
            others.append(entry.path)
    first, second = (
        [
            Path(path)
            for path in sorted(paths, key=lambda path: os.path.normcase(path).split(os.sep))
        ]
        for paths in (images, others)
    )
    return first, second


def _entries(folder: str | Path, hidden: bool) -> Iterator[tuple[os.DirEntry[str], bool]]:
    """Yield everything in a folder and below it, and whether it is hidden there."""
    with suppress(PermissionError), os.scandir(folder) as entries:
        for entry in entries:
            out_of_sight = hidden or entry.name.startswith(".")
            yield entry, out_of_sight
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(entry.path, out_of_sight)


class Look(NamedTuple):
    """What a look at an image file tells.

    size: (height, width). kinds: what it is, in words. mark: a checksum of the file. pixels: (H, W)
    or (H, W, 3) uint8, all that reading it would give; None: it is to be read.
    """

    size: tuple[int, int]
    kinds: tuple[str, ...]
    mark: int = 0
    pixels: np.ndarray | None = None


def look(path: Path) -> Look:
    """Look at no more of an image file than tells its size and kind. UserError if it is none."""
    with opened(path) as picture:
        return _look(picture)


def look_closely(path: Path, side: int) -> Look:
    """Look at an image file, all of it, and take its pixels at once if they need no more than that.

    They do if they are bytes without alpha, side by side pixels in one frame that is not turned.
    Raises UserError if it is no image; one whose pixels are damaged is left to be read.
    """
    with _named(path), path.open("rb") as file:
        mark = zlib.crc32(file.read())
        file.seek(0)
        with _picture_in(file) as picture:
            found = _look(picture)
            plain = picture.format in PLAIN and found.kinds in (("grey",), ("colour",))
            pixels = None
            if plain and found.size == (side, side):
                with suppress(Exception):  # reading says what is wrong, when its turn comes
                    picture.load()
                    if _orientation(picture) not in TURNED:
                        pixels = _pixels(picture, found.kinds[0], 1)
            return found._replace(mark=mark, pixels=pixels)


def _look(picture: Image.Image) -> Look:
    # of a TIFF, Pillow gives the size as turned
    turned = picture.format != "TIFF" and _orientation(picture) in (5, 6, 7, 8)
    width, height = picture.size[::-1] if turned else picture.size
    frames = ("the first frame of each",) if getattr(picture, "n_frames", 1) > 1 else ()
    return Look((height, width), (_kind(picture), *frames))


def _orientation(picture: Image.Image) -> int | None:
    return picture.getexif().get(0x0112)


class FilePictures:
    """The pictures of image files, read one by one.

    skipped: files beside them, for `words`. looks: at each of the files; None: they are looked at.
    sizes, colour, words: as of `images.ArrayPictures`. by_turns: whether how one is read depends on
    those that were read before. Raises UserError for a file that is no image.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        reading: Reading,
        skipped: Sequence[Path] = (),
        looks: Sequence[Look] | None = None,
    ):
        self.paths, self.reading = list(paths), reading
        self.scale: tuple[float, float] | None = None  # of numbers that have none by their type
        self.sizes: set[tuple[int, int]] = set()
        kinds: set[str] = set()
        for found in map(look, self.paths) if looks is None else looks:
            self.sizes.add(found.size)
            kinds.update(found.kinds)
        unscaled = any(kind.startswith(("32-bit", "floating-point")) for kind in kinds)
        self.by_turns = unscaled and not reading.pixel_range
        self.colour = any(kind.startswith("colour") for kind in kinds)
        sizes = [f"{width}x{height}" for height, width in sorted(self.sizes)[:3]]
        more = f" and {len(self.sizes) - 3} other sizes" if len(self.sizes) > 3 else ""
        self.words = f"{', '.join(sorted(kinds))}; {', '.join(sizes)}{more}"
        if skipped:
            suffixes = sorted({ascii(path.suffix)[1:-1] or "no suffix" for path in skipped})
            self.words += f"; skipped {len(skipped)} other files ({', '.join(suffixes[:5])})"

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int, shape: Sequence[int]) -> Tensor:
        """Return one picture brought to shape (C, H, W), float in [0, 1]."""
        path = self.paths[index]
        with opened(path) as picture:
            least = (2 * shape[2], 2 * shape[1])  # a coarser picture is enough
            picture.draft(None, least)
            factor = min(picture.size[0] // least[0], picture.size[1] // least[1])
            kind, tags = _kind(picture), getattr(picture, "tag_v2", {})  # a TIFF has tags
            white = 2 ** tags.get(BITSPERSAMPLE, (16,))[0] - 1  # 12 bits come as 16
            negative = tags.get(PHOTOMETRIC_INTERPRETATION) == 0
            picture.load()  # an orientation may come after the pixels
            if _orientation(picture) in TURNED:
                picture = ImageOps.exif_transpose(picture)
            if picture.mode == "F" or picture.mode.startswith("I"):
                image = self._scaled(picture, kind, white, path)
                image = 1 - image if negative else image  # Pillow has seen to it in bytes alone
            else:
                image = _pixels(picture, kind, max(factor, 1)).astype(np.float32) / 255
        image = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
        return fitted(torch.from_numpy(np.ascontiguousarray(image)), shape, self.reading)

    def _scaled(self, picture: Image.Image, kind: str, white: int, path: Path) -> np.ndarray:
        """Return the numbers of a 16-bit, 32-bit or floating-point picture as float32 in [0, 1].

        Raises UserError if they have no scale, or another than those of a picture before.
        """
        array = np.asarray(picture)
        found = f"{str(path)!r} holds {array.dtype} of shape {array.shape}"
        if not np.isfinite(array).all():
            raise UserError(f"{found}, and not all of its numbers are finite: remove or replace it")
        scale = self.reading.pixel_range
        if not scale and "16-bit" in kind:
            scale = (0, white)
        elif not scale:
            scale = range_of(array, found)
            before = self.scale = self.scale or scale
            if scale != before:
                raise UserError(
                    f"{found}, {span(array)}, and a picture before seems to go from {before[0]:g} "
                    f"to {before[1]:g}: give one scale for all with --pixel-range LOW HIGH"
                )
        check_within(array, scale, found)
        low, high = scale
        image = (array.astype(np.float32) - low) / (high - low)
        if "alpha" in kind:  # one number of all stands for transparent
            image = np.stack([image, array != picture.info["transparency"]], axis=-1)
        return image


def _kind(picture: Image.Image) -> str:
    """Return what a picture is, in words: grey or colour, with alpha, of 16 bits, of floats."""
    mode = picture.mode
    alpha = " with alpha" * ("transparency" in picture.info)
    if mode == "F":
        return "floating-point grey"
    if mode.startswith("I"):  # Pillow gives the 16 bits of netpbm as 32
        return f"{32 if mode == 'I' and picture.format == 'TIFF' else 16}-bit grey{alpha}"
    if mode in ("1", "L"):
        return f"grey{alpha}"
    if mode in ("LA", "La"):
        return "grey with alpha"
    if mode in ("RGBA", "RGBa", "PA"):
        alpha = " with alpha"
    if mode in ("P", "PA"):
        palette = np.asarray(picture.getpalette() or [0, 0, 0]).reshape(-1, 3)
        return ("grey" if (palette == palette[:, :1]).all() else "colour") + alpha
    return f"colour{alpha}"


def _pixels(picture: Image.Image, kind: str, factor: int) -> np.ndarray:
    """Return a picture's bytes (H, W) or (H, W, c), smaller by a factor."""
    mode = "RGB" if kind.startswith("colour") else "L"
    mode = {"RGB": "RGBA", "L": "LA"}[mode] if "alpha" in kind else mode
    if mode == "LA" and picture.mode != "LA":  # Pillow has no way there from a palette
        picture = picture.convert("RGBA").convert("LA")
    picture = picture if picture.mode == mode else picture.convert(mode)
    return np.asarray(picture.reduce(factor) if factor > 1 else picture)


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Open an image file. Raises UserError, naming it, if it is none or too large."""
    # not by its path: Pillow would map a turned TIFF into memory, and get its rows wrong
    with _named(path), path.open("rb") as file, _picture_in(file) as picture:
        yield picture


@contextmanager
def _picture_in(file: BinaryIO) -> Iterator[Image.Image]:
    with Image.open(file, formats=FORMATS) as picture:
        if picture.size[0] * picture.size[1] > MOST_PIXELS:
            raise Image.DecompressionBombError(f"it has {picture.size} pixels")
        _scale_transparency(picture)
        yield picture


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Raise UserError with the file's name for all that goes wrong in the block."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damage that keeps a picture from being read raises
            yield
    except UnidentifiedImageError as error:
        raise UserError(
            f"{str(path)!r} is no image of a known kind ({', '.join(FORMATS)}): "
            "remove or replace it"
        ) from error
    except UserError:
        raise
    except Exception as error:  # Pillow raises a dozen types for the ways a file can be damaged
        raise UserError(
            f"{str(path)!r} cannot be read as an image ({first_line(error)}): remove or replace it"
        ) from error


def _scale_transparency(picture: Image.Image) -> None:
    """Bring a PNG's transparent colour, which Pillow leaves in the file's bits, to 8 bits."""
    bits = picture.tile[0][3] if isinstance(picture, PngImageFile) and picture.tile else None
    colour = picture.info.get("transparency")
    if bits in ("L;2", "L;4") and isinstance(colour, int):
        picture.info["transparency"] = colour * {"L;2": 85, "L;4": 17}[bits]
    elif bits == "RGB;16B" and isinstance(colour, tuple):
        picture.info["transparency"] = tuple(channel >> 8 for channel in colour)
