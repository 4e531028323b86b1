"""Draw from a trained joint energy-based model: checkpoint in, PNG grid out.

    python sample.py --checkpoint results/digits/jem.pt --num 64

starts new chains in the restart distribution of the training and runs Langevin dynamics on E(x). --source buffer shows the
persistent chains of the training instead. --class-label and --mixture run the chains on the energy of one class or of
several, --interpolate leads each chain from one class to another. --from-images starts at your own pictures, which --inpaint
completes and --denoise cleans. --animate adds a GIF of how it came about.
"""

from __future__ import annotations

import cli

CONDITIONS = ("class_label", "mixture", "interpolate")  # flags that name classes, of which one may be given


def build_parser():
    """Return the parser of this script's command line."""
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("model")
    cli.add_checkpoint_flag(group)
    cli.add_precision_flag(group)
    group = parser.add_argument_group("where chains start")
    group.add_argument("--source", choices=("fresh", "buffer"), default="fresh", help="new chains, or the replay buffer's")
    group.add_argument(
        "--by-energy", action="store_true",
        help="with --source buffer: the chains of lowest energy, then those of highest, instead of any",
    )  # fmt: skip
    group.add_argument(
        "--from-images",
        metavar="PATH",
        help="start at these instead: an image, a folder of them, an .npz or .npy file, or the word test for the test images",
    )
    group.add_argument(
        "--inpaint", metavar="PART",
        help="with --from-images: hold the pictures but for a part, which is sampled: left, right, top, bottom, centre, or an "
        "image file that is white there",
    )  # fmt: skip
    group.add_argument(
        "--denoise", type=cli.positive, metavar="STD",
        help="with --from-images: add noise of this standard deviation, pixels on [-1, 1], and descend the energy without any",
    )  # fmt: skip
    cli.add_data_dir_flag(group)
    group = parser.add_argument_group("energy")
    energies = group.add_mutually_exclusive_group()
    energies.add_argument(
        "--class-label", type=cli.count, nargs="+", metavar="Y",
        help="classes for chains on E(x, y), in equal shares; all of a class in one row",
    )  # fmt: skip
    energies.add_argument(
        "--mixture",
        type=cli.count,
        nargs="+",
        metavar="Y",
        help="classes for chains on -log sum_y exp f(x)[y] over these alone",
    )
    energies.add_argument(
        "--interpolate", type=cli.count, nargs=2, metavar=("Y", "Z"),
        help="chains on E(x, Y) whose energy then turns into E(x, Z); one row for each chain",
    )  # fmt: skip
    group = parser.add_argument_group("SGLD")
    group.add_argument("--num", type=cli.positive_int, default=64, help="chains")
    group.add_argument(
        "--steps",
        type=cli.count,
        help="Langevin steps; default 30, of the buffer's chains 0, with --denoise 10, from other images 100, and with "
        "--interpolate 100 a column",
    )
    group.add_argument(
        "--step-size", type=cli.positive, help="multiplies the energy gradient, pixels on [-1, 1]; without it the training's"
    )
    group.add_argument(
        "--noise-std",
        type=cli.non_negative,
        help="standard deviation of the noise of a step, pixels on [-1, 1]; without it the training's",
    )
    cli.add_speed_flags(group)
    group.add_argument("--chunk-size", type=cli.positive_int, default=250, help="chains that run at once: it bounds the memory")
    group = cli.add_run_flags(parser)
    group.add_argument("--animate", action="store_true", help="also write a GIF of the chains on their way")
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
    for name in CONDITIONS:
        classes = getattr(args, name)
        if classes and len(set(classes)) < len(classes):
            parser.error(f"--{name.replace('_', '-')} names a class twice")
    if args.class_label and args.num < len(args.class_label):
        parser.error(f"--num {args.num} is below the {len(args.class_label)} classes of --class-label")
    if args.save_array and not args.save_array.endswith(".npz"):
        parser.error(f"--save-array {args.save_array} must end in .npz")
    if args.save_array and args.interpolate:
        parser.error("--save-array takes the ends of chains, and --interpolate shows their way: leave one out")
    if args.from_images and args.source == "buffer":
        parser.error("--from-images and --source buffer both say where chains start: leave one out")
    for name in ("inpaint", "denoise"):
        if getattr(args, name) and not args.from_images:
            parser.error(f"--{name} needs pictures: name them with --from-images")
    if args.inpaint and args.denoise:
        parser.error("--inpaint holds pixels that --denoise would change: leave one out")
    if args.interpolate and (args.from_images or args.source == "buffer"):
        parser.error("--interpolate starts fresh chains: leave out --from-images and --source")
    if args.by_energy and (args.source != "buffer" or args.class_label):
        parser.error("--by-energy sorts all of the buffer: use it with --source buffer and without --class-label")
    if args.denoise and "noise_std" in args.given:
        parser.error("--denoise descends without noise: leave out --noise-std")
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

