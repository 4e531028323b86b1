"""Data sets, held in memory as tensors; their splits; pixel scaling and its inverse.

A batch costs one index and no worker process. Pixels are float32 on [-1, 1] everywhere inside the project and on
[0, 1] in files that leave it.

- digits: the 1,797 real 8x8 handwritten digits that scikit-learn bundles (the test part of UCI's "Optical Recognition
  of Handwritten Digits"); they have no official split, so 360 are held out for the test and 180 for validation.
- mnist: 28x28, through torchvision; 5,000 of the 60,000 training images are held out for validation.

The splits are drawn once with a fixed seed, stratified by class: --seed does not move them, so that runs compare.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from cli import UserError

SPLIT_SEED = 0


class Split(NamedTuple):
    """images: (N, C, H, W) float32, pixels in [-1, 1]; labels: (N,) int64."""

    images: torch.Tensor
    labels: torch.Tensor

    def to(self, device):
        """Return the split on a device."""
        return Split(self.images.to(device), self.labels.to(device))


class Dataset(NamedTuple):
    """A data set with its three splits; every image of it has the same square shape."""

    name: str
    num_classes: int
    train: Split
    val: Split
    test: Split

    @property
    def shape(self):
        """(C, H, W) of one image."""
        return tuple(self.train.images.shape[1:])


def to_model(pixels):
    """Scale pixels in [0, 1] to the model's [-1, 1]; float tensor of any shape."""
    return pixels * 2 - 1


def to_unit(x):
    """Scale the model's pixels in [-1, 1] to [0, 1], clamping what a chain left outside; float tensor of any shape."""
    return ((x + 1) / 2).clamp(0, 1)


def split_off(split, size):
    """Hold out `size` images, stratified by class and with the same result every time; returns (rest, held out)."""
    from sklearn.model_selection import train_test_split

    rest, held_out = train_test_split(
        torch.arange(len(split.labels)).numpy(), test_size=size, random_state=SPLIT_SEED, stratify=split.labels.numpy()
    )
    return Split(split.images[rest], split.labels[rest]), Split(split.images[held_out], split.labels[held_out])


def load(name, data_dir):
    """Load a data set by its name.

    name: "digits" or "mnist". data_dir: where files lie or are downloaded to (mnist: MNIST/raw below it).
    Raises UserError for an unknown name, for files that are damaged, and for a download that fails.
    """
    loaders = {"digits": _load_digits, "mnist": _load_mnist}
    if name not in loaders:
        raise UserError(f"unknown data set {name!r}; choose from {', '.join(loaders)}")
    return loaders[name](data_dir)


def _load_digits(data_dir):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16  # the set's pixels are counts 0..16
    train, test = split_off(Split(to_model(images), torch.tensor(bunch.target)), 360)
    train, val = split_off(train, 180)
    return Dataset("digits", 10, train, val, test)


def _load_mnist(data_dir):
    train, val = split_off(_mnist_part(data_dir, train=True), 5000)
    return Dataset("mnist", 10, train, val, _mnist_part(data_dir, train=False))


def _mnist_part(data_dir, train):
    """Load MNIST's training or test images, downloading them where they are missing."""
    from torchvision.datasets import MNIST

    raw = Path(data_dir, "MNIST", "raw")
    if not all((raw / name.removesuffix(".gz")).is_file() for name, _ in MNIST.resources):
        try:
            MNIST(data_dir, download=True)
        except (RuntimeError, OSError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"MNIST is not under {str(data_dir)!r} and its download failed ({reason}): name the folder that holds "
                "MNIST/raw with --data-dir or SGLD_NRG_DATA, or use --dataset digits, which needs no download"
            ) from error
    try:
        part = MNIST(data_dir, train=train)
    except (RuntimeError, AssertionError, ValueError, KeyError, OSError) as error:  # what its reader raises for broken files
        raise _damaged_mnist(data_dir) from error
    count = 60000 if train else 10000
    in_range = part.targets.numel() and part.targets.min() >= 0 and part.targets.max() <= 9
    if part.data.shape != (count, 28, 28) or part.targets.shape != (count,) or not in_range:
        raise _damaged_mnist(data_dir)
    return Split(to_model(part.data.unsqueeze(1) / 255), part.targets)


def _damaged_mnist(data_dir):
    return UserError(
        f"the MNIST files under {str(data_dir)!r} are damaged: delete the folder MNIST there and run again to download them"
    )
