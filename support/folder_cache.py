"""What a folder of many image files was read as, kept in one hidden file of it.

The file is trusted under one condition alone: its key is that of the files as they lie there now
and of how they are to be read. Any other file, damaged or foreign, is ignored and replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

STEM = ".sgld-nrg-cache"
NAME = f"{STEM}.npz"
VERSION = 1  # of what is kept, and of how files become pixels: one more with either
MOST_BYTES = 2**30  # a folder is not filled unasked with more than this
LEFT = 3600  # seconds after which a temporary file is one that a killed run left


class Kept(NamedTuple):
    """Pictures of one split, in the order of their files.

    images: (N, C, H, W), uint8 or float32 on [-1, 1]. marks: (N,) uint32, a checksum of each file.
    words: what was found.
    """

    images: np.ndarray
    marks: np.ndarray
    words: str


def is_cache(path: Path) -> bool:
    """Return whether a path is named as this module's file, or as one that it had not finished."""
    return path.name.startswith(STEM)


def key_of(root: Path, files: Sequence[Path], settings: Sequence[Any]) -> str | None:
    """Return a key of all that decides what files are read as; None if one cannot be looked at.

    settings: how they are to be read, as JSON can hold it. A file counts as changed if its path
    below the root, its size or one of its times has; the time of its last change of any kind
    (ctime) tells a file that was replaced by one of the same size and the same mtime.
    """
    digest = hashlib.sha256(json.dumps([VERSION, Image.__version__, *settings]).encode())
    start = len(os.fspath(root / "x")) - 1  # of "." there is nothing in the paths
    try:
        for file in files:
            name, found = os.fspath(file), os.stat(file)
            times = f"{found.st_mtime_ns} {found.st_ctime_ns}"
            digest.update(f"{name[start:]!a} {found.st_size} {times}\n".encode())
    except OSError:
        return None
    return digest.hexdigest()


def load(root: Path, key: str, counts: Mapping[str, int]) -> dict[str, Kept] | None:
    """Return {split: Kept} of a folder if what was kept has this key, else None.

    counts: {split: number of its files}.
    """
    try:
        with np.load(root / NAME, allow_pickle=False) as arrays:
            if str(arrays["key"]) != key:
                return None
            kept = {
                split: Kept(arrays[f"{split} images"], arrays[f"{split} marks"], words)
                for split, words in json.loads(str(arrays["words"])).items()
            }
    except Exception:  # numpy and zipfile raise a dozen types for damaged files
        return None
    lengths = {split: (len(each.images), len(each.marks)) for split, each in kept.items()}
    return kept if lengths == {split: (count, count) for split, count in counts.items()} else None


def save(root: Path, key: str, kept: Mapping[str, Kept]) -> None:
    """Keep {split: Kept} in a folder, unless it cannot be written to or they are too large."""
    if sum(each.images.nbytes for each in kept.values()) > MOST_BYTES:
        return
    arrays: dict[str, Any] = {f"{split} images": each.images for split, each in kept.items()}
    arrays |= {f"{split} marks": each.marks for split, each in kept.items()}
    words = json.dumps({split: each.words for split, each in kept.items()})
    arrays |= {"key": np.array(key), "words": np.array(words)}
    temporary = root / f"{STEM}.{os.getpid()}.tmp"
    try:
        for left in root.glob(f"{STEM}.*.tmp"):
            if time.time() - left.stat().st_mtime > LEFT:
                left.unlink()
        try:
            with temporary.open("wb") as file:
                np.savez(file, **arrays)
            os.replace(temporary, root / NAME)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError:  # a folder may be read-only, or the disk full
        return
