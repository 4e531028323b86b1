"""Pictures as users have them: files, folders, .npz and .npy, brought to the model's shape.

And the .npz of images that leaves the project.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from sgld_nrg.support.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")

Pictures = Sequence[Path] | np.ndarray | list


def to_model(pixels: Tensor) -> Tensor:
    """Scale pixels in [0, 1] to the model's [-1, 1]; float tensor of any shape."""
    return pixels * 2 - 1


def from_bytes(pixels: Tensor) -> Tensor:
    """Scale pixels 0..255 to the model's [-1, 1]; uint8 tensor of any shape."""
    return pixels.div(255).mul_(2).sub_(1)  # in place: fresh memory costs more than the arithmetic


def to_unit(x: Tensor) -> Tensor:
    """Scale the model's pixels in [-1, 1] to [0, 1], clamping what a chain left outside."""
    return ((x + 1) / 2).clamp(0, 1)


def load_images(path: str, shape: Sequence[int], limit: int) -> Tensor:
    """Load the first `limit` images of an image file, a folder of them, or an .npz or .npy file.

    shape: (C, H, W) that they are brought to. Returns (n, C, H, W) float, pixels in [-1, 1].
    Raises UserError if the path is not there or cannot be read.
    """
    if not Path(path).exists():
        raise UserError(
            f"there is no {path!r}: name an image, a folder of images, or an .npz or .npy file"
        )
    found = stored_images(Path(path))
    return fit_shape([found[index] for index in range(min(limit, len(found)))], shape)[0]


def stored_images(path: Path) -> Pictures:
    """Return a path's images, unread if they are files of their own."""
    if path.is_dir():
        everything = sorted(path.rglob("*"))
        files = [file for file in everything if file.suffix.lower() in IMAGE_SUFFIXES]
        if not files:
            raise UserError(
                f"the folder {str(path)!r} holds no image files ({', '.join(IMAGE_SUFFIXES)})"
            )
        return files
    return [path] if path.suffix.lower() in IMAGE_SUFFIXES else array_file(path)


def picture(path: Path, mode: str | None = None) -> Image.Image:
    """Read an image file whole, as grey ("L") or colour ("RGB"); None: whichever it is."""
    try:
        with Image.open(path) as found:
            return found.convert(mode or ("L" if found.mode in ("1", "L", "LA") else "RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(
            f"{str(path)!r} cannot be read as an image: remove or replace it"
        ) from error


def array_file(path: Path) -> np.ndarray:
    """Return the images (N, ...) of an .npz (`images`, or its only array) or .npy, unpickled."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            names = loaded.files
            if "images" not in names and len(names) != 1:
                raise UserError(
                    f"{str(path)!r} has the arrays {', '.join(names)}: call one of them 'images'"
                )
            loaded = loaded["images" if "images" in names else names[0]]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{str(path)!r} is no .npz or .npy file of images ({error}): name another"
        ) from error
    usable = loaded.ndim in (3, 4) and len(loaded) and loaded.dtype.kind in "uif"
    if not usable or not np.isfinite(loaded).all():
        raise UserError(
            f"{str(path)!r} holds {loaded.dtype} of shape {loaded.shape}: images must be finite "
            "numbers of shape (N, H, W), (N, C, H, W) or (N, H, W, C)"
        )
    if loaded.dtype != np.uint8 and not 0 <= loaded.min() <= loaded.max() <= 1:
        if loaded.min() < 0 or loaded.max() > 255:
            raise UserError(
                f"{str(path)!r} has pixels from {loaded.min()} to {loaded.max()}: "
                "bring them to [0, 1] or 0..255"
            )
        loaded = loaded / 255
    return loaded


def fit_shape(found: list, shape: Sequence[int]) -> tuple[Tensor, str]:
    """Bring arrays, PIL images or files to a shape (C, H, W), pixels in [-1, 1].

    Returns the images (N, C, H, W) float and what was done to them, in words.
    """
    channels, height, width = shape
    done: set[str] = set()
    fitted = []
    for array in found:
        if isinstance(array, Path):
            array = np.asarray(picture(array, "L" if channels == 1 else "RGB"))
            done.add(f"read as {'grey' if channels == 1 else 'colour'}")
        image = torch.as_tensor(np.array(array, copy=True))
        image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
        if image.ndim == 2:
            image = image.unsqueeze(0)
        elif image.shape[2] in (1, 3) and image.shape[0] not in (1, 3):
            image = image.permute(2, 0, 1)
        if image.shape[0] != channels:
            image = image.mean(0, keepdim=True).expand(channels, -1, -1)
            to_grey = channels == 1
            done.add("colour averaged to grey" if to_grey else "grey repeated over the channels")
        if image.shape[1:] != (height, width):
            size = f"{image.shape[1]}x{image.shape[2]}"
            done.add(f"resized from {size}" if len(done) < 4 else "resized from other sizes")
            image = interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
            image = image.clamp(0, 1)
        fitted.append(image)
    return to_model(torch.stack(fitted)), ", ".join(sorted(done)) or "as it is"


@contextmanager
def array_writer(path: Path, shape: tuple[int, ...]) -> Iterator[Callable]:
    """Yield a function that appends images (n, C, H, W) to `images` of an .npz, block by block.

    path: the file, replaced once it is whole. shape: (N, C, H, W) in all. The function's labels are
    gathered and written last. Raises UserError if the file cannot be written.
    """
    temporary, labels = Path(f"{path}.tmp"), []
    header = {"descr": "<f4", "fortran_order": False, "shape": tuple(shape)}
    try:
        with zipfile.ZipFile(temporary, "w") as archive:
            with archive.open("images.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)

                def append(images: Tensor, block_labels: Tensor | None) -> None:
                    pixels = to_unit(images).float().cpu().numpy()
                    file.write(np.ascontiguousarray(pixels).astype("<f4").tobytes())
                    if block_labels is not None:
                        labels.append(block_labels.cpu().numpy())

                yield append
            if labels:
                with archive.open("labels.npy", "w") as file:
                    np.lib.format.write_array(file, np.concatenate(labels))
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {str(path)!r} ({error.strerror}): name another file with --save-array"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
