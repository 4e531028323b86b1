"""Data sets, held in memory as tensors, and their splits.

A batch costs one index and no worker process. Pixels are float32 on [-1, 1] everywhere inside the
project and on [0, 1] in files that leave it.

- digits: the 1,797 real 8x8 handwritten digits that scikit-learn bundles (the test part of UCI's
  "Optical Recognition of Handwritten Digits"); they have no official split, so 360 are held out for
  the test and 180 for validation.
- mnist: 28x28, through torchvision; 5,000 of the 60,000 training images are for validation.
- fashion-mnist, kmnist, emnist-letters, svhn, cifar10, cifar100: through torchvision; a tenth of
  the training images, 5,000 at most, is for validation.
- folder: your own, a folder of image files for each class, below train/ and test/ or by themselves,
  or an .npz file of images and labels; without test/ a sixth of each class is held out for the
  test; a tenth of the rest is for validation.

The splits are drawn once with a fixed seed, stratified by class: --seed does not move them, so that
runs compare.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sgld_nrg.support.errors import UserError, first_line
from sgld_nrg.support.images import (
    IMAGE_SUFFIXES,
    array_file,
    fit_shape,
    from_bytes,
    picture,
    to_model,
)

SPLIT_SEED = 0
# name: (class in torchvision.datasets, its arguments, those of the training and the test part)
TRAIN_FLAG = ({"train": True}, {"train": False})
SPLIT_NAME = ({"split": "train"}, {"split": "test"})
TORCHVISION: dict[str, tuple[str, dict[str, Any], tuple[dict[str, Any], dict[str, Any]]]] = {
    "fashion-mnist": ("FashionMNIST", {}, TRAIN_FLAG),
    "kmnist": ("KMNIST", {}, TRAIN_FLAG),
    "emnist-letters": ("EMNIST", {"split": "letters"}, TRAIN_FLAG),
    "omniglot": ("Omniglot", {}, ({"background": True}, {"background": False})),
    "svhn": ("SVHN", {}, SPLIT_NAME),
    "cifar10": ("CIFAR10", {}, TRAIN_FLAG),
    "cifar100": ("CIFAR100", {}, TRAIN_FLAG),
}


class Split(NamedTuple):
    """images: (N, C, H, W) float32, pixels in [-1, 1]; labels: (N,) int64."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Split:
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
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of one image."""
        return tuple(self.train.images.shape[1:])


def load(name: str, data_dir: str | Path, image_size: int | None = None) -> Dataset:
    """Load a data set by its name.

    name: "digits", "mnist", "folder" or a key of TORCHVISION but omniglot. data_dir: where files
    lie or are downloaded to (mnist: MNIST/raw below it; folder: the folder itself). image_size:
    side in pixels that a folder's images are resized to; None: they must have one size.
    Raises UserError for an unknown name, for damaged files, and for a download that fails.
    """
    loaders = {
        "digits": lambda: _load_digits(),
        "mnist": lambda: _load_mnist(data_dir),
        "folder": lambda: _load_folder(Path(data_dir), image_size),
    }
    for other in TORCHVISION:
        if other != "omniglot":
            loaders[other] = functools.partial(_load_torchvision, other, data_dir)
    if name not in loaders:
        raise UserError(f"unknown data set {name!r}; choose from {', '.join(loaders)}")
    return loaders[name]()


def split_off(split: Split, size: int) -> tuple[Split, Split]:
    """Hold out `size` images, stratified by class and always the same; returns (rest, held out)."""
    from sklearn.model_selection import train_test_split

    rest, held_out = train_test_split(
        np.arange(len(split.labels)),
        test_size=size,
        random_state=SPLIT_SEED,
        stratify=split.labels.numpy(),
    )
    kept, held = (Split(split.images[rows], split.labels[rows]) for rows in (rest, held_out))
    return kept, held


def _load_digits() -> Dataset:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16  # counts 0..16
    train, test = split_off(Split(to_model(images), torch.tensor(bunch.target)), 360)
    train, val = split_off(train, 180)
    return Dataset("digits", 10, train, val, test)


def _load_mnist(data_dir: str | Path) -> Dataset:
    train, val = split_off(_mnist_part(data_dir, train=True), 5000)
    splits = (train, val, _mnist_part(data_dir, train=False))
    return Dataset("mnist", 10, *(Split(from_bytes(part.images), part.labels) for part in splits))


def _mnist_part(data_dir: str | Path, train: bool) -> Split:
    """Load MNIST's training or test images as bytes, downloading them if they are missing."""
    from torchvision.datasets import MNIST

    raw = Path(data_dir, "MNIST", "raw")
    if not all((raw / name.removesuffix(".gz")).is_file() for name, _ in MNIST.resources):
        try:
            MNIST(data_dir, download=True)
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"MNIST is not under {str(data_dir)!r} and its download failed "
                f"({first_line(error)}): name the folder that holds MNIST/raw with --data-dir or "
                "SGLD_NRG_DATA, or use --dataset digits, which needs no download"
            ) from error
    damaged = UserError(
        f"the MNIST files under {str(data_dir)!r} are damaged: "
        "delete the folder MNIST there and run again to download them"
    )
    try:
        part = MNIST(data_dir, train=train)
    except (RuntimeError, AssertionError, ValueError, KeyError, OSError) as error:
        raise damaged from error  # what its reader raises for broken files
    count = 60000 if train else 10000
    every_class = part.targets.unique().tolist() == list(range(10))
    if part.data.shape != (count, 28, 28) or part.targets.shape != (count,) or not every_class:
        raise damaged
    return Split(part.data.unsqueeze(1), part.targets)


