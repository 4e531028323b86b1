"""The one loader of pictures: files, folders, .npz and .npy, for training, --ood and sample.py.

A dtype, range, mode or axis that has one meaning is read as that; one that has two is refused with
a sentence that says what was found and which flag settles it. Pictures are resized while they are
read, so the memory follows the small ones.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sgld_nrg.support.errors import UserError, first_line
from sgld_nrg.support.folder_cache import is_cache
from sgld_nrg.support.image_files import SUFFIXES, FilePictures, files_in
from sgld_nrg.support.reading import AS_FOUND, Reading, check_within, fitted, range_of, span


def reading_from(args: Namespace) -> Reading:
    """Return what --pixel-range, --channel-axis and --background ask for."""
    pixel_range = tuple(args.pixel_range) if args.pixel_range else None
    return Reading(pixel_range, args.channel_axis, args.background)


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
        self.array, self.axis = _with_channel_axis(array, f"{found}, {span(array)}", reading)
        self.low, self.high = reading.pixel_range or self._range(found)
        check_within(array, (self.low, self.high), found)
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
            return range_of(channels, found)
        scale = range_of(channels[:, :-1], found)
        if range_of(channels[:, -1:], f"{found}, its alpha") != scale:
            raise UserError(
                f"{found}, alpha {span(channels[:, -1:])}, the rest {span(channels[:, :-1])}: "
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
