"""Draw from a trained joint energy-based model: checkpoint in, PNG grid out.

    python sample.py --checkpoint results/digits/jem.pt --num 64

starts new chains in the restart distribution of the training and runs Langevin dynamics on E(x); --class-label runs it
on E(x, y); --source buffer shows the persistent chains of the training instead.
"""

from __future__ import annotations

import cli


def build_parser():
    """Return the parser of this script's command line."""
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("model")
    cli.add_checkpoint_flag(group)
    cli.add_precision_flag(group)
    group = parser.add_argument_group("SGLD")
    group.add_argument("--source", choices=("fresh", "buffer"), default="fresh", help="new chains, or the replay buffer's")
    group.add_argument("--num", type=cli.positive_int, default=64, help="images")
    group.add_argument(
        "--class-label",
        type=cli.count,
        nargs="+",
        metavar="Y",
        help="classes for chains on E(x, y), in equal shares; all of a class in one row",
    )
    group.add_argument(
        "--steps",
        type=cli.count,
        help="Langevin steps; without it 100 for fresh chains, 0 for the buffer's",
    )
    group.add_argument(
        "--step-size", type=cli.positive, help="multiplies the energy gradient, pixels on [-1, 1]; without it the training's"
    )
    group.add_argument(
        "--noise-std",
        type=cli.non_negative,
        help="standard deviation of the noise of a step, pixels on [-1, 1]; without it the training's",
    )
    cli.add_compile_flag(group)
    group.add_argument("--chunk-size", type=cli.positive_int, default=250, help="chains that run at once: it bounds the memory")
    group = cli.add_run_flags(parser)
    group.add_argument(
        "--save-array",
        metavar="FILE.npz",
        help="also write images (N, C, H, W) float32 in [0, 1], and labels where conditional",
    )
    return parser


def parse_args(argv=None):
    """Parse a command line; contradictory flags end the program with one sentence and exit code 2."""
    parser = build_parser()
    args = cli.parse(parser, argv)
    if args.class_label and len(set(args.class_label)) < len(args.class_label):
        parser.error("--class-label names a class twice")
    if args.class_label and args.num < len(args.class_label):
        parser.error(f"--num {args.num} is below the {len(args.class_label)} classes of --class-label")
    if args.save_array and not args.save_array.endswith(".npz"):
        parser.error(f"--save-array {args.save_array} must end in .npz")
    return args


if __name__ == "__main__":
    parse_args()  # --help and mistyped flags answer here, before torch is loaded

import math
import os
import zipfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import plots
import runs
from cli import UserError
from data import to_unit
from sgld import restart_from_state, run_chains

GRID_CHAINS = 400  # a picture holds no more, so that memory does not grow with --num
DRY_RUN = {"num": 4, "steps": 2}


def chain_blocks(checkpoint, args, device):
    """Yield (images, labels) in blocks of at most args.chunk_size chains until args.num are drawn.

    checkpoint: what train_jem.py wrote. images: (n, C, H, W) float, pixels in [-1, 1]; labels: (n,) int64, the asked
    classes, or None where --class-label is not given. Only one block is in memory at a time.
    """
    model = runs.load_model(checkpoint, device)
    energy_of = runs.chain_energy(model, device, runs.pick_precision(args.precision, device))
    if args.compile:
        energy_of = runs.Compiled(energy_of, device)
    settings = runs.chain_settings(checkpoint)
    settings.update({name: getattr(args, name) for name in ("step_size", "noise_std") if name in args.given})
    restart = restart_from_state(checkpoint["restart"], device)
    generator = torch.Generator(device).manual_seed(args.seed)
    classes = args.class_label and torch.tensor(args.class_label, device=device)
    stored = buffer_slots(checkpoint, args, generator).split(args.chunk_size) if args.source == "buffer" else None
    for block, first in enumerate(range(0, args.num, args.chunk_size)):
        count = min(args.chunk_size, args.num - first)
        labels = classes[torch.arange(first, first + count, device=device) % len(classes)] if args.class_label else None
        if stored:
            x = checkpoint["buffer"]["images"][stored[block]]
        elif labels is not None:
            x = restart.draw(labels, generator)
        else:
            x = restart.draw(torch.randint(restart.num_classes, (count,), device=device, generator=generator), generator)
        yield run_chains(energy_of, x, args.steps, **settings, labels=labels, module=model, generator=generator), labels


