"""The scripts' command lines: their flags, what depends on what, what contradicts what."""

from __future__ import annotations

import math
import os
import shlex
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sgld_nrg.support import flags
from sgld_nrg.support.errors import UserError
from sgld_nrg.support.parser import HERE, Group, Parser
from sgld_nrg.support.presets import BASE, PRESETS, SHAPES

SHIPPED = str(HERE / "results" / "mnist.pt")
OWN = os.path.join("results", "digits", "jem.pt")
CONDITIONS = ("class_label", "mixture", "interpolate")  # flags that name classes, one at most


def _preset(values: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults of a training script: those of the preset that its flags imply."""
    preset = {**PRESETS[values["preset"] or values["dataset"]]}
    preset["out_dir"] = os.path.join("results", values["dataset"])
    if values["arch"] in SHAPES:
        preset |= SHAPES[values["arch"]]
    return preset


def _classifier_preset(values: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults of train_classifier.py: the learning rate is that of a pretraining."""
    preset = _preset(values)
    return preset | {"lr": preset["pretrain_lr"] or preset["lr"]}


def beside_checkpoint(values: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults of a script that reads a checkpoint: it writes beside it."""
    checkpoint = values["checkpoint"] or (OWN if os.path.exists(OWN) else SHIPPED)
    folder, name = os.path.split(checkpoint)
    if checkpoint == SHIPPED:  # the package's own folder is not the user's to fill
        folder = "results"
    beside = os.path.join(folder, os.path.splitext(name)[0])
    return {"checkpoint": checkpoint, "out_dir": (folder or ".") if name == "jem.pt" else beside}


def check_draws(args: Namespace, drawn: int, ranks: int = 1) -> None:
    """Raise UserError if a rank's share of the buffer has fewer chains than an iteration draws."""
    long_chains = args.long_chains // ranks
    ordinary = (args.buffer_size - args.long_chains) // ranks
    long = round(args.long_share * drawn)
    if long > long_chains or drawn - long > ordinary:
        raise UserError(
            f"each iteration draws {long} long chains and {drawn - long} others, of {long_chains} "
            f"and {ordinary}{' on each process' * (ranks > 1)}: "
            "change --chain-batch-size, --long-chains, --long-share or --buffer-size"
        )


def _check_reading(args: Namespace) -> None:
    low, high = args.pixel_range or (0, 1)
    if not (low < high and math.isfinite(high - low)):
        raise UserError(f"--pixel-range {low:g} {high:g}: LOW, black, must be below HIGH, white")


def _check_training(args: Namespace) -> None:
    """Complete the flags of either training script. Raises UserError if they contradict."""
    _check_reading(args)
    if args.image_size and args.dataset != "folder":
        raise UserError(
            f"--image-size has no effect with --dataset {args.dataset}, whose images have one size"
        )
    if args.dataset == "digits" and "data_dir" in args.given and not args.resume:
        raise UserError(
            "--data-dir has no effect with --dataset digits: name another --dataset, "
            "--dataset folder for images of your own"
        )
    if args.augment and args.shift:
        raise UserError("--augment shifts too: set one of --augment and --shift to 0")
    if args.dry_run and args.resume:
        raise UserError("--dry-run keeps no file, so there is nothing for --resume to continue")
    if args.max_minutes and "epochs" not in args.given:
        args.epochs = None


def _check_train_jem(args: Namespace) -> None:
    _check_training(args)
    if args.p_xy_weight and args.p_x_weight:
        if "p_x_weight" in args.given:
            raise UserError(
                "--p-x-weight and --p-xy-weight cannot both be above 0: "
                "log p(x, y) contains log p(x)"
            )
        args.p_x_weight = 0.0
    for name in ("pretrain_epochs", "pretrain_lr"):
        if name in args.given and (args.from_scratch or args.classifier):
            raise UserError(
                f"--{name.replace('_', '-')} has no effect with --classifier or --from-scratch, "
                "which train no classifier"
            )
    if "steps" in args.given and "first_steps" not in args.given:
        args.first_steps = 0
    if args.no_guard:
        args.max_rollbacks = 0
    check_draws(args, args.chain_batch_size)


def _check_sample(args: Namespace) -> None:
    _check_reading(args)
    for name in CONDITIONS:
        classes = getattr(args, name)
        if classes and len(set(classes)) < len(classes):
            raise UserError(f"--{name.replace('_', '-')} names a class twice")
    if args.class_label and args.num < len(args.class_label):
        raise UserError(
            f"--num {args.num} is below the {len(args.class_label)} classes of --class-label"
        )
    if args.save_array and not args.save_array.endswith(".npz"):
        raise UserError(f"--save-array {args.save_array} must end in .npz")
    other_start = args.from_images or args.source == "buffer"
    contradictions = (
        (
            args.save_array and args.interpolate,
            "--save-array takes the ends of chains, --interpolate shows their way: leave one out",
        ),
        (
            args.from_images and args.source == "buffer",
            "--from-images and --source buffer both say where chains start: leave one out",
        ),
        (
            args.inpaint and not args.from_images,
            "--inpaint needs pictures: name them with --from-images",
        ),
        (
            args.denoise and not args.from_images,
            "--denoise needs pictures: name them with --from-images",
        ),
        (
            args.inpaint and args.denoise,
            "--inpaint holds pixels that --denoise would change: leave one out",
        ),
        (
            args.interpolate and other_start,
            "--interpolate starts fresh chains: leave out --from-images and --source",
        ),
        (
            args.by_energy and (args.source != "buffer" or args.class_label),
            "--by-energy sorts all of the buffer: use it with --source buffer and without "
            "--class-label",
        ),
        (
            args.denoise and ("noise_std" in args.given or args.keep_noise),
            "--denoise descends without noise: leave out --noise-std and --keep-noise",
        ),
    )
    for wrong, sentence in contradictions:
        if wrong:
            raise UserError(sentence)


def _check_evaluate(args: Namespace) -> None:
    _check_reading(args)
    if "none" in args.attacks and len(args.attacks) > 1:
        raise UserError("--attacks none cannot stand beside a norm")


def _check_predict(args: Namespace) -> None:
    _check_reading(args)
    if not args.paths:
        raise UserError("name the pictures: image files, folders of them, .npz or .npy files")
    if args.save_csv and not args.save_csv.endswith(".csv"):
        raise UserError(f"--save-csv {args.save_csv} must end in .csv")


class Script(NamedTuple):
    """A script's flags, the defaults that depend on others, and its check of them all."""

    groups: tuple[Group, ...]
    defaults_of: Callable[[dict[str, Any]], dict[str, Any]]
    check: Callable[[Namespace], None]


SCRIPTS = {
    "train_classifier": Script(flags.TRAIN_CLASSIFIER, _classifier_preset, _check_training),
    "train_jem": Script(flags.TRAIN_JEM, _preset, _check_train_jem),
    "sample": Script(flags.SAMPLE, beside_checkpoint, _check_sample),
    "evaluate": Script(flags.EVALUATE, beside_checkpoint, _check_evaluate),
    "predict": Script(flags.PREDICT, beside_checkpoint, _check_predict),
}


def parse(script: str, argv: Sequence[str] | None = None, doc: str | None = None) -> Namespace:
    """Read a script's list of arguments, or the command line's; doc: shown by --help.

    Flags that are wrong or contradict each other end the program with one sentence and exit code 2.
    Returns what `Parser.parse` does.
    """
    groups, defaults_of, check = SCRIPTS[script]
    parser = Parser(doc, groups, defaults_of)
    args = parser.parse(argv)
    try:
        check(args)
    except UserError as error:
        parser.error(str(error))
    return args


def describe_settings(args: Namespace) -> str:
    """Return the line that a training script prints first: the preset, overridden flags marked."""
    words = [
        f"{name} {getattr(args, name)}" + "*" * (name in args.given)
        for name in BASE
        if name in args
    ]
    preset = args.preset or args.dataset
    return f"preset {preset} (* given on the command line): " + ", ".join(words)


def command_line(script: str, args: Namespace) -> str:
    """Return the command line that was given."""
    words = script.split()
    for name in sorted(args.given):
        value = getattr(args, name)
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += map(str, value) if isinstance(value, list) else [str(value)]
    return shlex.join(words)
