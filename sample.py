"""Draw from a trained joint energy-based model: checkpoint in, PNG grid out.

    python sample.py --checkpoint results/digits/jem.pt --num 64

starts new chains in the training's restart distribution and runs Langevin dynamics on E(x).
--source buffer shows the persistent chains of the training instead. --class-label and --mixture run
the chains on the energy of one class or of several, --interpolate leads each chain from one class
to another. --from-images starts at your own pictures, which --inpaint completes and --denoise
cleans. Chains end with a step without noise, unless --keep-noise is given. --animate adds a GIF of
how it came about.
"""

from __future__ import annotations

try:
    from sgld_nrg.support.commands import parse
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}; run: pip install -r requirements.txt") from None

if __name__ == "__main__":
    args = parse("sample", doc=__doc__)  # here, so that --help answers before torch loads

import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sgld_nrg.models import (
    energy_of,
    joint_energy,
    load_model,
    marginal_energy,
    mixture_energy,
    path_energy,
    predict,
)
from sgld_nrg.support import fast, plots
from sgld_nrg.support.augment import add_noise
from sgld_nrg.support.checkpoints import Checkpoint, langevin_from, load_checkpoint, output_folder
from sgld_nrg.support.commands import CONDITIONS
from sgld_nrg.support.devices import pick_device, pick_precision
from sgld_nrg.support.errors import UserError, exits_cleanly
from sgld_nrg.support.images import open_pictures, read_all, reading_from
from sgld_nrg.support.log import report_files
from sgld_nrg.support.origin import class_names, dataset_of, named
from sgld_nrg.support.parallel import Alone, nth_seed, processes
from sgld_nrg.support.pixels import array_writer
from sgld_nrg.support.presets import FRESH_STEPS
from sgld_nrg.support.reading import AS_FOUND, Reading
from sgld_nrg.support.report.words import counted
from sgld_nrg.support.restarts import restart_from_state

DENOISING_STEPS = 10
EDITING_STEPS = 100  # the way from one image to another is longer than that from a Gaussian
DRY_RUN = {"num": 4, "steps": 2}
PARTS = ("left", "right", "top", "bottom", "centre")
GRID_CHAINS = 400  # a picture holds no more, so that memory does not grow with --num
FRAMES = 50  # of an animation, at most
COLUMNS = 11  # of an interpolation: from all of one class to all of the other

Block = tuple[Tensor, Tensor, Tensor | None]


