"""Data sets of the user's own: a folder of image files for each class, or an .npz with labels."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sgld_nrg.support.errors import UserError
from sgld_nrg.support.images import (
    SUFFIXES,
    ArrayPictures,
    FilePictures,
    Pictures,
    Reading,
    array_in,
    image_files,
    read_all,
)

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class Part(NamedTuple):
    """Labelled pictures that are not split, or not split further.

    images: (N, C, H, W), uint8 or float on [-1, 1]. labels: (N,) int64. marks: (N,) uint32, a
    checksum of each picture as it was found.
    """

    images: Tensor
    labels: Tensor
    marks: np.ndarray


class Found(NamedTuple):
    """What a path holds: the classes' names in the order of their labels, and {split: Part}."""

    classes: tuple[str, ...]
    parts: dict[str, Part]


def read_labelled(root: Path, image_size: int | None, reading: Reading) -> Found:
    """Read a folder of class folders, below train/, val/ and test/ or by themselves, or an .npz.

    image_size: side in pixels that pictures are resized to; None: they must be of one square size.
    Prints what was read and what was skipped. Raises UserError for what cannot be meant.
    """
    if root.suffix == ".npz":
        return _from_arrays(root, image_size, reading)
    return _from_folders(root, image_size, reading)


def _from_arrays(path: Path, image_size: int | None, reading: Reading) -> Found:
    pictures = ArrayPictures(path, array_in(path, "images"), reading)
    labels, classes = _labels_in(path, len(pictures))
    shape = _common_shape([pictures], image_size, path)
    images = read_all(pictures, range(len(pictures)), shape)
    marks = np.array([zlib.crc32(row.tobytes()) for row in pictures.array], np.uint32)
    part = Part(images, torch.from_numpy(labels), marks)
    _tell(path, {"": (pictures, part)}, classes, [])
    return Found(classes, {"": part})


