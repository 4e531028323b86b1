"""How the values of pictures are read: their range, their alpha, the shape they are brought to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from sgld_nrg.support.errors import UserError

LUMA = torch.tensor([0.299, 0.587, 0.114])[:, None, None]  # of red, green, blue (ITU-R BT.601)
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


AS_FOUND = Reading()


def span(array: np.ndarray) -> str:
    """Return the smallest and the largest of an array's numbers, of any shape, in words."""
    return f"from {float(array.min()):.9g} to {float(array.max()):.9g}"


def range_of(array: np.ndarray, found: str) -> tuple[float, float]:
    """Return (black, white) of an array's numbers, of any shape, by their type and their span.

    found: what the array is, in words. Raises UserError, with that, if they are unclear.
    """
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
        f"{found}, {span(array)}: what is black and what is white? Say so with --pixel-range "
        "LOW HIGH (0 1, 0 255, -1 1, ...)"
    )


def check_within(array: np.ndarray, scale: tuple[float, float], found: str) -> None:
    """Raise UserError if an array's numbers, of any shape, are outside their scale (black, white).

    found: what the array is, in words. Rounding may leave a little outside.
    """
    low, high = scale
    slack = SLACK * (high - low)
    if array.min() < low - slack or array.max() > high + slack:
        raise UserError(f"{found}, {span(array)}: not within --pixel-range {low:g} {high:g}")


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
