"""A checkpoint knows its data: the classes' names, where they lay, and what was in each split."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from sgld_nrg.support.data import Dataset, load
from sgld_nrg.support.errors import UserError
from sgld_nrg.support.flags import DATA_DIR
from sgld_nrg.support.images import Reading


def class_names(checkpoint: dict[str, Any]) -> list[str]:
    """Return the names of a checkpoint's classes, in the order of their labels."""
    count = checkpoint["model_config"]["num_classes"]
    return checkpoint.get("origin", {}).get("classes") or [str(label) for label in range(count)]


def named(names: list[str] | tuple[str, ...]) -> bool:
    """Tell whether classes have names that say more than their labels."""
    return list(names) != [str(label) for label in range(len(names))]


def data_dir_of(checkpoint: dict[str, Any], given: str | None) -> str:
    """Return where a checkpoint's data lie: as given, else where they lay, else the default."""
    before = checkpoint.get("origin", {}).get("data_dir", "")
    return given or (before if before and os.path.exists(before) else DATA_DIR.default)


def dataset_of(checkpoint: dict[str, Any], args: Namespace) -> Dataset:
    """Load the data set that a checkpoint was trained on.

    Raises UserError if it cannot be had, or if it is another, unless with --other-data.
    """
    reading = Reading(**checkpoint.get("origin", {}).get("reading", {}))
    data_dir, size = (
        data_dir_of(checkpoint, args.data_dir),
        checkpoint["model_config"]["image_size"],
    )
    dataset = load(checkpoint["dataset"], data_dir, size, reading)
    check_same_data(checkpoint, dataset, args, "the checkpoint")
    return dataset


def check_same_data(
    checkpoint: dict[str, Any], dataset: Dataset, args: Namespace, what: str
) -> None:
    """Compare a data set with the one that a checkpoint was trained on.

    what: words for the checkpoint. Raises UserError if they differ, unless with --other-data,
    which cannot change the number of classes.
    """
    origin = checkpoint.get("origin")
    if origin is None:  # of version 0.1.0
        return
    differences = []
    before, now = origin["classes"], list(dataset.classes)
    if before != now:
        differences.append(f"the classes were {', '.join(before)} and are {', '.join(now)}")
    for split, found in dataset.origin["fingerprint"].items():
        trained = origin["fingerprint"][split]
        if trained != found:
            differences.append(f"{split} was {trained}, and is {found}")
    if not differences:
        return
    where = Path(dataset.origin["data_dir"])
    words = f"the data under {str(where)!r} are not those that {what} was trained on: "
    words += "; ".join(differences)
    if args.other_data and len(before) == len(now):
        print(f"{words}; going on, as --other-data says", flush=True)
        return
    advice = "name the right ones with --data-dir"
    if len(before) == len(now):
        advice += ", or go on deliberately with --other-data (training images may be in the test)"
    raise UserError(f"{words}: {advice}")
