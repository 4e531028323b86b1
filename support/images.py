"""The one loader of pictures: files, folders, .npz and .npy, for training, --ood and sample.py.

A dtype, range, mode or axis that has one meaning is read as that; one that has two is refused with
a sentence that says what was found and which flag settles it. Pictures are resized while they are
read, so the memory follows the small ones.
"""

from __future__ import annotations

import warnings
import zipfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from sgld_nrg.support.errors import UserError, first_line

# by the format that a file's content has, not by its name: a .png may hold PostScript
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
JPEG, NETPBM = (".jpg", ".jpeg", ".jfif"), (".pgm", ".ppm", ".pnm", ".pbm")
SUFFIXES = (".png", *JPEG, ".bmp", ".gif", ".webp", ".tif", ".tiff", *NETPBM)
LUMA = torch.tensor([0.299, 0.587, 0.114])[:, None, None]  # of red, green, blue (ITU-R BT.601)
MOST_PIXELS = 178_956_970  # of a picture, twice Pillow's own limit against decompression bombs


class Reading(NamedTuple):
    """How pictures are to be read when what they hold leaves it open.

    pixel_range: (black, white) of the numbers of an array or a floating-point file; None: by their
    type and range. channel_axis: "first" or "last" of an array; None: by its shape. background:
    "white" or "black", what transparent pixels are laid over.
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
        return FilePictures(image_files(path), reading)
    if path.suffix.lower() in (".npz", ".npy"):
        return ArrayPictures(path, array_in(path, "images"), reading)
    return FilePictures([path], reading)


def load_images(path: str, shape: Sequence[int], limit: int, reading: Reading = AS_FOUND) -> Tensor:
    """Load the first `limit` images that `open_pictures` finds.

    shape: (C, H, W) that they are brought to. Returns (n, C, H, W) float, pixels in [-1, 1].
    Raises UserError if they cannot be read.
    """
    found = open_pictures(Path(path), reading)
    return read_all(found, range(min(limit, len(found))), shape)


def read_all(found: Pictures, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Read some pictures, brought to shape (C, H, W): (n, C, H, W) float, pixels in [-1, 1]."""
    images = torch.empty(len(indices), *shape)
    for row, index in zip(images, indices, strict=True):
        row.copy_(found.read(index, shape))
    return images.mul_(2).sub_(1)


def image_files(folder: Path) -> list[Path]:
    """Return a folder's image files, also of the folders below it, hidden ones left out.

    Raises UserError if there are none.
    """
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file()
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise UserError(f"the folder {str(folder)!r} holds no image files ({', '.join(SUFFIXES)})")
    return files


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
        self.array, self.reading = array, reading
        found = f"{str(path)!r} holds {array.dtype} of shape {array.shape}"
        usable = array.ndim in (3, 4) and array.size and array.dtype.kind in "buif"
        if not usable or not np.isfinite(array).all():
            raise UserError(
                f"{found}: images must be finite numbers of shape (N, H, W), (N, C, H, W) or "
                "(N, H, W, C)"
            )
        self.axis = _channel_axis(array.shape, found, reading)
        low, high = array.min(), array.max()
        found += f", from {low:g} to {high:g}" if array.dtype.kind == "f" else f", {low} to {high}"
        self.low, self.high = reading.pixel_range or _range_of(array, found)
        if not self.low <= low <= high <= self.high:
            raise UserError(f"{found}: not within --pixel-range {self.low:g} {self.high:g}")
        *_, height, width = self._channels_first(array).shape
        self.sizes = {(height, width)}
        count = array.shape[self.axis] if self.axis is not None else 1
        self.colour = count > 2
        kind = {1: "grey", 2: "grey with alpha", 3: "colour", 4: "colour with alpha"}[count]
        self.words = f"{kind}, {width}x{height}, {array.dtype} from {self.low:g} to {self.high:g}"

    def __len__(self) -> int:
        return len(self.array)

    def _channels_first(self, array: np.ndarray) -> np.ndarray:
        if self.axis is None:
            return array[:, None]
        return np.moveaxis(array, self.axis, 1)

    def read(self, index: int, shape: Sequence[int]) -> Tensor:
        """Return one picture brought to shape (C, H, W), float in [0, 1]."""
        image = self._channels_first(self.array[index : index + 1])[0].astype(np.float32)
        scaled = (image - self.low) / (self.high - self.low) if self.low else image / self.high
        return fitted(torch.from_numpy(np.ascontiguousarray(scaled)), shape, self.reading)


def _channel_axis(shape: tuple[int, ...], found: str, reading: Reading) -> int | None:
    """Return the axis of an array's channels, None if it has none. UserError if it may be two."""
    if len(shape) == 3:
        if shape[2] in (3, 4) and reading.channel_axis is None:
            raise UserError(
                f"{found}: one colour picture, or {shape[0]} grey ones of {shape[2]} columns? "
                "Save it as (1, H, W, C), or give --channel-axis first for grey ones"
            )
        return None
    axes = [axis for axis in (1, 3) if shape[axis] in (1, 2, 3, 4)]
    if reading.channel_axis:
        axes = [axis for axis in axes if axis == {"first": 1, "last": 3}[reading.channel_axis]]
    if len(axes) == 2:
        raise UserError(f"{found}: axis 1 or 3 may be the channels; say so with --channel-axis")
    if not axes:
        raise UserError(f"{found}: no axis holds 1 to 4 channels, (N, C, H, W) or (N, H, W, C)")
    return axes[0]