import parallel
import plots
import runs
from chains import COLUMNS, GRID_CHAINS, PARTS, Chains
from cli import UserError
from data import to_unit

DRY_RUN = {"num": 4, "steps": 2}
DENOISING_STEPS = 10
EDITING_STEPS = 100  # the way from one image to another is longer than that from a Gaussian


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
    for name in CONDITIONS:
        if (classes := getattr(args, name)) and max(classes) >= num_classes:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {max(classes)}: the model has the classes 0 to {num_classes - 1}")
    if args.class_label and args.source == "buffer" and not checkpoint["conditional"]:
        raise UserError(
            "the chains of this replay buffer have no class (it was trained without --p-xy-weight): use --source fresh"
        )
    if args.steps is None:
        args.steps = 0 if args.source == "buffer" else runs.FRESH_STEPS
        if args.from_images or args.interpolate:
            args.steps = DENOISING_STEPS if args.denoise else EDITING_STEPS
    if args.dry_run:
        args.num, args.steps = max(DRY_RUN["num"], len(args.class_label or ())), min(DRY_RUN["steps"], args.steps)


def grid_rows(images, labels, classes):
    """Return the images (n, C, H, W) in the order of the grid and its columns: a square, or one row for each class."""
    if labels is None:
        return images, math.ceil(math.sqrt(len(images)))
    rows = [images[labels == label] for label in classes]
    columns = min(map(len, rows))
    return torch.cat([row[:columns] for row in rows]), columns


def pairs(starts, images, columns=4):
    """Return starts and images (n, C, H, W) in the order of a grid of so many pairs a row, and its columns."""
    return torch.stack([starts, images], dim=1).flatten(0, 1), 2 * columns


def name_of(args):
    """Return the stem of the files that a drawing goes to."""
    words = ["samples", "images" if args.from_images else args.source]
    for name in CONDITIONS:
        if classes := getattr(args, name):
            words += [name.removesuffix("_label"), *map(str, classes)]
    if args.inpaint:
        words += ["inpaint", args.inpaint if args.inpaint in PARTS else Path(args.inpaint).stem]
    return "-".join(words + ["denoise"] * bool(args.denoise) + ["by-energy"] * args.by_energy)


def draw(chains, args):
    """Draw the chains that the flags ask for and write them."""
    with runs.run_folder(args) as folder, ExitStack() as stack:
        written = [folder / f"{name_of(args)}.png"]
        append = None
        if args.save_array:
            written.append(folder / "dry-run.npz" if args.dry_run else Path(args.save_array))
            append = stack.enter_context(array_writer(written[1], (args.num, *chains.shape)))
        shown = {"starts": [], "images": [], "labels": []}
        for starts, images, labels in tqdm(chains.blocks(), total=-(-args.num // args.chunk_size), disable=None):
            if append:
                append(images, labels)
            free = GRID_CHAINS - sum(map(len, shown["images"]))
            for kind, values in (("starts", starts), ("images", images), ("labels", labels)) if free else ():
                shown[kind].append(values[:free].clone() if values is not None else None)  # a view would keep its whole block
        images = torch.cat(shown["images"])
        count = len(images)
        if args.interpolate:
            images, columns = chains.interpolate(images).flatten(0, 1), COLUMNS
        elif args.from_images:
            images, columns = pairs(torch.cat(shown["starts"]), images)
        else:
            images, columns = grid_rows(images, torch.cat(shown["labels"]) if args.class_label else None, args.class_label)
        plots.save_grid(images, written[0], columns)
        if args.animate:
            written.append(folder / f"{name_of(args)}.gif")
            plots.save_animation(chains.frames, written[-1], math.ceil(math.sqrt(len(chains.frames[0]))))
    if count < args.num:
        print(f"the grid shows {count} of the {args.num} images")
    runs.report_files(args, written)


@cli.exits_cleanly
def main(argv=None):
    """Run the script with a list of arguments, or with the command line's."""
    args = parse_args(argv)
    device = runs.pick_device(args.device)
    with parallel.group(device):
        checkpoint = runs.load_checkpoint(args.checkpoint, "jem", device)
        check_against_checkpoint(args, checkpoint)
        chains = Chains(checkpoint, args, device)
        if parallel.first():
            draw(chains, args)
        else:
            for _ in chains.blocks():
                pass  # rank 0 gets and writes them


if __name__ == "__main__":
    main()
