"""The one loader of pictures: files, folders, .npz and .npy, for training, --ood and sample.py.

A dtype, range, mode or axis that has one meaning is read as that; one that has two is refused with
a sentence that says what was found and which flag settles it. Pictures are resized while they are
read, so the memory follows the small ones.
"""

from __future__ import annotations

import os
import warnings
import zlib
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION
from torch import Tensor
from torch.nn.functional import interpolate

from sgld_nrg.support.errors import UserError, first_line
from sgld_nrg.support.folder_cache import is_cache

# by the format that a file's content has, not by its name: a .png may hold PostScript
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
PLAIN = ("PNG", "JPEG", "BMP", "WEBP")  # counting the frames of the others moves among them
TURNED = range(2, 9)  # orientations in Exif's numbers; 1 is as it is stored
JPEG, NETPBM = (".jpg", ".jpeg", ".jfif"), (".pgm", ".ppm", ".pnm", ".pbm")
SUFFIXES = (".png", *JPEG, ".bmp", ".gif", ".webp", ".tif", ".tiff", *NETPBM)
LUMA = torch.tensor([0.299, 0.587, 0.114])[:, None, None]  # of red, green, blue (ITU-R BT.601)
MOST_PIXELS = 178_956_970  # of a picture, twice Pillow's own limit against decompression bombs
FULL_SCALE = {"uint8": 255, "uint16": 65535}
SLACK = 1e-3  # what rounding leaves outside a range, as a share of it: a quarter of a byte's step


class Reading(NamedTuple):
    """How pictures are to be read when what they hold leaves it open.

    pixel_range: (black, white) of the numbers of an array, or of a file of more than 8 bits; None:
    by their type and range. channel_axis: "first" or "last" of an array; None: by its shape.
    background: "white" or "black", what transparent pixels are laid over.
    """

    pixel_range: tuple[float, float] | None = None
    channel_axis: str | None = None
    background: str = "white"


def reading_from(args: Namespace) -> Reading:
    """Return what --pixel-range, --channel-axis and --background ask for."""
    pixel_range = tuple(args.pixel_range) if args.pixel_range else None
    return Reading(pixel_range, args.channel_axis, args.background)


AS_FOUND = Reading()


def open_pictures(path: Path, reading: Reading = AS_FOUND) -> Pictures:
    """Look at an image file, a folder of them, an .npz or an .npy file.

    Raises UserError if the path is not there, holds no pictures, or has two meanings.
    """
    if not path.exists():
        raise UserError(
            f"there is no {str(path)!r}: name an image, a folder of images, or an .npz or .npy file"
        )
    if path.is_dir():
        files, others = files_in(path)
        if not files:
            raise UserError(
                f"the folder {str(path)!r} holds no image files ({', '.join(SUFFIXES)})"
            )
        skipped = [other for other in others if not other.is_dir() and not is_cache(other)]
        return FilePictures(files, reading, skipped)
    if path.suffix.lower() in (".npz", ".npy"):
        return ArrayPictures(path, array_in(path, "images"), reading)
    return FilePictures([path], reading)


