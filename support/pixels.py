"""The scales of pixels, and the .npz of images that leaves the project."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from torch import Tensor

from sgld_nrg.support.errors import UserError


def to_model(pixels: Tensor) -> Tensor:
    """Scale pixels in [0, 1] to the model's [-1, 1]; float tensor of any shape."""
    return pixels * 2 - 1


def from_bytes(pixels: Tensor) -> Tensor:
    """Scale pixels 0..255 to the model's [-1, 1]; uint8 tensor of any shape."""
    return pixels.div(255).mul_(2).sub_(1)  # in place: fresh memory costs more than the arithmetic


def to_unit(x: Tensor) -> Tensor:
    """Scale the model's pixels in [-1, 1] to [0, 1], clamping what a chain left outside."""
    return ((x + 1) / 2).clamp(0, 1)


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
