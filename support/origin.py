"""A checkpoint knows its data: the classes' names, where they lay, and what was in each split."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

from sgld_nrg.support.data import Dataset, load
from sgld_nrg.support.errors import UserError
from sgld_nrg.support.flags import DATA_DIR
from sgld_nrg.support.images import reading_from
from sgld_nrg.support.reading import Reading


def class_names(checkpoint: dict[str, Any]) -> list[str]:
    """Return the names of a checkpoint's classes, in the order of their labels."""
    count = checkpoint["model_config"]["num_classes"]
    return checkpoint.get("origin", {}).get("classes") or [str(label) for label in range(count)]


def named(names: list[str] | tuple[str, ...]) -> bool:
    """Tell whether classes have names that say more than their labels."""
    return list(names) != [str(label) for label in range(len(names))]


def data_dir_of(checkpoint: dict[str, Any], given: str | None) -> str:
    """Return where a checkpoint's data lie: as given, else where they lay, else the default.

    Raises UserError if the user's own data are no longer where they lay.
    """
    before = checkpoint.get("origin", {}).get("data_dir", "")
    if given or (before and os.path.exists(before)):
        return given or before
    if before and checkpoint["dataset"] == "folder":
        raise UserError(
            f"the data that the checkpoint was trained on lay in {before!r}, where nothing is now: "
            "say where they are with --data-dir"
        )
    return DATA_DIR.default


def dataset_of(checkpoint: dict[str, Any], args: Namespace) -> Dataset:
    """Load the data set that a checkpoint was trained on.

    Raises UserError if it cannot be had, or if it is another, unless with --other-data.
    """
    origin = checkpoint.get("origin")
    reading = Reading(**origin["reading"]) if origin else reading_from(args)
    data_dir = data_dir_of(checkpoint, args.data_dir)
    size = checkpoint["model_config"]["image_size"]
    dataset = load(checkpoint["dataset"], data_dir, size, reading)
    check_same_data(checkpoint, dataset, args, "the checkpoint")
    return dataset


def check_same_data(
    checkpoint: dict[str, Any], dataset: Dataset, args: Namespace, what: str
) -> None:
    """Compare a data set with the one that a checkpoint was trained on.

    what: words for the checkpoint. Raises UserError if they differ, unless with --other-data,
    which cannot change what the network takes and gives.
    """
    found, fits = differences(checkpoint, dataset)
    if not found:
        return
    where = dataset.origin["data_dir"]
    under = f" under {where!r}" if where else ""
    words = f"the data{under} are not those that {what} was trained on: {'; '.join(found)}"
    if args.other_data and fits:
        print(f"{words}; going on, as --other-data says", flush=True)
        return
    advice = "name the right ones with --data-dir"
    if fits:
        advice += ", or go on deliberately with --other-data (training images may be in the test)"
    raise UserError(f"{words}: {advice}")


def differences(checkpoint: dict[str, Any], dataset: Dataset) -> tuple[list[str], bool]:
    """Return in words how a data set differs from a checkpoint's, and whether the network fits."""
    config, (channels, side, _) = checkpoint["model_config"], dataset.shape
    before = "{channels}x{image_size}x{image_size} of {num_classes} classes".format(**config)
    now = f"{channels}x{side}x{side} of {dataset.num_classes} classes"
    found = [] if before == now else [f"the images were {before} and are {now}"]
    if origin := checkpoint.get("origin"):  # version 0.1.0 had none
        found += _differences(origin, dataset.origin)
    return found, before == now


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return in words what differs between the origins of two data sets."""
    found = []
    if before["classes"] != now["classes"]:
        names = (", ".join(each["classes"]) for each in (before, now))
        found.append("the classes were {} and are {}".format(*names))
    for split, trained in before["fingerprint"].items():
        if trained != now["fingerprint"][split]:
            found.append(f"{split} was {trained}, and is {now['fingerprint'][split]}")
    for name, trained in before["reading"].items():
        if trained != now["reading"][name]:
            flag = "--" + name.replace("_", "-")
            found.append(f"{flag} was {trained}, and is {now['reading'][name]}")
    return found
