"""Data sets of the user's own: a folder of image files for each class, or an .npz with labels."""

from __future__ import annotations

import os
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sgld_nrg.support.errors import UserError
from sgld_nrg.support.folder_cache import Kept, is_cache, key_of, load, save
from sgld_nrg.support.image_files import SUFFIXES, FilePictures, Look, files_in, look, look_closely
from sgld_nrg.support.images import ArrayPictures, Pictures, array_in, read_all, room_for
from sgld_nrg.support.parallel import over_cores
from sgld_nrg.support.pixels import from_bytes
from sgld_nrg.support.reading import Reading

MANY = 2000  # files: from here on a pool of processes reads them, and they are kept in one file
CHUNK = 64  # files that a process reads at a time: few enough for the memory, whatever their size

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
    _tell({path: (pictures.words, part)}, classes, [])
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
    paths = {
        split: [path for name in classes for path in by_class.get(name, [])]
        for split, by_class in files.items()
    }
    kept = _kept(root, paths, image_size, reading)
    parts = {}
    for split, by_class in files.items():
        sizes = torch.tensor([len(by_class.get(name, [])) for name in classes])
        labels = torch.arange(len(classes)).repeat_interleave(sizes)
        parts[split] = Part(torch.from_numpy(kept[split].images), labels, kept[split].marks)
    told = {places[split]: (kept[split].words, parts[split]) for split in parts}
    _tell(told, tuple(classes), skipped)
    return Found(tuple(classes), parts)


def _kept(
    root: Path, paths: dict[str, list[Path]], image_size: int | None, reading: Reading
) -> dict[str, Kept]:
    """Return {split: Kept} of {split: files}; of many files, as it was kept if it can be."""
    files = [path for split in paths for path in paths[split]]
    key = key_of(root, files, [image_size, reading]) if len(files) >= MANY else None
    counts = {split: len(paths[split]) for split in paths}
    kept = load(root, key, counts) if key else None
    if kept is None:
        kept = _read(root, paths, image_size, reading)
        if key:
            save(root, key, kept)
    return kept


def _read(
    root: Path, paths: dict[str, list[Path]], image_size: int | None, reading: Reading
) -> dict[str, Kept]:
    """Look at {split: files}, all before the first is read, and read them: {split: Kept}."""
    files = [path for split in paths for path in paths[split]]
    side = image_size or look(files[0]).size[0]  # without a size they must all have this one
    looks: list[Any] = [None] * len(files)
    for rows, found in _by_chunks(
        lambda rows: [look_closely(files[row], side) for row in rows], len(files), pooled=True
    ):
        looks[rows.start : rows.stop] = found
    looks_of, opened = {}, {}
    for split, its_paths in paths.items():
        looks_of[split], looks = looks[: len(its_paths)], looks[len(its_paths) :]
        opened[split] = FilePictures(its_paths, reading, looks=looks_of[split])
    shape = _common_shape(list(opened.values()), image_size, root)
    kept = {}
    for split, pictures in opened.items():
        looks = looks_of.pop(split)
        marks = np.array([found.mark for found in looks], np.uint32)
        kept[split] = Kept(_images(pictures, looks, shape), marks, pictures.words)
    return kept


def _images(
    pictures: FilePictures, looks: Sequence[Look], shape: tuple[int, int, int]
) -> np.ndarray:
    """Return the pictures as bytes if looking at them gave all their pixels, else as floats."""
    images = room_for(len(looks), shape).numpy()  # also for bytes, which become floats later
    rest = [row for row, found in enumerate(looks) if found.pixels is None]
    if not rest:
        images = np.empty(images.shape, np.uint8)
    for row, found in enumerate(looks):
        if found.pixels is not None:
            pixels = found.pixels if found.pixels.ndim == 2 else found.pixels.transpose(2, 0, 1)
            images[row] = from_bytes(torch.tensor(pixels)).numpy() if rest else pixels

    def read(rows: range) -> np.ndarray:
        return read_all(pictures, rest[rows.start : rows.stop], shape).numpy()

    for rows, found in _by_chunks(read, len(rest), pooled=not pictures.by_turns):
        images[rest[rows.start : rows.stop]] = found
    return images


def _by_chunks(
    work: Callable[[range], Any], count: int, pooled: bool
) -> Iterator[tuple[range, Any]]:
    """Yield (rows, work(rows)) of `count` files, a chunk at a time, in any order.

    pooled: whether it may be in a process for each core, if the files are many. What a chunk raises
    is raised when all before it are done, as if they had been read one by one.
    """
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    left = dict(zip(map(str, chunks), chunks, strict=True))

    def attempt(name: str) -> Any:
        try:
            return work(left[name])
        except UserError:
            return None

    if pooled and count >= MANY and torch.get_num_threads() > 1:
        for name, done in over_cores(attempt, list(left), torch.device("cpu")):
            if done is None:
                break
            yield left.pop(name), done
    for rows in left.values():
        yield rows, work(rows)


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
    beside = [path for path in beside if not is_cache(path)]
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
        if is_cache(path):
            continue
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
    images, others = files_in(folder)
    kinds = set()
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


def _tell(told: dict[Path, tuple[str, Part]], classes: tuple[str, ...], skipped: list[str]) -> None:
    """Print what was read, and what was skipped and why."""
    for place, (words, part) in told.items():
        counts = part.labels.bincount(minlength=len(classes)).tolist()
        shown = ", ".join(f"{name} {n}" for name, n in zip(classes, counts, strict=True))
        shape = "x".join(map(str, part.images.shape[1:]))
        read = f"{len(part.labels)} images ({words}) as {shape}"
        print(f"{_shown(str(place))}: {read}; {shown}")
    if skipped:
        more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        print(f"skipped: {', '.join(skipped[:5])}{more}")
