"""Data sets of the user's own: a folder of image files for each class, or an .npz with labels."""

from __future__ import annotations

import os
import re
import unicodedata
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

SPLIT_NAMES = {
    **{"train": "train", "training": "train"},
    **{"val": "val", "valid": "val", "validation": "val"},
    **{"test": "test", "testing": "test"},
}


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
    if root.suffix.lower() == ".npz":
        return _from_arrays(root, image_size, reading)
    return _from_folders(root, image_size, reading)


def _from_arrays(path: Path, image_size: int | None, reading: Reading) -> Found:
    pictures = ArrayPictures(path, array_in(path, "images"), reading)
    labels, classes = _labels_in(path, len(pictures))
    shape = _common_shape([pictures], image_size, path)
    images = read_all(pictures, range(len(pictures)), shape)
    marks = np.array([zlib.crc32(row.tobytes()) for row in pictures.array], np.uint32)
    part = Part(images, torch.from_numpy(labels), marks)
    _tell({path: (pictures, part)}, classes, [])
    return Found(classes, {"": part})


def _labels_in(path: Path, count: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return an .npz's labels as numbers from 0 up, (N,) int64, and the names of the classes."""
    try:
        labels = array_in(path, "labels", alone=False)
    except UserError as error:
        if "Object arrays" not in str(error):
            raise
        raise UserError(
            f"the labels in {str(path)!r} are Python objects: save them as numbers or strings"
        ) from error
    found = f"the labels in {str(path)!r} are {labels.dtype} of shape {labels.shape}"
    fewest = 2
    if labels.ndim == 2 and labels.shape[1] > 1 and _one_hot(labels):
        fewest, labels = labels.shape[1], labels.argmax(1)
    elif labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (count,):
        raise UserError(f"{found}: one for each of the {count} images is wanted, shape ({count},)")
    if labels.dtype.kind in "US":
        return _named(labels, found)
    if labels.dtype.kind not in "buif":
        raise UserError(f"{found}: whole numbers from 0 up, or names, are wanted")
    odd = labels[~np.isfinite(labels) | (labels != np.trunc(labels))]
    if odd.size:
        raise UserError(f"{found}, and {odd[0]:g} is among them: whole numbers are wanted")
    numbers = np.unique(labels + 0)  # numbers, also of booleans
    if numbers[0] < 0:
        raise UserError(f"{found}, and {numbers[0]:g} is among them: they are to begin at 0")
    if len(numbers) < 2:
        raise UserError(f"{found}, all {numbers[0]:g}: two classes at least are wanted")
    classes = max(fewest, len(numbers))
    if numbers.tolist() != list(range(classes)):
        missing = next(number for number in range(classes + 1) if number not in numbers)
        last = max(numbers[-1], classes - 1)
        raise UserError(
            f"{found}, from {numbers[0]:g} to {last:g}, but no image has the label {missing}: "
            "number the classes from 0 up without gaps, or give their names as strings"
        )
    return labels.astype(np.int64), tuple(map(str, range(classes)))


def _named(labels: np.ndarray, found: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return labels that are names, (N,), as numbers, and the names in their order."""
    if labels.dtype.kind == "S":
        labels = np.char.decode(labels, "utf-8", "backslashreplace")
    names = sorted(set(labels.tolist()), key=_natural)
    if not all(map(str.strip, names)):
        raise UserError(f"{found}, and one of them is blank: each image needs the name of a class")
    if len(names) < 2:
        raise UserError(f"{found}, all {names[0]!r}: two classes at least are wanted")
    index = {name: number for number, name in enumerate(names)}
    return np.array([index[name] for name in labels.tolist()]), tuple(names)


def _one_hot(labels: np.ndarray) -> bool:
    numeric = labels.dtype.kind in "buif"
    return numeric and bool(np.isin(labels, (0, 1)).all() and (labels.sum(1) == 1).all())


def _natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Return a key that sorts numbers in names as numbers: 2 before 10, class9 before class10."""
    pieces = [piece for piece in re.split(r"(\d+)", name) if piece]
    key = [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in pieces]
    return key, name  # 1 and 01 are not the same


def _from_folders(root: Path, image_size: int | None, reading: Reading) -> Found:
    skipped: list[str] = []
    places = _places(root, skipped)
    files = {split: _class_files(place, skipped) for split, place in places.items()}
    first = next(iter(places))
    classes = sorted(files[first], key=_natural)
    if len(classes) < 2:
        raise UserError(
            f"{str(places[first])!r} has {len(classes)} class folders with images "
            f"({', '.join(classes) or 'none'}): two at least, one folder for each class"
        )
    for split, by_class in files.items():
        if strange := sorted(set(by_class) - set(classes)):
            raise UserError(
                f"{str(places[split])!r} has classes that are not in train/: {', '.join(strange)}; "
                "rename or remove them"
            )
        if not by_class:
            raise UserError(
                f"{str(places[split])!r} holds no class folders: sort its images into a folder "
                "for each class, or remove it"
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
    told = {places[split]: (opened[split], parts[split]) for split in parts}
    _tell(told, tuple(classes), skipped)
    return Found(tuple(classes), parts)


def _places(root: Path, skipped: list[str]) -> dict[str, Path]:
    """Return {split: folder}, train first, or {"": root} if there are none; adds to skipped."""
    if not root.is_dir():
        found = f"{str(root)!r} is neither a folder nor an .npz file"
        if not root.exists():
            found = f"there is no folder {str(root)!r}"
        raise UserError(f"{found}: name your folder of images with --data-dir")
    places: dict[str, Path] = {}
    for path in sorted(root.iterdir()):
        name = re.sub("[ _-]?set$", "", path.name.lower())  # training_set, as on Kaggle
        split = SPLIT_NAMES.get(name) if path.is_dir() else None
        if split in places:
            raise UserError(
                f"{str(root)!r} has both {places[split].name}/ and {path.name}/: put their images "
                "into one of them, or remove the other"
            )
        if split:
            places[split] = path
    if places and "train" not in places:
        raise UserError(
            f"{str(root)!r} has {next(iter(places.values())).name}/ but no train/: put the folders "
            "of the classes into train/, or rename it if it is a class"
        )
    if not places:
        return {"": root}
    beside = [path for path in sorted(root.iterdir()) if path not in places.values()]
    skipped += [f"{_shown(path.name)} (beside {places['train'].name}/)" for path in beside]
    return {split: places[split] for split in ("train", "val", "test") if split in places}


def _shown(name: str) -> str:
    """Return the name of a file as text that can be printed, the same on every file system."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return unicodedata.normalize("NFC", text)


def _class_files(folder: Path, skipped: list[str]) -> dict[str, list[Path]]:
    """Return {class: [image files]} of a folder's subfolders; adds what is no class to skipped.

    Raises UserError for a class without images and for images without classes.
    """
    by_class: dict[str, list[Path]] = {}
    loose = []
    for path in sorted(folder.iterdir()):
        name = _shown(path.name)
        if name.startswith(".") or name == "__MACOSX":
            skipped.append(f"{name} (hidden)")
        elif not path.is_dir():
            loose.append(path)
        elif name in by_class:
            raise UserError(f"{str(folder)!r} has two folders {name!r}: put them together")
        else:
            by_class[name] = _images_of_class(path, name, skipped)
    images = [path for path in loose if path.suffix.lower() in SUFFIXES]
    if images and not by_class:
        raise UserError(
            f"{str(folder)!r} has {len(images)} images and no class folders: sort them into a "
            "folder for each class, or move them away"
        )
    skipped += [f"{_shown(path.name)} (in no class folder)" for path in loose]
    return by_class


def _images_of_class(folder: Path, name: str, skipped: list[str]) -> list[Path]:
    """Return a class's image files; adds what else lies there to skipped."""
    try:
        images = image_files(folder)
    except UserError:
        images = []
    taken, kinds = set(images), set()
    others = [path for path in folder.rglob("*") if path not in taken]
    others = [path for path in others if path.is_symlink() or not path.is_dir()]
    for path in others:
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        link = path.is_symlink() and not path.is_file()
        kinds.add("hidden" if hidden else "links" if link else path.suffix or "no suffix")
    shown = ", ".join(sorted(map(_shown, kinds))[:4])
    if not images:
        only = f", only others ({shown})" if others else ""
        raise UserError(
            f"the class folder {str(folder)!r} holds no image files{only}: add images, or remove it"
        )
    if others:
        skipped.append(f"{len(others)} other files in {name} ({shown})")
    return images


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
    told: dict[Path, tuple[Pictures, Part]], classes: tuple[str, ...], skipped: list[str]
) -> None:
    """Print what was read, and what was skipped and why."""
    for place, (pictures, part) in told.items():
        counts = part.labels.bincount(minlength=len(classes)).tolist()
        shown = ", ".join(f"{name} {n}" for name, n in zip(classes, counts, strict=True))
        shape = "x".join(map(str, part.images.shape[1:]))
        read = f"{len(part.labels)} images ({pictures.words}) as {shape}"
        print(f"{_shown(str(place))}: {read}; {shown}")
    if skipped:
        more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        print(f"skipped: {', '.join(skipped[:5])}{more}")
