"""Data sets, held in memory as tensors, and their splits.

A batch costs one index and no worker process. Pixels are float32 on [-1, 1] everywhere inside the
project and on [0, 1] in files that leave it.

- digits: the 1,797 real 8x8 handwritten digits that scikit-learn bundles (the test part of UCI's
  "Optical Recognition of Handwritten Digits"); they have no official split, so 360 are held out for
  the test and 180 for validation.
- mnist: 28x28, through torchvision; 5,000 of the 60,000 training images are for validation.
- fashion-mnist, kmnist, emnist-letters, svhn, cifar10, cifar100: through torchvision; a tenth of
  the training images, 5,000 at most, is for validation.
- folder: your own, a folder of image files for each class, below train/, val/ and test/ or by
  themselves, or an .npz file of images and labels; without test/ a sixth of each class is held out
  for the test, without val/ a tenth of the rest for validation.

The splits are drawn once with a fixed seed, stratified by class: --seed does not move them, so that
runs compare.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from sgld_nrg.support.errors import UserError, first_line
from sgld_nrg.support.folders import Part, read_labelled
from sgld_nrg.support.pixels import from_bytes, to_model
from sgld_nrg.support.reading import AS_FOUND, Reading

SPLIT_SEED = 0
# name: (class in torchvision.datasets, its arguments, those of the training and the test part)
TRAIN_FLAG = ({"train": True}, {"train": False})
SPLIT_NAME = ({"split": "train"}, {"split": "test"})
TORCHVISION: dict[str, tuple[str, dict[str, Any], tuple[dict[str, Any], dict[str, Any]]]] = {
    "mnist": ("MNIST", {}, TRAIN_FLAG),
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
    """A data set with its three splits; every image of it has the same square shape.

    classes: the names of the classes, in the order of their labels. origin: what a checkpoint keeps
    of it: {"classes", "data_dir", "reading", "fingerprint": {split: what was in it}}.
    """

    name: str
    num_classes: int
    classes: tuple[str, ...]
    origin: dict[str, Any]
    train: Split
    val: Split
    test: Split

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of one image."""
        return tuple(self.train.images.shape[1:])


def load(
    name: str, data_dir: str | Path, image_size: int | None = None, reading: Reading = AS_FOUND
) -> Dataset:
    """Load a data set by its name.

    name: "digits", "mnist", "folder" or a key of TORCHVISION but omniglot. data_dir: where files
    lie or are downloaded to (mnist: MNIST/raw below it; folder: the folder itself). image_size,
    reading: of a folder's images; see folders.read_labelled.
    Raises UserError for an unknown name, for damaged files, and for a download that fails.
    """
    others = [other for other in TORCHVISION if other not in ("mnist", "omniglot")]
    loaders: dict[str, Callable[[], Dataset]] = {
        "digits": lambda: _load_digits(),
        "mnist": lambda: _load_mnist(data_dir),
        "folder": lambda: _load_folder(Path(data_dir), image_size, reading),
    }
    for other in others:
        loaders[other] = functools.partial(_load_torchvision, other, data_dir)
    if name not in loaders:
        raise UserError(f"unknown data set {name!r}; choose from {', '.join(loaders)}")
    return loaders[name]()


Rows = TypeVar("Rows", Split, Part)


def split_off(split: Rows, size: int) -> tuple[Rows, Rows]:
    """Hold out `size` images, stratified by class and always the same; returns (rest, held out)."""
    from sklearn.model_selection import train_test_split

    rest, held_out = train_test_split(
        np.arange(len(split.labels)),
        test_size=size,
        random_state=SPLIT_SEED,
        stratify=split.labels.numpy(),
    )

    def chosen(rows: np.ndarray) -> Rows:
        columns: Any = (each[rows] for each in split)
        return type(split)(*columns)

    return chosen(rest), chosen(held_out)


def _dataset(
    name: str,
    classes: tuple[str, ...],
    data_dir: str | Path,
    parts: dict[str, Part],
    reading: Reading = AS_FOUND,
) -> Dataset:
    """Return the data set of three parts, with their fingerprints."""
    splits, fingerprint = [], {}
    for split in ("train", "val", "test"):
        part = parts[split]
        bytes_ = part.images.dtype == torch.uint8
        splits.append(Split(from_bytes(part.images) if bytes_ else part.images, part.labels))
        # whatever the order of the pictures
        each = np.sort(part.marks.astype(np.uint64) * 4096 + part.labels.numpy().astype(np.uint64))
        fingerprint[split] = f"{len(part.labels)} images, {zlib.crc32(each.tobytes()):08x}"
    where = str(Path(data_dir).resolve()) if data_dir else ""  # the digits lie nowhere
    origin = {"classes": list(classes), "data_dir": where, "fingerprint": fingerprint}
    origin["reading"] = reading._asdict()
    return Dataset(name, len(classes), classes, origin, *splits)


def _marks(images: np.ndarray) -> np.ndarray:
    """Return a checksum of each image, (N,) uint32."""
    return np.array([zlib.crc32(row) for row in np.ascontiguousarray(images)], np.uint32)


