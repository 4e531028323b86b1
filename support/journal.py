"""The files of a training: config.json, metrics.csv, curves, grids, checkpoints, TensorBoard's."""

from __future__ import annotations

import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from sgld_nrg.support import checkpoints, plots
from sgld_nrg.support.log import MetricsLog, open_board, read_metrics, write_config
from sgld_nrg.support.parallel import Alone
from sgld_nrg.support.pixels import to_unit

GRID_CHAINS = 64
SECONDS_BETWEEN_CURVES = 20  # drawing takes half a second
SHOWN = {"epoch": 4, "energy_gap": 3, "accuracy": 4, "val_accuracy": 4}  # with so many digits


class Journal:
    """What a training tells and keeps. Rank 0 alone writes; nothing is written before `open`.

    log: the sums behind metrics.csv. saved: when the last checkpoint was, on time.perf_counter.
    """

    folder: Path
    go_on: str

    def __init__(self, phase: str, ranks: Alone):
        self.phase, self.ranks, self.log = phase, ranks, MetricsLog(phase, ranks)
        self.board: Any = None
        self.bar = tqdm(disable=True)
        self.drawn = self.saved = time.perf_counter()

    def open(
        self,
        folder: Path,
        args: Namespace,
        resumed_at: int | None,
        go_on: str | None,
        **resolved: Any,
    ) -> None:
        """Begin to write to a folder.

        resumed_at: iteration of the checkpoint that the run goes on from. go_on: the words that
        tell a user how to continue a stopped run; None: with --resume. resolved: for config.json.
        """
        self.folder = folder
        command = f"python train_{self.phase}.py --resume --out-dir {shlex.quote(str(folder))}"
        self.go_on = go_on or f"go on with: {command}"
        self.log.start(folder / "metrics.csv", resumed_at)
        if self.ranks.first:
            self.board = open_board(args, folder)
            write_config(folder, self.phase, args, **resolved)

    def open_bar(self, iterations: int | None, done: int) -> tqdm:
        """Return the progress bar, which hides if stderr is no terminal."""
        hidden = None if self.ranks.first else True
        self.bar = tqdm(total=iterations, initial=done, desc=self.phase, unit="it", disable=hidden)
        return self.bar

    def write_row(self, row: dict[str, Any], minutes_left: float | None) -> dict[str, Any]:
        """Write a row of metrics.csv, as `MetricsLog.write` takes it, and show what tells most."""
        row = self.log.write(**row)
        text = ", ".join(f"{name} {row[name]:.{n}g}" for name, n in SHOWN.items() if name in row)
        if minutes_left is not None:
            text += f", {minutes_left:.1f} min left"
        self.bar.set_postfix_str(text)
        for name, value in row.items() if self.board else ():
            if isinstance(value, int | float):
                self.board.add_scalar(f"{self.phase}/{name}", value, row["iteration"])
        if not sys.stderr.isatty() and "val_accuracy" in row:
            print(f"{self.phase}: minute {row['minutes']:.1f}, {text}", flush=True)
        return row

    def save(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Write the phase's checkpoint, and the curves: at the end, and now and then before it."""
        self.saved = time.perf_counter()
        if not self.ranks.first:
            return
        path = self.folder / f"{self.phase}.pt"
        checkpoints.save_checkpoint(path, self.phase, **checkpoint)
        if checkpoint["finished"]:
            checkpoints.remove_older(path)
        if checkpoint["finished"] or time.perf_counter() - self.drawn > SECONDS_BETWEEN_CURVES:
            plots.save_curves(read_metrics(self.log.path), self.folder / "curves.png")
            self.drawn = time.perf_counter()

    def save_grid(self, chains: Tensor) -> None:
        """Write the chains of the first slots as samples.png."""
        if self.ranks.first:
            plots.save_grid(chains[:GRID_CHAINS], self.folder / "samples.png")

    def save_grids(
        self,
        buffer: Any,
        iteration: int,
        epoch: float,
        data: Tensor,
        energies: Callable[[Tensor], Tensor],
    ) -> None:
        """Write samples.png and the numbered grid of now; for TensorBoard histograms as well.

        buffer: a ReplayBuffer. data: (N, C, H, W), to compare energies with. energies: of images.
        """
        if not self.ranks.first:
            return
        chains = buffer.images
        self.save_grid(chains)
        grids = self.folder / "grids"
        if iteration == 0:
            for old in grids.glob("epoch-*.png"):
                old.unlink()  # of a run that is being overwritten
        grids.mkdir(exist_ok=True)
        plots.save_grid(chains[:GRID_CHAINS], grids / f"epoch-{epoch:05.1f}.png")
        if self.board:
            self.board.add_images("buffer", to_unit(chains[:GRID_CHAINS]), iteration)
            self.board.add_histogram("chain age [steps]", buffer.ages, iteration)
            for name, images in {"validation images": data, "chains": chains}.items():
                values = energies(images[:1000])
                self.board.add_histogram(f"energy of {name}", values, iteration)