def _range_of(array: np.ndarray, found: str) -> tuple[float, float]:
    """Return (black, white) of an array's numbers. UserError, with what was found, if unclear."""
    low, high, kind = array.min(), array.max(), array.dtype
    whole = kind.kind in "ui" or bool((array == np.round(array)).all())
    if kind.kind == "b":
        return 0, 1
    if kind == np.uint8 and (high > 1 or high == 0):
        return 0, 255
    if kind == np.uint16 and high > 4095:  # 12 bits in 16 would be another scale
        return 0, 65535
    if kind.kind == "f" and low >= 0 and high <= 1:
        return 0, 1
    if kind.kind == "f" and low == -1 and high <= 1:
        return -1, 1
    many = float((array > 1).mean()) > 0.01  # not a stray pixel above 1
    if kind != np.uint16 and low >= 0 and 1 < high <= 255 and many and (whole or high > 128):
        return 0, 255
    raise UserError(
        f"{found}: what is black and what is white? Say so with --pixel-range LOW HIGH "
        "(0 1, 0 255, -1 1, ...)"
    )


class FilePictures:
    """The pictures of image files, read one by one.

    sizes, colour, words: as of `ArrayPictures`. Raises UserError for a file that is no image.
    """

    def __init__(self, paths: Sequence[Path], reading: Reading):
        self.paths, self.reading = list(paths), reading
        self.sizes, modes = set(), set()
        for path in self.paths:
            with opened(path) as picture:
                turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
                width, height = picture.size[::-1] if turned else picture.size
                self.sizes.add((height, width))
                modes.add(_kind(picture))
                if getattr(picture, "n_frames", 1) > 1:
                    modes.add("the first frame of each")
        self.colour = any(kind.startswith("colour") for kind in modes)
        sizes = [f"{width}x{height}" for height, width in sorted(self.sizes)[:3]]
        more = f" and {len(self.sizes) - 3} other sizes" if len(self.sizes) > 3 else ""
        self.words = f"{', '.join(sorted(modes))}; {', '.join(sizes)}{more}"

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int, shape: Sequence[int]) -> Tensor:
        """Return one picture brought to shape (C, H, W), float in [0, 1]."""
        path = self.paths[index]
        with opened(path) as picture:
            least = (2 * shape[2], 2 * shape[1])  # a coarser picture is enough
            picture.draft(None, least)
            factor = min(picture.size[0] // least[0], picture.size[1] // least[1])
            kind = _kind(picture)
            picture = ImageOps.exif_transpose(picture)
            pixels, high = _pixels(picture, kind, path, self.reading, max(factor, 1))
        image = torch.from_numpy(pixels.astype(np.float32) / high)
        image = image[None] if image.ndim == 2 else image.permute(2, 0, 1)
        return fitted(image, shape, self.reading)


def _kind(picture: Image.Image) -> str:
    """Return what a picture is, in words: grey or colour, with alpha, of 16 bits, of floats."""
    mode = picture.mode
    if mode == "F":
        return "grey, floating-point"
    if mode.startswith("I"):
        return "grey, 16 bits"
    if mode in ("1", "L"):
        return "grey with alpha" if "transparency" in picture.info else "grey"
    if mode in ("LA", "La"):
        return "grey with alpha"
    alpha = " with alpha" * ("transparency" in picture.info or mode in ("RGBA", "RGBa", "PA"))
    if mode in ("P", "PA"):
        palette = np.asarray(picture.getpalette() or [0, 0, 0]).reshape(-1, 3)
        return ("grey" if (palette == palette[:, :1]).all() else "colour") + alpha
    return "colour" + alpha


def _pixels(
    picture: Image.Image, kind: str, path: Path, reading: Reading, factor: int
) -> tuple[np.ndarray, float]:
    """Return a picture's numbers (H, W) or (H, W, c), smaller by a factor, and what is white."""
    if picture.mode == "F" or picture.mode.startswith("I"):
        array = np.asarray(picture)
        if picture.mode != "F" and array.min() >= 0 and array.max() <= 65535:
            return array, 65535
        found = f"{str(path)!r} holds {array.dtype}, from {array.min():g} to {array.max():g}"
        low, high = reading.pixel_range or _range_of(array, found)
        return np.clip(array - low, 0, None), high - low
    mode = "RGB" if kind.startswith("colour") else "L"
    mode = {"RGB": "RGBA", "L": "LA"}[mode] if "alpha" in kind else mode
    if mode == "LA" and picture.mode != "LA":  # Pillow has no way there from a palette
        picture = picture.convert("RGBA").convert("LA")
    picture = picture.convert(mode)
    if factor > 1 and "alpha" not in kind:
        picture = picture.reduce(factor)
    return np.asarray(picture), 255


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Open an image file. Raises UserError, naming it, if it is none or too large."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as picture:
                if picture.size[0] * picture.size[1] > MOST_PIXELS:
                    raise Image.DecompressionBombError(f"it has {picture.size} pixels")
                yield picture
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


def array_in(path: Path, name: str) -> np.ndarray:
    """Return an array of an .npz (by name, or its only one) or an .npy file, unpickled.

    Raises UserError if it cannot be had.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            return loaded
        with loaded:
            if name not in loaded.files and len(loaded.files) != 1:
                raise UserError(
                    f"{str(path)!r} has the arrays {', '.join(loaded.files) or 'none'}: "
                    f"call one of them {name!r}"
                )
            return loaded[name if name in loaded.files else loaded.files[0]]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, MemoryError) as error:
        raise UserError(
            f"{str(path)!r} is no .npz or .npy file of {name} ({first_line(error)}): name another"
        ) from error


Pictures = ArrayPictures | FilePictures