DIGITS = tuple("0123456789")


def _load_digits() -> Dataset:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16  # counts 0..16
    everything = Part(to_model(images), torch.tensor(bunch.target), _marks(bunch.images))
    train, test = split_off(everything, 360)
    train, val = split_off(train, 180)
    return _dataset("digits", DIGITS, "", {"train": train, "val": val, "test": test})


def _load_mnist(data_dir: str | Path) -> Dataset:
    train, val = split_off(_mnist_part(data_dir, train=True), 5000)
    parts = {"train": train, "val": val, "test": _mnist_part(data_dir, train=False)}
    return _dataset("mnist", DIGITS, data_dir, parts)


def _mnist_part(data_dir: str | Path, train: bool) -> Part:
    """Load MNIST's training or test images as bytes, downloading them if they are missing.

    Read here and not by torchvision, whose import takes as long as all the rest of it.
    """
    name, count = ("train", 60_000) if train else ("t10k", 10_000)
    kinds = {"images-idx3-ubyte": (16, 28 * 28), "labels-idx1-ubyte": (8, 1)}  # header, bytes each
    files = [Path(data_dir, "MNIST", "raw", f"{name}-{kind}") for kind in kinds]
    if not all(file.is_file() for file in files):
        _download_mnist(data_dir)
    damaged = UserError(
        f"the MNIST files under {str(data_dir)!r} are damaged: "
        "delete the folder MNIST there and run again to download them"
    )
    parts = []
    for file, (header, each) in zip(files, kinds.values(), strict=True):
        try:
            values = np.fromfile(file, np.uint8)
        except OSError as error:
            raise damaged from error
        if len(values) != header + count * each:
            raise damaged
        parts.append(values[header:])
    images, labels = parts[0].reshape(count, 28, 28), parts[1]
    if np.unique(labels).tolist() != list(range(10)):
        raise damaged
    return Part(torch.tensor(images).unsqueeze(1), torch.tensor(labels).long(), _marks(images))


def _download_mnist(data_dir: str | Path) -> None:
    from torchvision.datasets import MNIST

    try:
        MNIST(data_dir, download=True)
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"MNIST is not under {str(data_dir)!r} and its download failed "
            f"({first_line(error)}): name the folder that holds MNIST/raw with --data-dir or "
            "SGLD_NRG_DATA, or use --dataset digits, which needs no download"
        ) from error


def _load_torchvision(name: str, data_dir: str | Path) -> Dataset:
    (train, names), (test, _) = (_torchvision_split(name, data_dir, part) for part in (True, False))
    labels = train.labels.unique().tolist()
    without_gaps = labels == list(range(len(labels)))
    if not without_gaps or not set(test.labels.tolist()) <= set(labels):
        raise UserError(
            f"the files of {name} under {str(data_dir)!r} are damaged: "
            "delete them there and run again"
        )
    train, val = split_off(train, min(len(train.labels) // 10, 5000))
    classes = names if len(names) == len(labels) else tuple(map(str, labels))
    return _dataset(name, classes, data_dir, {"train": train, "val": val, "test": test})


def _torchvision_split(
    name: str, data_dir: str | Path, train: bool
) -> tuple[Part, tuple[str, ...]]:
    """Return a part as bytes, and the names of its classes if torchvision knows them."""
    part = torchvision_part(name, data_dir, download=True, train=train)
    raw = raw_images(part)
    pixels = torch.tensor(raw)
    if pixels.ndim == 3:
        pixels = pixels.unsqueeze(1)
    elif pixels.shape[3] == 3:
        pixels = pixels.permute(0, 3, 1, 2)
    labels = torch.as_tensor(np.asarray(part.labels if name == "svhn" else part.targets)).long()
    first = 1 if name == "emnist-letters" else 0
    names = tuple(getattr(part, "classes", ()))[first:]
    return Part(pixels, labels - first, _marks(raw)), names


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


def _load_folder(root: Path, image_size: int | None, reading: Reading) -> Dataset:
    classes, parts = read_labelled(root, image_size, reading)
    train = parts.get("train", parts.get(""))
    assert train is not None
    test, val = parts.get("test"), parts.get("val")
    if test is None:
        train, test = _hold_out(train, 6, root)
    if val is None:
        train, val = _hold_out(train, 10, root)
    fewest = train.labels.bincount(minlength=len(classes))
    if fewest.min() < 2:
        raise UserError(
            f"class {classes[int(fewest.argmin())]!r} under {str(root)!r} keeps fewer than two "
            "training images: add images, or remove the class"
        )
    parts = {"train": train, "val": val, "test": test}
    return _dataset("folder", classes, root, parts, reading)


def _hold_out(part: Part, share: int, root: Path) -> tuple[Part, Part]:
    """Hold out one of `share` images. Raises UserError if classes are too small for it."""
    try:
        return split_off(part, max(len(part.labels) // share, len(part.labels.unique())))
    except ValueError as error:
        raise UserError(
            f"the classes under {str(root)!r} are too small to hold images out of each: add images"
        ) from error