def _load_torchvision(name: str, data_dir: str | Path) -> Dataset:
    train, test = (_torchvision_split(name, data_dir, part) for part in (True, False))
    classes = train.labels.unique().tolist()
    without_gaps = classes == list(range(len(classes)))
    if not without_gaps or not set(test.labels.tolist()) <= set(classes):
        raise UserError(
            f"the files of {name} under {str(data_dir)!r} are damaged: "
            "delete them there and run again"
        )
    train, val = split_off(train, min(len(train.labels) // 10, 5000))
    return Dataset(name, len(classes), train, val, test)


def _torchvision_split(name: str, data_dir: str | Path, train: bool) -> Split:
    part = torchvision_part(name, data_dir, download=True, train=train)
    pixels = torch.tensor(raw_images(part))
    if pixels.ndim == 3:
        pixels = pixels.unsqueeze(1)
    elif pixels.shape[3] == 3:
        pixels = pixels.permute(0, 3, 1, 2)
    labels = torch.as_tensor(np.asarray(part.labels if name == "svhn" else part.targets)).long()
    first = 1 if name == "emnist-letters" else 0
    return Split(from_bytes(pixels), labels - first)


def torchvision_part(name: str, data_dir: str | Path, download: bool, train: bool = False) -> Any:
    """Return a part of a torchvision data set, or raise UserError if it cannot be had."""
    import torchvision.datasets

    kind, settings, parts = TORCHVISION[name]
    settings = {**settings, **parts[0 if train else 1]}
    for fetch in (False, True) if download else (False,):
        try:
            return getattr(torchvision.datasets, kind)(data_dir, download=fetch, **settings)
        except Exception as error:  # each of them raises in its own way
            reason, cause = first_line(error), error
    advice = "" if download else ", or download it with --download"
    raise UserError(
        f"{name} is not under {str(data_dir)!r} ({reason}): name its folder with --data-dir{advice}"
    ) from cause


def raw_images(part: Any) -> np.ndarray:
    """Return the images of a torchvision data set as an array, the right way up."""
    images = np.asarray(part.data)
    turned = type(part).__name__ == "EMNIST"  # its files hold columns, MNIST's hold rows
    return images.transpose(0, 2, 1) if turned else images


def _load_folder(root: Path, image_size: int | None) -> Dataset:
    if root.suffix == ".npz":
        splits = [_labelled_arrays(root, image_size)]
    else:
        splits = _class_folders(root, image_size)
    train, test = splits if len(splits) == 2 else _hold_out(splits[0], 6, root)
    train, val = _hold_out(train, 10, root)
    count = len(splits[0].labels.unique())
    if train.labels.bincount(minlength=count).min() < 2:
        raise UserError(
            f"a class under {str(root)!r} keeps fewer than two training images: "
            "add images, or remove the class"
        )
    return Dataset("folder", count, train, val, test)


def _hold_out(split: Split, share: int, root: Path) -> tuple[Split, Split]:
    """Hold out one of `share` images. Raises UserError if classes are too small for it."""
    try:
        return split_off(split, max(len(split.labels) // share, len(split.labels.unique())))
    except ValueError as error:
        raise UserError(
            f"the classes under {str(root)!r} are too small to hold images out of each: add images"
        ) from error


def _labelled_arrays(path: Path, image_size: int | None) -> Split:
    """Return the images and labels of an .npz as one split."""
    images = array_file(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            labels = arrays["labels"]
    except (KeyError, ValueError):  # none there, or Python objects
        labels = np.zeros(0)
    classes = np.unique(labels).tolist() if labels.dtype.kind in "ui" else []
    gaps = len(classes) < 2 or classes != list(range(len(classes)))
    if labels.shape != (len(images),) or gaps:
        raise UserError(
            f"{str(path)!r} must hold 'labels', a whole number from 0 up for each of its "
            f"{len(images)} images, without gaps and of two classes at least"
        )
    channels_last = images.ndim == 4 and images.shape[1] not in (1, 3)
    *channels, height, width = images.shape[3:0:-1] if channels_last else images.shape[1:]
    if height != width and not image_size:
        raise UserError(
            f"the images in {str(path)!r} are not square ({width}x{height}): "
            "give one size with --image-size"
        )
    shape = (3 if channels == [3] else 1, image_size or height, image_size or width)
    return Split(fit_shape(list(images), shape)[0], torch.from_numpy(labels.astype(np.int64)))


def _class_folders(root: Path, image_size: int | None) -> list[Split]:
    """Return the images below train/ and test/, or below the folder itself: two splits or one."""
    parts = [root]
    if (root / "train").is_dir():
        parts = [root / name for name in ("train", "test") if (root / name).is_dir()]
    found = [_class_files(part) for part in parts]
    classes = sorted(found[0])
    if len(classes) < 2:
        raise UserError(
            f"{str(parts[0])!r} has {len(classes)} class folders with images: "
            "two at least, one folder for each class"
        )
    if strange := sorted(set(found[-1]) - set(classes)):
        raise UserError(
            f"{str(parts[-1])!r} has classes that are not in train/: {', '.join(strange)}; "
            "rename or remove them"
        )
    pictures = [
        [picture(path) for name in classes for path in part.get(name, [])] for part in found
    ]
    labels = [
        torch.tensor([index for index, name in enumerate(classes) for _ in part.get(name, [])])
        for part in found
    ]
    sizes = {each.size for part in pictures for each in part}
    if image_size:
        size, smooth = (image_size, image_size), Image.Resampling.BILINEAR
        pictures = [[each.resize(size, smooth) for each in part] for part in pictures]
    elif len(sizes) > 1 or any(width != height for width, height in sizes):
        shown = ", ".join(f"{width}x{height}" for width, height in sorted(sizes)[:4])
        raise UserError(
            f"the images under {str(root)!r} are not of one square size ({shown}): "
            "give one with --image-size"
        )
    colour = any(each.mode == "RGB" for part in pictures for each in part)
    splits = []
    for part, classes_of in zip(pictures, labels, strict=True):
        arrays = [np.asarray(each.convert("RGB" if colour else "L")) for each in part]
        pixels = torch.from_numpy(np.stack(arrays))
        pixels = pixels.permute(0, 3, 1, 2) if colour else pixels.unsqueeze(1)
        splits.append(Split(from_bytes(pixels), classes_of))
    return splits


def _class_files(folder: Path) -> dict[str, list[Path]]:
    """Return {class: [image files]} of a folder's subfolders, those without images left out."""
    try:
        below = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise UserError(
            f"cannot read {str(folder)!r} ({error.strerror}): "
            "name your folder of images with --data-dir"
        ) from error
    files = {
        path.name: sorted(each for each in path.iterdir() if each.suffix.lower() in IMAGE_SUFFIXES)
        for path in below
    }
    return {name: paths for name, paths in files.items() if paths}
