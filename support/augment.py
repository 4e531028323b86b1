"""What the cross-entropy sees instead of the images as they are: moved, mirrored, noisy."""

from __future__ import annotations

import functools
from argparse import Namespace

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, pad


def augmented(images: Tensor, args: Namespace, generator: torch.Generator) -> Tensor:
    """Return images as --augment, --shift, --flip-prob and --input-noise ask for them."""
    if args.augment:
        images = augment(images, args.augment, generator, args.flip_prob)
    elif args.flip_prob or args.shift:
        images = shifted(images, args.shift, generator, args.flip_prob)
    return add_noise(images, args.input_noise, generator)


def add_noise(x: Tensor, noise_std: float, generator: torch.Generator | None = None) -> Tensor:
    """Return x + noise_std * eps, eps ~ N(0, I); with noise_std 0 nothing is drawn."""
    if noise_std == 0:
        return x
    noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    return torch.add(x, noise, alpha=noise_std)


def augment(
    images: Tensor,
    strength: float,
    generator: torch.Generator | None = None,
    flip_prob: float = 0.0,
) -> Tensor:
    """Turn, zoom, shear and shift each image by amounts of its own, and mirror some.

    images: (N, C, H, W) float, pixels in [-1, 1]; what comes in from outside is background, -1, or
    for colour the image reflected. strength: >= 0; at 1 the rotation is uniform within 0.2 rad, the
    zoom within 10 %, the shear within 0.15 and each shift within a fourteenth of the side (2 pixels
    of 28), 0 changes nothing. flip_prob: probability that an image is mirrored left to right, 0..1.
    Returns images of the same shape, bilinearly interpolated.
    """
    draws = torch.rand((5, len(images)), device=images.device, generator=generator)
    angle, zoom, shear, right, down = (2 * draws - 1) * strength * _largest(images.device)
    zoom = 1 + zoom
    first = torch.stack([zoom * angle.cos(), shear - zoom * angle.sin(), right], dim=1)
    second = torch.stack([zoom * angle.sin(), zoom * angle.cos(), down], dim=1)
    if flip_prob:
        drawn = torch.rand(len(images), device=images.device, generator=generator)
        first = torch.where((drawn < flip_prob)[:, None], -first, first)
    affine = torch.stack([first, second], dim=1)
    grid = affine_grid(affine, list(images.shape), align_corners=False)
    if images.shape[1] == 3:
        return grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    return grid_sample(images + 1, grid, align_corners=False) - 1


def shifted(
    images: Tensor, pixels: int, generator: torch.Generator | None = None, flip_prob: float = 0.0
) -> Tensor:
    """Shift each image by whole pixels of its own, and mirror some: no pixel is interpolated.

    images: (N, C, H, W) float, pixels in [-1, 1]; what comes in from outside is background, -1, or
    for colour the image reflected. pixels: 0 up to the side - 1, the largest shift in each
    direction. flip_prob: probability that an image is mirrored left to right, 0..1.
    Returns images of the same shape.
    """
    count, channels, height, width = images.shape
    draws = torch.rand((3, count), device=images.device, generator=generator)
    down, right = (draws[:2] * (2 * pixels + 1)).long().clamp_max(2 * pixels)
    rows = down[:, None] + torch.arange(height, device=images.device)  # (N, H), of the padded image
    columns = torch.arange(width, device=images.device).expand(count, width)
    columns = torch.where((draws[2] < flip_prob)[:, None], columns.flip(1), columns)
    columns = right[:, None] + columns
    sides = (pixels,) * 4
    padded = pad(images, sides, "reflect") if channels == 3 else pad(images, sides, value=-1.0)
    which = torch.arange(count, device=images.device)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)


def recast(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return a x + b of each image x, a and b uniform on [-1, 1], clamped there: mostly no data.

    images: (N, C, H, W) float, pixels in [-1, 1]. a is drawn for each image and b for each of its
    channels: faint, inverted and one-colour pictures are among them. Returns the same shape.
    """
    count, channels = images.shape[:2]
    draws = torch.rand((count, 1 + channels, 1, 1), device=images.device, generator=generator)
    contrast, brightness = (2 * draws - 1).split([1, channels], dim=1)
    return (contrast * images + brightness).clamp(-1, 1)


@functools.cache
def _largest(device: torch.device) -> Tensor:
    """Return the largest angle, zoom, shear and shifts (half-sides) of `augment`, (5, 1)."""
    return torch.tensor([0.2, 0.1, 0.15, 1 / 7, 1 / 7], device=device)[:, None]