class Chains:
    """Chains of one checkpoint as the flags ask for them.

    checkpoint: what train_jem.py wrote. args: flags, completed by `check_against_checkpoint`.
    Raises UserError for pictures that cannot be read and for more of the buffer's chains than
    there are.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        args: Namespace,
        device: torch.device,
        ranks: Alone | None = None,
    ):
        self.checkpoint, self.args, self.device = checkpoint, args, device
        self.ranks = ranks or Alone()
        self.model = load_model(checkpoint, device)
        given_class: Callable[[Tensor, Tensor], Tensor] = joint_energy
        if args.mixture or args.interpolate:
            given_class = mixture_energy if args.mixture else path_energy
        self.energy = energy_of(self.model, pick_precision(args.precision, device), given_class)
        graphs = fast.graphs_from(args, device, self.ranks.count)
        self.run_chains = fast.in_graphs(graphs, fast.chains_from(args, self.model))
        asked = ("step_size", "noise_std")
        changes = {name: getattr(args, name) for name in asked if name in args.given}
        if args.denoise:
            changes["noise_std"] = 0.0
        self.langevin = langevin_from(checkpoint)._replace(**changes)
        self.restart = restart_from_state(checkpoint["restart"], device)
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.shape = checkpoint["buffer"]["images"].shape[1:]
        self.pictures = self._pictures().to(device) if args.from_images else None
        self.free = None
        if args.inpaint:
            self.free = part_to_sample(args.inpaint, self.shape, reading_from(args)).to(device)
        self.slots = self._slots() if args.source == "buffer" else None
        self.frames: list[Tensor] = []

    def blocks(self) -> Iterator[Block]:
        """Yield (starts, images, labels) in blocks of at most --chunk-size chains, --num in all.

        starts, images: (n, C, H, W) float, pixels in [-1, 1]; labels: (n,) int64, or None without
        --class-label. Only one block is in memory at a time, or one for each rank: the ranks draw
        the blocks by turns, the same whatever their number, and rank 0 yields them all.
        """
        count = -(-self.args.num // self.args.chunk_size)
        for turn in range(0, count, self.ranks.count):
            number = turn + self.ranks.rank
            block = self._block(number) if number < count else None
            yield from (each for each in self.ranks.gathered_at_first(block) if each)

    def _block(self, number: int) -> Block:
        """Draw the block of a number; each but the first has a seed of its own."""
        args, first = self.args, number * self.args.chunk_size
        if number:
            self.generator.manual_seed(nth_seed(args.seed, number))
        classes = args.class_label or args.mixture or (args.interpolate or [])[:1]
        last = min(first + args.chunk_size, args.num)
        numbers = torch.arange(first, last, device=self.device)
        labels = None
        if classes:
            labels = torch.tensor(classes, device=self.device)[numbers % len(classes)]
        starts = self._starts(numbers, labels)
        condition = labels
        if args.mixture or args.interpolate:
            shares = dict.fromkeys(args.mixture or classes, 1.0)
            condition = self._weights(shares, len(starts))
        watched = number == 0 and args.animate
        images = self._run(starts, args.steps, condition, watched)
        return starts, images, labels if args.class_label else None

    def interpolate(self, images: Tensor) -> Tensor:
        """Lead chains (N, C, H, W) of the first class to the second: (N, COLUMNS, C, H, W)."""
        source, target = self.args.interpolate
        columns = [images.to(self.device)]
        for column in range(1, COLUMNS):
            share = column / (COLUMNS - 1)
            weights = self._weights({source: 1 - share, target: share}, len(images))
            columns.append(self._run(columns[-1], self.args.steps, weights))
            if self.args.animate:
                self.frames.append(columns[-1][:GRID_CHAINS])
        return torch.stack(columns, dim=1)

    def _weights(self, shares: dict[int, float], count: int) -> Tensor:
        """Return weights (count, K) with the given shares of classes in each row."""
        row = torch.zeros(self.restart.num_classes, device=self.device)
        for label, share in shares.items():
            row[label] = share
        return row.expand(count, -1)

    def _starts(self, numbers: Tensor, labels: Tensor | None) -> Tensor:
        """Return where the chains of these numbers start, (n, C, H, W)."""
        if self.slots is not None:
            return self.checkpoint["buffer"]["images"][self.slots[numbers]]
        if self.pictures is not None:
            held = self.pictures[numbers % len(self.pictures)]  # by turns
            if self.free is None:
                return add_noise(held, self.args.denoise or 0, self.generator)
        labels = self.restart.labels(numbers) if labels is None else labels
        x = self.restart.draw(labels, self.generator)
        return x if self.free is None else torch.where(self.free, x, held)

    def _pictures(self) -> Tensor:
        """Return the pictures that --from-images names."""
        args = self.args
        if args.from_images != "test":
            found = open_pictures(Path(args.from_images), reading_from(args))
            count = min(args.num, len(found))
            shape = "x".join(map(str, self.shape))
            pictures = counted(len(found), "picture")
            print(f"read {count} of {pictures} ({found.words}) as {shape}")
            return read_all(found, range(count), self.shape)
        return dataset_of(self.checkpoint, args).test.images[: args.num]

    def _run(
        self, x: Tensor, steps: int, condition: Tensor | None, watched: bool = False
    ) -> Tensor:
        """Run chains; held pixels are put back after every step, frames are kept if watched."""
        held, between = x, max(steps // FRAMES, 1)
        piece = 1 if self.free is not None else between if watched else max(steps, 1)
        pieces = [(min(piece, steps - start), self.langevin) for start in range(0, steps, piece)]
        if steps and self.langevin.noise_std and not self.args.keep_noise:
            pieces.append((1, self.langevin.without_noise()))
        if watched:
            self.frames.append(x[:GRID_CHAINS])
        for number, (count, langevin) in enumerate(pieces, start=1):
            x = self.run_chains(
                self.energy,
                x,
                count,
                langevin,
                labels=condition,
                module=self.model,
                generator=self.generator,
            )
            if self.free is not None:
                x = torch.where(self.free, x, held)
            done = number * piece
            if watched and ((done < steps and done % between == 0) or number == len(pieces)):
                self.frames.append(x[:GRID_CHAINS])
        return x

    def _slots(self) -> Tensor:
        """Choose --num different slots of the buffer: any, by turns of classes, or by energy."""
        args, buffer = self.args, self.checkpoint["buffer"]
        labels = buffer["labels"]
        order = torch.randperm(len(labels), device=labels.device, generator=self.generator)
        if args.by_energy and args.num <= len(labels):
            order = marginal_energy(predict(self.model, buffer["images"])).argsort()
            lowest, highest = order[: (args.num + 1) // 2], order[len(order) - args.num // 2 :]
            slots = torch.cat([lowest, highest])
        elif not args.class_label:
            slots = order[: args.num]
        else:
            each = -(-args.num // len(args.class_label))
            rows = [order[labels[order] == label][:each] for label in args.class_label]
            fewest = min(map(len, rows))
            slots = torch.stack([row[:fewest] for row in rows], dim=1).flatten()[: args.num]
        if len(slots) < args.num:
            raise UserError(
                f"the replay buffer has {len(slots)} such chains, not {args.num}: "
                "lower --num, or use --source fresh"
            )
        return slots


def part_to_sample(part: str, shape: tuple[int, ...], reading: Reading = AS_FOUND) -> Tensor:
    """Return a mask (1, C, H, W), True for pixels to sample: of PARTS, or an image's white."""
    channels, height, width = shape
    everything = slice(None)
    inner_rows = slice(height // 4, height - height // 4)
    inner_columns = slice(width // 4, width - width // 4)
    windows = {
        "left": (everything, slice(width // 2)),
        "right": (everything, slice(width // 2, None)),
        "top": (slice(height // 2), everything),
        "bottom": (slice(height // 2, None), everything),
        "centre": (inner_rows, inner_columns),
    }
    free = torch.zeros(height, width, dtype=torch.bool)
    if part in PARTS:
        free[windows[part]] = True
    else:
        free = read_all(open_pictures(Path(part), reading), [0], (1, height, width))[0, 0] > 0
    if not free.any() or free.all():
        raise UserError(
            f"--inpaint {part!r} leaves nothing to sample or nothing to hold: part of it must be "
            f"white, part black (transparent parts are {reading.background}, by --background)"
        )
    return free.expand(1, channels, height, width)


def check_against_checkpoint(args: Namespace, checkpoint: Checkpoint) -> None:
    """Complete the flags whose defaults depend on the checkpoint; UserError for what it lacks."""
    args.class_names = class_names(checkpoint)
    for name in CONDITIONS:
        if classes := getattr(args, name):
            flag = "--" + name.replace("_", "-")
            labels = [_label_of(word, args.class_names, flag) for word in classes]
            if len(set(labels)) < len(labels):  # once by its name, once by its number
                raise UserError(f"{flag} names a class twice")
            setattr(args, name, labels)
    if args.class_label and args.source == "buffer" and not checkpoint["conditional"]:
        raise UserError(
            "the chains of this replay buffer have no class (it was trained without "
            "--p-xy-weight): use --source fresh"
        )
    if args.steps is None:
        args.steps = 0 if args.source == "buffer" else FRESH_STEPS
        if args.from_images or args.interpolate:
            args.steps = DENOISING_STEPS if args.denoise else EDITING_STEPS
    if args.dry_run:
        args.num = max(DRY_RUN["num"], len(args.class_label or ()))
        args.steps = min(DRY_RUN["steps"], args.steps)


def _label_of(word: str, names: list[str], flag: str) -> int:
    """Return the label of a class that is called by its name, or by its number if it has none."""
    if word in names:
        return names.index(word)
    if word.isdecimal() and int(word) < len(names) and not any(map(str.isdecimal, names)):
        return int(word)
    known = f"0 to {len(names) - 1}"
    if any(map(str.isdecimal, names)) and named(names):
        known = ", ".join(names)
    elif named(names):
        known = ", ".join(f"{label} {name}" for label, name in enumerate(names))
    raise UserError(f"{flag} {word}: the model has the classes {known}")


def grid_rows(
    images: Tensor, labels: Tensor | None, classes: list[int] | None
) -> tuple[Tensor, int]:
    """Return images (n, C, H, W) in the grid's order, and its columns: a row for each class."""
    if labels is None or classes is None:
        return images, math.ceil(math.sqrt(len(images)))
    rows = [images[labels == label] for label in classes]
    columns = min(map(len, rows))
    return torch.cat([row[:columns] for row in rows]), columns


def name_of(args: Namespace) -> str:
    """Return the stem of the files that a drawing goes to."""
    words = ["samples", "images" if args.from_images else args.source]
    for name in CONDITIONS:
        if classes := getattr(args, name):
            shown = [args.class_names[label] for label in classes]
            if not all(map(str.isdecimal, shown)):
                shown = list(map(str, classes))
            words += [name.removesuffix("_label"), *shown]
    if args.inpaint:
        words += ["inpaint", args.inpaint if args.inpaint in PARTS else Path(args.inpaint).stem]
    return "-".join(words + ["denoise"] * bool(args.denoise) + ["by-energy"] * args.by_energy)


def draw(chains: Chains, args: Namespace) -> None:
    """Draw the chains that the flags ask for and write them."""
    with output_folder(args) as folder, ExitStack() as stack:
        written = [folder / f"{name_of(args)}.png"]
        append = None
        if args.save_array:
            written.append(folder / "dry-run.npz" if args.dry_run else Path(args.save_array))
            writer = array_writer(written[1], (args.num, *chains.shape))
            append = stack.enter_context(writer)
        shown: list[tuple[Any, ...]] = []
        count, blocks = 0, -(-args.num // args.chunk_size)
        for starts, images, labels in tqdm(chains.blocks(), total=blocks, disable=None):
            if append:
                append(images, labels)
            if free := GRID_CHAINS - count:
                block = (starts, images, labels)  # copies: a view would keep its whole block
                few = (None if x is None else x[:free].clone() for x in block)
                shown.append(tuple(few))
                count += len(shown[-1][0])
        images = torch.cat([block[1] for block in shown])
        if args.interpolate:
            images, columns = chains.interpolate(images).flatten(0, 1), COLUMNS
        elif args.from_images:  # in pairs: where it started, where it ended
            starts = torch.cat([block[0] for block in shown])
            images, columns = torch.stack([starts, images], dim=1).flatten(0, 1), 8
        else:
            labels = torch.cat([block[2] for block in shown]) if args.class_label else None
            images, columns = grid_rows(images, labels, args.class_label)
        names = args.class_names
        rows = [names[label] for label in args.class_label or () if named(names)]
        plots.save_grid(images, written[0], columns, rows)
        if args.animate:
            written.append(folder / f"{name_of(args)}.gif")
            side = math.ceil(math.sqrt(len(chains.frames[0])))
            plots.save_animation(chains.frames, written[-1], side)
    if count < args.num:
        print(f"the grid shows {count} of the {args.num} images")
    report_files(args, written)


@exits_cleanly
def main(args: Namespace) -> None:
    """Run the script with what `parse` returned."""
    device = pick_device(args.device)
    with processes(device) as ranks:
        checkpoint = load_checkpoint(args.checkpoint, "jem", device)
        check_against_checkpoint(args, checkpoint)
        chains = Chains(checkpoint, args, device, ranks)
        if ranks.first:
            draw(chains, args)
        else:
            for _ in chains.blocks():
                pass  # rank 0 gets and writes them


if __name__ == "__main__":
    main(args)