def buffer_slots(checkpoint, args, generator):
    """Choose args.num slots of the buffer, all different: of any class, or by turns of the asked ones."""
    labels = checkpoint["buffer"]["labels"]
    order = torch.randperm(len(labels), device=labels.device, generator=generator)
    if not args.class_label:
        slots = order[: args.num]
    else:
        each = -(-args.num // len(args.class_label))
        rows = [order[labels[order] == label][:each] for label in args.class_label]
        slots = torch.stack([row[: min(map(len, rows))] for row in rows], dim=1).flatten()[: args.num]
    if len(slots) < args.num:
        raise UserError(f"the replay buffer has {len(slots)} such chains, not {args.num}: lower --num, or use --source fresh")
    return slots


@contextmanager
def array_writer(path, shape):
    """Yield a function that appends images (n, C, H, W) to `images` of an .npz of N in all, block by block.

    path: the file, replaced once it is whole. shape: (N, C, H, W). The function's labels are gathered and written last.
    """
    temporary, labels = Path(f"{path}.tmp"), []
    try:
        with zipfile.ZipFile(temporary, "w") as archive:
            with archive.open("images.npy", "w", force_zip64=True) as file:
                header = {"descr": "<f4", "fortran_order": False, "shape": tuple(shape)}
                np.lib.format.write_array_header_1_0(file, header)

                def append(images, block_labels):
                    file.write(np.ascontiguousarray(to_unit(images).float().cpu().numpy()).astype("<f4").tobytes())
                    if block_labels is not None:
                        labels.append(block_labels.cpu().numpy())

                yield append
            if labels:
                with archive.open("labels.npy", "w") as file:
                    np.lib.format.write_array(file, np.concatenate(labels))
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r} ({error.strerror}): name another file with --save-array") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_against_checkpoint(args, checkpoint):
    """Complete the flags whose defaults are the training's. Raises UserError for what the model cannot do."""
    num_classes = checkpoint["model_config"]["num_classes"]
    if args.class_label and max(args.class_label) >= num_classes:
        raise UserError(f"--class-label {max(args.class_label)}: the model has the classes 0 to {num_classes - 1}")
    if args.class_label and args.source == "buffer" and not checkpoint["conditional"]:
        raise UserError(
            "the chains of this replay buffer have no class (it was trained without --p-xy-weight): use --source fresh"
        )
    if args.steps is None:
        args.steps = runs.FRESH_STEPS if args.source == "fresh" else 0
    if args.dry_run:
        args.num, args.steps = max(DRY_RUN["num"], len(args.class_label or ())), min(DRY_RUN["steps"], args.steps)


def grid_rows(images, labels, classes):
    """Return the images (n, C, H, W) in the order of the grid and its columns: a square, or one row for each class."""
    if labels is None:
        return images, math.ceil(math.sqrt(len(images)))
    rows = [images[labels == label] for label in classes]
    columns = min(map(len, rows))
    return torch.cat([row[:columns] for row in rows]), columns


@cli.exits_cleanly
def main(argv=None):
    """Run the script with a list of arguments, or with the command line's."""
    args = parse_args(argv)
    device = runs.pick_device(args.device)
    checkpoint = runs.load_checkpoint(args.checkpoint, "jem", device)
    check_against_checkpoint(args, checkpoint)
    _, channels, height, width = checkpoint["buffer"]["images"].shape
    with runs.run_folder(args) as folder, ExitStack() as stack:
        classes = f"-class-{'-'.join(map(str, args.class_label))}" if args.class_label else ""
        written = [folder / f"samples-{args.source}{classes}.png"]
        append = None
        if args.save_array:
            written.append(folder / "dry-run.npz" if args.dry_run else Path(args.save_array))
            append = stack.enter_context(array_writer(written[1], (args.num, channels, height, width)))
        shown, shown_labels = [], []
        for images, labels in tqdm(chain_blocks(checkpoint, args, device), total=-(-args.num // args.chunk_size), disable=None):
            if append:
                append(images, labels)
            free = GRID_CHAINS - sum(map(len, shown))
            shown.append(images[:free])
            shown_labels.append(labels[:free] if labels is not None else None)
        labels = torch.cat(shown_labels) if args.class_label else None
        images, columns = grid_rows(torch.cat(shown), labels, args.class_label)
        plots.save_grid(images, written[0], columns)
    if len(images) < args.num:
        print(f"the grid shows {len(images)} of the {args.num} images")
    runs.report_files(args, written)


if __name__ == "__main__":
    main()
