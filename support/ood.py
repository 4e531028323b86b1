"""Out-of-distribution sets and disturbances, images shaped like the model's, pixels in [-1, 1]."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d, pad

from sgld_nrg.support.augment import add_noise
from sgld_nrg.support.data import TORCHVISION, raw_images, torchvision_part
from sgld_nrg.support.errors import UserError
from sgld_nrg.support.images import ArrayPictures, Pictures, open_pictures, read_all
from sgld_nrg.support.pixels import from_bytes, to_unit
from sgld_nrg.support.reading import AS_FOUND, Reading


def _uniform_noise(images: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(images.shape, generator=generator) * 2 - 1


def _gaussian_noise(images: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.randn(images.shape, generator=generator) / 2).clamp(-1, 1)


def _constant(images: Tensor, generator: torch.Generator) -> Tensor:
    grey = torch.rand(len(images), 1, 1, 1, generator=generator) * 2 - 1
    return grey.expand_as(images)


def _interpolations(images: Tensor, generator: torch.Generator) -> Tensor:
    return (images + images[torch.randperm(len(images), generator=generator)]) / 2


def _permuted(images: Tensor, generator: torch.Generator) -> Tensor:
    """One random permutation of the pixels, the same for all images."""
    order = torch.randperm(images[0, 0].numel(), generator=generator)
    return images.flatten(2)[:, :, order].view_as(images)


GENERATED: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "uniform-noise": _uniform_noise,
    "gaussian-noise": _gaussian_noise,
    "constant": _constant,
    "black": lambda images, generator: torch.full_like(images, -1),
    "white": lambda images, generator: torch.ones_like(images),
    "interpolations": _interpolations,
    "rotated": lambda images, generator: images.rot90(1, (2, 3)),
    "inverted": lambda images, generator: -images,
    "permuted": _permuted,
}


def _through_jpeg(images: Tensor) -> Tensor:
    """Return what is left of images after a JPEG file of quality 75."""
    channels = images.shape[1]
    found = []
    for image in (to_unit(images) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image if channels == 3 else image[..., 0]).save(file, "JPEG", quality=75)
        pixels = torch.from_numpy(np.array(Image.open(file)))
        found.append(pixels.view(*image.shape).permute(2, 0, 1))
    return from_bytes(torch.stack(found)).to(images.device)


def _noisy(images: Tensor, generator: torch.Generator) -> Tensor:
    return add_noise(images, 0.04, generator).clamp(-1, 1)


def _moved(images: Tensor, pixels: int) -> Tensor:
    """Move images down and to the right, their border repeated."""
    grown = pad(images, (pixels, 0, pixels, 0), "replicate")
    return grown[..., : images.shape[2], : images.shape[3]]


# What befalls ordinary pictures, which should not make them look unfamiliar.
DISTURBANCES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "none": lambda images, generator: images,
    "faint noise (0.04)": _noisy,
    "blur": lambda images, generator: avg_pool2d(pad(images, (1,) * 4, "replicate"), 3, stride=1),
    "JPEG (quality 75)": lambda images, generator: _through_jpeg(images),
    "shift by 1 pixel": lambda images, generator: _moved(images, 1),
    "shift by 2 pixels": lambda images, generator: _moved(images, 2),
    "thicker stroke": lambda images, generator: max_pool2d(
        pad(images, (1, 0, 1, 0), "replicate"), 2, stride=1
    ),
}


def load_ood(
    name: str,
    images: Tensor,
    data_dir: str | Path,
    limit: int,
    generator: torch.Generator,
    download: bool = False,
    reading: Reading = AS_FOUND,
) -> tuple[Tensor, str]:
    """Load an out-of-distribution set in the shape of a test set's images.

    name: a key of GENERATED (made from `images`), a key of TORCHVISION (test part, looked for under
    data_dir), or the path of an .npz or .npy file of images or of a folder of image files. images:
    (N, C, H, W) float, pixels in [-1, 1], of the test set. limit: images at most, drawn at random.
    download: fetch a missing torchvision set. reading: of a path.
    Returns images (n, C, H, W) float in [-1, 1] and what was found in words. Raises UserError if
    the name means nothing, the data cannot be read, or a torchvision set is missing.
    """
    if name in GENERATED:
        made = GENERATED[name](images, generator)
        chosen = torch.randperm(len(made), generator=generator)[:limit]
        return made[chosen].contiguous(), "made from the test images' shape"
    found: Pictures
    if name in TORCHVISION:
        part = torchvision_part(name, data_dir, download)
        if name == "omniglot":
            raw = np.stack([np.asarray(part[index][0]) for index in range(len(part))])
        else:
            raw = raw_images(part)
        axis = "first" if raw.ndim == 4 and raw.shape[1] == 3 else "last"
        whole = (0, 255) if raw.dtype == np.uint8 else None
        found = ArrayPictures(Path(name), raw, Reading(whole, axis))
    elif Path(name).exists():
        found = open_pictures(Path(name), reading)
    else:
        known = ", ".join([*GENERATED, *TORCHVISION])
        raise UserError(f"--ood {name!r} is neither a file, nor a folder, nor one of {known}")
    drawn = torch.randperm(len(found), generator=generator)[:limit].sort().values.tolist()
    shape = images.shape[1:]
    return read_all(found, drawn, shape), f"{found.words}, as {'x'.join(map(str, shape))}"