def read_all(found: Pictures, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Read some pictures, brought to shape (C, H, W): (n, C, H, W) float, pixels in [-1, 1].

    Raises UserError if they cannot be read, or if the memory is too small for them.
    """
    images = room_for(len(indices), shape)
    for row, index in zip(images, indices, strict=True):
        row.copy_(found.read(index, shape))
    return images.mul_(2).sub_(1)


def room_for(count: int, shape: Sequence[int]) -> Tensor:
    """Return an empty float tensor (count, C, H, W). UserError if the memory is too small."""
    try:
        return torch.empty(count, *shape)
    except RuntimeError as error:
        raise UserError(
            f"not enough memory for {count} pictures of {'x'.join(map(str, shape))} "
            f"({first_line(error)}): take fewer, or lower --image-size"
        ) from error


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


def fitted(image: Tensor, shape: Sequence[int], reading: Reading) -> Tensor:
    """Bring a picture (c, h, w), c in 1..4, float in [0, 1], to shape (C, H, W).

    Two channels are grey and alpha, four are colour and alpha.
    """
    channels, height, width = shape
    if image.shape[0] in (2, 4):
        paper = 1.0 if reading.background == "white" else 0.0
        image, alpha = image[:-1], image[-1:]
        image = image * alpha + paper * (1 - alpha)
    if channels == 1 and image.shape[0] == 3:
        image = (image * LUMA).sum(0, keepdim=True)
    elif image.shape[0] != channels:
        image = image.expand(channels, -1, -1)
    if image.shape[1:] != (height, width):
        image = interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
    return image.clamp(0, 1)


class ArrayPictures:
    """The pictures of an array (N, H, W), (N, C, H, W) or (N, H, W, C), read one by one.

    sizes: {(height, width)}. colour: whether any has more than grey. words: what was found.
    Raises UserError for an array that is none of pictures or has two meanings.
    """

    def __init__(self, path: Path, array: np.ndarray, reading: Reading):
        self.reading = reading
        found = f"{str(path)!r} holds {array.dtype} of shape {array.shape}"
        usable = array.ndim in (3, 4) and array.size and array.dtype.kind in "buif"
        if not usable or not np.isfinite(array).all():
            raise UserError(
                f"{found}: images must be finite numbers of shape (N, H, W), (N, C, H, W) or "
                "(N, H, W, C)"
            )
        self.array, self.axis = _with_channel_axis(array, f"{found}, {_span(array)}", reading)
        self.low, self.high = reading.pixel_range or self._range(found)
        _check_within(array, (self.low, self.high), found)
        *_, height, width = self._channels_first(self.array).shape
        self.sizes = {(height, width)}
        count = self.array.shape[self.axis] if self.axis is not None else 1
        self.colour = count > 2
        kind = {1: "grey", 2: "grey with alpha", 3: "colour", 4: "colour with alpha"}[count]
        self.words = f"{kind}, {width}x{height}, {array.dtype} from {self.low:g} to {self.high:g}"

    def __len__(self) -> int:
        return len(self.array)

    def _range(self, found: str) -> tuple[float, float]:
        """Return (black, white). UserError if it is unclear, or another for alpha than for colour.

        found: what the array is, in words.
        """
        channels = self._channels_first(self.array)
        if channels.shape[1] not in (2, 4):
            return _range_of(channels, found)
        scale = _range_of(channels[:, :-1], found)
        if _range_of(channels[:, -1:], f"{found}, its alpha") != scale:
            raise UserError(
                f"{found}, alpha {_span(channels[:, -1:])}, the rest {_span(channels[:, :-1])}: "
                "save both on one scale, and give it with --pixel-range if it is unclear"
            )
        return scale

    def _channels_first(self, array: np.ndarray) -> np.ndarray:
        if self.axis is None:
            return array[:, None]
        return np.moveaxis(array, self.axis, 1)

    def read(self, index: int, shape: Sequence[int]) -> Tensor:
        """Return one picture brought to shape (C, H, W), float in [0, 1]."""
        image = self._channels_first(self.array[index : index + 1])[0].astype(np.float32)
        scaled = (image - self.low) / (self.high - self.low) if self.low else image / self.high
        return fitted(torch.from_numpy(np.ascontiguousarray(scaled)), shape, self.reading)


def _with_channel_axis(
    array: np.ndarray, found: str, reading: Reading
) -> tuple[np.ndarray, int | None]:
    """Return an array as (N, ...) and the axis of its channels, None if it has none.

    Raises UserError if it may be two, unless --channel-axis says which.
    """
    shape, asked = array.shape, reading.channel_axis
    if array.ndim == 3:  # pictures (N, H, W), but it may be one picture with channels
        counts = {"first": (0, (3, 4)), "last": (2, (1, 2, 3, 4))}
        alone = {name: axis for name, (axis, few) in counts.items() if shape[axis] in few}
        if asked in alone:
            return array[None], alone[asked] + 1
        if alone and asked is None:
            name = next(iter(alone))
            raise UserError(
                f"{found}: one picture of {shape[alone[name]]} channels, or {shape[0]} grey ones "
                f"of {shape[2]}x{shape[1]}? --channel-axis {name} says that it is one, "
                f"--channel-axis {'last' if name == 'first' else 'first'} that it is not"
            )
        return array, None
    axes = [axis for axis in (1, 3) if shape[axis] in (1, 2, 3, 4)]
    if not axes:
        raise UserError(f"{found}: no axis holds 1 to 4 channels, (N, C, H, W) or (N, H, W, C)")
    if len(axes) == 1:
        return array, axes[0]
    if asked is None:
        raise UserError(
            f"{found}: axis 1 or 3 may be the channels; say so with --channel-axis first or last"
        )
    return array, 1 if asked == "first" else 3


def _span(array: np.ndarray) -> str:
    """Return the smallest and the largest of an array's numbers in words."""
    return f"from {float(array.min()):.9g} to {float(array.max()):.9g}"


def _range_of(array: np.ndarray, found: str) -> tuple[float, float]:
    """Return (black, white) of an array's numbers. UserError, with what was found, if unclear."""
    low, high, kind = float(array.min()), float(array.max()), array.dtype.kind
    full = FULL_SCALE.get(array.dtype.name)
    if kind == "b" or low == high == 0:
        return 0, full or 1
    # no more than a sixteenth of white (0 to 16 in bytes, 12 bits in 16) may be another scale
    if full and 16 * high > full + 1:
        return 0, full
    if kind == "f" and low >= -SLACK and 1 / 16 < high <= 1 + SLACK:
        return 0, 1
    if kind == "f" and abs(low + 1) <= SLACK and high <= 1 + SLACK:
        return -1, 1
    # 0 to 16 and 0 to 100 are scales of others, and a stray pixel above 1 makes none
    if not full and low >= -SLACK and 128 < high <= 255 * (1 + SLACK) and (array > 1).mean() > 0.01:
        return 0, 255
    raise UserError(
        f"{found}, {_span(array)}: what is black and what is white? Say so with --pixel-range "
        "LOW HIGH (0 1, 0 255, -1 1, ...)"
    )


def _check_within(array: np.ndarray, scale: tuple[float, float], found: str) -> None:
    """Raise UserError, with what was found, if numbers are outside their scale."""
    low, high = scale
    slack = SLACK * (high - low)
    if array.min() < low - slack or array.max() > high + slack:
        raise UserError(f"{found}, {_span(array)}: not within --pixel-range {low:g} {high:g}")


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
    sizes, colour, words: as of `ArrayPictures`. by_turns: whether how one is read depends on those
    that were read before. Raises UserError for a file that is no image.
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
            scale = _range_of(array, found)
            before = self.scale = self.scale or scale
            if scale != before:
                raise UserError(
                    f"{found}, {_span(array)}, and a picture before seems to go from {before[0]:g} "
                    f"to {before[1]:g}: give one scale for all with --pixel-range LOW HIGH"
                )
        _check_within(array, scale, found)
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


def array_in(path: Path, name: str, alone: bool = True) -> np.ndarray:
    """Return an array of an .npz, by name, or an .npy file, unpickled.

    alone: the only array of an .npz may have another name, and that of an .npy has none.
    Raises UserError if it cannot be had.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        unnamed = isinstance(loaded, np.ndarray)
        if unnamed and alone:
            return loaded
        with nullcontext() if unnamed else loaded:
            names = [] if unnamed else loaded.files
            if name not in names and not (alone and len(names) == 1):
                raise UserError(
                    f"{str(path)!r} holds {', '.join(names) or 'nothing with a name'} and no array "
                    f"{name!r}: add it, or call one of them {name!r}"
                )
            array = loaded[name if name in names else names[0]]
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{name!r} in it is no array")
        return array
    except UserError:
        raise
    except Exception as error:  # numpy and zipfile raise a dozen types for damaged files
        raise UserError(
            f"{str(path)!r} is no .npz or .npy file of {name} ({first_line(error)}): name another"
        ) from error


Pictures = ArrayPictures | FilePictures
