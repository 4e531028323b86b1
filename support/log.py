"""What a run writes down: metrics.csv with its columns, config.json, TensorBoard."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import math
import os
import subprocess
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from sgld_nrg.support.errors import UserError, first_line
from sgld_nrg.support.parallel import Alone
from sgld_nrg.support.parser import HERE, plain

PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn")
# Each value but the first five is the mean over the iterations since the row before.
COLUMNS = {
    "phase": "classifier or jem: which script's training the row belongs to",
    "iteration": "iterations done in this phase",
    "epoch": "iteration divided by the iterations of an epoch",
    "minutes": "wall-clock minutes of the run, pretraining in it included",
    "lr": "learning rate of the last iteration",
    "cross_entropy": "-log p(y|x) on training batches, noisy, augmented and attacked as asked, nat",
    "accuracy": "share of training batches classified right; classifier: augmented, jem: as is",
    "energy_positive": "mean E on training batches",
    "energy_negative": "mean E on the chains after their Langevin steps",
    "energy_gap": "energy_negative - energy_positive",
    "energy_outliers": "mean E on the outliers, if there are any",
    "chain_displacement": "mean L2 distance between a chain's start and end in an iteration",
    "chain_saturated": "share of the chains' pixels at or beyond -1 or 1",
    "chain_age": "mean over the replay buffer of Langevin steps since the chain's restart",
    "rollbacks": "how often the training was taken back to a healthy state so far",
    "iterations_per_second": "training iterations a second, validation and figures left out",
    "val_cross_entropy": "-log p(y|x) on the validation split, averaged weights, nat; epoch's end",
    "val_accuracy": "share of the validation split classified right, averaged weights",
}
FORMER_COLUMNS = {"step": "iteration"}  # in the metrics.csv of earlier versions


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Yield a text file that takes the place of the one at path once it is whole."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "w", newline="") as file:
        yield file
    os.replace(temporary, path)


class MetricsLog:
    """metrics.csv of a run: values are added every iteration and written as means, a row at a time.

    Values are summed where they lie, so logging waits for no GPU. Rank 0 alone writes.
    """

    path: Path

    def __init__(self, phase: str, ranks: Alone | None = None):
        self.phase, self.ranks = phase, ranks or Alone()
        self.sums: dict[str, Any] = {}
        self.count, self.seconds = 0, 0.0

    def start(self, path: Path, resumed_at: int | None = None) -> None:
        """Begin the file; the rows of other phases stay, and this phase's up to an iteration.

        resumed_at: that iteration; None: a new run, which keeps none.
        """
        self.path = path
        if not self.ranks.first:
            return
        rows: list[dict[str, str]] = []
        if self.path.exists() and self.path.stat().st_size:
            try:
                columns, rows = _columns_and_rows(self.path)
            except UnicodeDecodeError:
                columns = []
            if "iteration" not in columns or not set(columns) <= set(COLUMNS):
                raise UserError(
                    f"{str(self.path)!r} is no metrics file of this project: "
                    "name another folder with --out-dir"
                )
        last = -1 if resumed_at is None else resumed_at
        with replacing(self.path) as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")  # an earlier version has fewer
            writer.writeheader()
            for row in rows:
                if row["phase"] != self.phase or int(row["iteration"]) <= last:
                    writer.writerow(row)

    def add(self, seconds: float, **values: Tensor) -> None:
        """Add one iteration: how long it took, and scalar tensors on any device."""
        self.count, self.seconds = self.count + 1, self.seconds + seconds
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()

    def write(
        self, iteration: int, epoch: float, minutes: float, lr: float, **values: Any
    ) -> dict[str, Any]:
        """Write a row of the means since the last one, and values of this moment; returns it.

        Raises FloatingPointError naming iteration, term and value if a mean is not finite.
        """
        means = {k: float(total) / self.count for k, total in self.ranks.mean(self.sums).items()}
        for name, value in means.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value} at iteration {iteration}")
        row = {"phase": self.phase, "iteration": iteration, "epoch": epoch, "minutes": minutes}
        row |= {"lr": lr, **means, **values}
        row["iterations_per_second"] = self.count / max(self.seconds, 1e-9)
        if self.ranks.first:
            with open(self.path, "a", newline="") as file:
                shown = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
                csv.DictWriter(file, COLUMNS, restval="").writerow(shown)
        self.sums, self.count, self.seconds = {}, 0, 0.0
        return row

    def state_dict(self) -> dict[str, Any]:
        """Return the sums since the last row: a resumed run then writes an unbroken one's row."""
        return {"sums": self.ranks.mean(self.sums), "count": self.count, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the sums of a stopped run."""
        self.sums, self.count = dict(state["sums"]), state["count"]
        self.seconds = state["seconds"]


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Return the rows of a metrics.csv as dicts of strings, empty if a column has no value."""
    return _columns_and_rows(path)[1]


def _columns_and_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the names of the columns, today's for former ones, and the rows that are whole."""
    lines = path.read_text().splitlines(keepends=True)
    names = next(csv.reader(lines[:1]), [])
    columns = [FORMER_COLUMNS.get(name, name) for name in names]
    whole = [line for line in lines[1:] if line.endswith("\n")]  # the last may be cut short
    return columns, list(csv.DictReader(whole, columns))


def write_config(folder: Path, phase: str, args: Namespace, **resolved: Any) -> None:
    """Record in config.json, under the phase's name, all that a repetition needs."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text()) if path.exists() else {}
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}")
    except ValueError as error:
        raise UserError(
            f"{str(path)!r} is no config.json of this project ({first_line(error)}): "
            "move it away, or name another folder with --out-dir"
        ) from error
    config[phase] = {
        "arguments": plain(args),
        "resolved": {"threads": torch.get_num_threads(), **resolved},
        "packages": package_versions(),
        "git_commit": git_commit(),
    }
    with replacing(path) as file:
        file.write(json.dumps(config, indent=2) + "\n")


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def git_commit() -> str | None:
    """Return the commit this code is at, with a + if files differ from it; None if not a clone."""
    if not (HERE / ".git").exists():
        return None
    found = []
    changed = ["status", "--porcelain", "-uno", ".", ":!results/looks.csv"]
    for command in (["rev-parse", "HEAD"], changed):
        try:
            done = subprocess.run(
                ["git", *command], cwd=HERE, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        found.append(done.stdout.strip())
    return found[0] + "+" * bool(found[1])


def open_board(args: Namespace, folder: Path) -> Any:
    """Return the TensorBoard writer of a run's folder, None without --tensorboard.

    Raises UserError if the package is missing.
    """
    if not args.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "--tensorboard needs a package: pip install tensorboard, or leave the flag out"
        ) from error
    return SummaryWriter(folder / "tensorboard")


def report_files(args: Namespace, paths: list[Path]) -> None:
    """Print which files a script wrote, or that a dry run kept none."""
    if args.dry_run:
        print("dry run: it went through and keeps no file")
    else:
        print("wrote " + ", ".join(map(str, paths)))