def _labels_in(path: Path, count: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return an .npz's labels as numbers from 0 up, (N,) int64, and the names of the classes."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if "labels" not in arrays.files:
                raise UserError(
                    f"{str(path)!r} has no array 'labels', only {', '.join(arrays.files)}: add one "
                    "label for each image"
                )
            labels = arrays["labels"]
    except ValueError as error:
        raise UserError(
            f"the labels in {str(path)!r} are Python objects: save them as numbers or strings"
        ) from error
    found = f"the labels in {str(path)!r} are {labels.dtype} of shape {labels.shape}"
    if labels.ndim == 2 and labels.shape[1] > 1 and _one_hot(labels):
        labels = labels.argmax(1)
    elif labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (count,):
        raise UserError(f"{found}: one for each of the {count} images is wanted, shape ({count},)")
    if labels.dtype.kind in "US":
        names = sorted({str(name) for name in labels.tolist()}, key=_natural)
        if len(names) < 2:
            raise UserError(f"{found}, all {names[0]!r}: two classes at least are wanted")
        index = {name: number for number, name in enumerate(names)}
        return np.array([index[str(name)] for name in labels.tolist()]), tuple(names)
    if labels.dtype.kind not in "buif" or not np.isfinite(labels).all():
        raise UserError(f"{found}: whole numbers from 0 up, or names, are wanted")
    if (labels != np.round(labels)).any():
        odd = labels[labels != np.round(labels)][0]
        raise UserError(f"{found}, and {odd:g} is among them: whole numbers are wanted")
    numbers = np.unique(labels.astype(np.int64))
    if numbers[0] < 0:
        raise UserError(f"{found}, and {numbers[0]} is among them: they are to begin at 0")
    if len(numbers) < 2:
        raise UserError(f"{found}, all {numbers[0]}: two classes at least are wanted")
    if numbers[-1] != len(numbers) - 1:
        missing = next(number for number in range(numbers[-1]) if number not in numbers)
        raise UserError(
            f"{found}, from {numbers[0]} to {numbers[-1]}, but no image has the label {missing}: "
            "number the classes from 0 up without gaps, or give their names as strings"
        )
    return labels.astype(np.int64), tuple(map(str, numbers.tolist()))


def _one_hot(labels: np.ndarray) -> bool:
    numeric = labels.dtype.kind in "buif"
    return numeric and bool(np.isin(labels, (0, 1)).all() and (labels.sum(1) == 1).all())


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts numbers in names as numbers: 2 before 10, class9 before class10."""
    pieces = re.split(r"(\d+)", name)
    return [(0, int(piece), "") if piece.isdigit() else (1, 0, piece) for piece in pieces if piece]


def _from_folders(root: Path, image_size: int | None, reading: Reading) -> Found:
    skipped: list[str] = []
    if not root.is_dir():
        raise UserError(
            f"there is no folder {str(root)!r}: name your folder of images with --data-dir"
        )
    below = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()}
    places = {SPLIT_NAMES[name]: path for name, path in below.items() if name in SPLIT_NAMES}
    if "train" not in places:
        places = {"": root}
    files = {split: _class_files(place, skipped) for split, place in places.items()}
    first = next(split for split in ("train", "") if split in files)
    classes = sorted(files[first], key=_natural)
    if len(classes) < 2:
        raise UserError(
            f"{str(places[first])!r} has {len(classes)} class folders with images: "
            "two at least, one folder for each class"
        )
    for split, by_class in files.items():
        if strange := sorted(set(by_class) - set(classes)):
            raise UserError(
                f"{str(places[split])!r} has classes that are not in train/: {', '.join(strange)}; "
                "rename or remove them"
            )
        if empty := [name for name, paths in by_class.items() if not paths]:
            raise UserError(
                f"the class folder {str(places[split] / empty[0])!r} holds no image files: "
                "add images, or remove it"
            )
    opened: dict[str, Pictures] = {}
    labels, paths_of = {}, {}
    for split, by_class in files.items():
        paths_of[split] = [path for name in classes for path in by_class.get(name, [])]
        opened[split] = FilePictures(paths_of[split], reading)
        sizes = [len(by_class.get(name, [])) for name in classes]
        labels[split] = torch.arange(len(classes)).repeat_interleave(torch.tensor(sizes))
    shape = _common_shape(list(opened.values()), image_size, root)
    parts = {}
    for split, pictures in opened.items():
        images = read_all(pictures, range(len(pictures)), shape)
        marks = [zlib.crc32(path.read_bytes()) for path in paths_of[split]]
        parts[split] = Part(images, labels[split], np.array(marks, np.uint32))
    told = {split: (opened[split], parts[split]) for split in parts}
    _tell(root, told, tuple(classes), skipped)
    return Found(tuple(classes), parts)


def _class_files(folder: Path, skipped: list[str]) -> dict[str, list[Path]]:
    """Return {class: [image files]} of a folder's subfolders; adds what is no class to skipped."""
    by_class, loose = {}, []
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "__")):
            skipped.append(f"{path.name} (hidden)")
        elif path.is_dir():
            try:
                by_class[path.name] = image_files(path)
            except UserError:
                by_class[path.name] = []
            others = [file for file in path.rglob("*") if file.is_file()]
            number = len(others) - len(by_class[path.name])
            if number and by_class[path.name]:
                skipped.append(f"{number} other files in {path.name}")
        else:
            loose.append(path)
    images = [path for path in loose if path.suffix.lower() in SUFFIXES]
    if images and not by_class:
        raise UserError(
            f"{str(folder)!r} has {len(images)} images and no class folders: sort them into a "
            "folder for each class, or move them away"
        )
    skipped += [f"{path.name} (in no class folder)" for path in loose]
    return by_class


def _common_shape(
    found: Sequence[Pictures], image_size: int | None, root: Path
) -> tuple[int, int, int]:
    """Return the shape (C, H, W) that pictures are brought to. UserError if it is not settled."""
    channels = 3 if any(pictures.colour for pictures in found) else 1
    if image_size:
        return channels, image_size, image_size
    sizes = sorted(set().union(*(pictures.sizes for pictures in found)))
    if len(sizes) > 1 or sizes[0][0] != sizes[0][1]:
        shown = ", ".join(f"{width}x{height}" for height, width in sizes[:4])
        raise UserError(
            f"the images in {str(root)!r} are not of one square size ({shown}): "
            "give one with --image-size"
        )
    return channels, *sizes[0]


def _tell(
    root: Path, told: dict[str, tuple[Pictures, Part]], classes: tuple[str, ...], skipped: list[str]
) -> None:
    """Print what was read, and what was skipped and why."""
    for split, (pictures, part) in told.items():
        counts = part.labels.bincount(minlength=len(classes)).tolist()
        shown = ", ".join(f"{name} {n}" for name, n in zip(classes, counts, strict=True))
        shape = "x".join(map(str, part.images.shape[1:]))
        where = f"{root / split}" if split else f"{root}"
        print(f"{where}: {len(part.labels)} images ({pictures.words}) as {shape}; {shown}")
    if skipped:
        more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        print(f"skipped: {', '.join(skipped[:5])}{more}")
