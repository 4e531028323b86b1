"""What the scripts' command lines share: presets, shared flags, and how a user's mistake is answered.

No torch here: every script parses its command line before it loads torch, so --help and a mistyped flag answer at
once.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import math
import os
import re
import sys
import time

RANK = int(os.environ.get("RANK", 0))  # of this process among those that torchrun started
SECONDS_TO_SAY_WHY = 2
START = time.perf_counter()  # the scripts import this module first, so --max-minutes includes the loading of torch

# The defaults that depend on the data set. Any flag on the command line overrides its entry; a training script prints
# what it uses. The temperature that noise and step imply, T = noise_std^2 / (2 * step_size), is 0.032 for the digits and
# 0.05 for MNIST; the paper's (step 1, noise 0.01) is 5e-5. The chains sample exp(-E / T), the classifier softmax(f) at
# temperature 1: the lower T, the flatter the logits that the chains want, and the less confident the classifier.
PRESETS = {
    "digits": {
        "arch": "small-cnn", "width": 48, "depth": 2, "stem_stride": 1,
        "epochs": 60, "pretrain_epochs": 20, "batch_size": 64,
        "lr": 1e-3, "lr_floor": 0.0, "warmup_steps": 100, "ema_decay": 0.99,
        "input_noise": 0.05, "augment": 0.0, "flip_prob": 0.0, "clean_share": 1.0,
        "adversarial_eps": 0.0, "attack_share": 1.0, "p_x_weight": 0.3, "energy_reg": 0.001,
        "chain_batch_size": 64, "first_steps": 0, "steps": 10,
        "step_size": 0.1, "noise_std": 0.08, "noise_first": False, "pixel_grad_clip": 1.0, "clamp": 1.0,
        "buffer_size": 2000, "reinit_prob": 0.05, "restart_parts": 1, "restart_rank": 64, "long_chains": 0, "long_share": 0.0,
    },
    "mnist": {
        "arch": "small-cnn", "width": 96, "depth": 1, "stem_stride": 4,
        "epochs": 18, "pretrain_epochs": 1, "batch_size": 64,
        "lr": 2e-3, "lr_floor": 0.05, "warmup_steps": 200, "ema_decay": 0.9995,
        "input_noise": 0.04, "augment": 1.0, "flip_prob": 0.0, "clean_share": 0.5,
        "adversarial_eps": 0.08, "attack_share": 0.5, "p_x_weight": 0.14, "energy_reg": 1e-4,
        "chain_batch_size": 32, "first_steps": 3, "steps": 6,
        "step_size": 0.1, "noise_std": 0.1, "noise_first": True, "pixel_grad_clip": 5.0, "clamp": 1.0,
        "buffer_size": 10000, "reinit_prob": 0.05, "restart_parts": 50, "restart_rank": 20,
        "long_chains": 400, "long_share": 0.3,
    },
}  # fmt: skip
PRESETS |= dict.fromkeys(("fashion-mnist", "kmnist", "emnist-letters", "folder"), PRESETS["mnist"])  # tuned for none of them
# Colour: a wider and deeper network, mirrored images, no attacks, less noise, for no clamp hides it in mid-tones, and no
# cross-entropy on images as they are: with three quarters of it on those the network learns CIFAR-10's by heart in five
# epochs. Its chains and restarts are those of an earlier preset of MNIST, for what followed was tried on MNIST alone.
PRESETS["cifar10"] = PRESETS["cifar100"] = {
    "arch": "small-cnn", "width": 48, "depth": 3, "stem_stride": 2,
    "epochs": 10, "pretrain_epochs": 3, "batch_size": 64,
    "lr": 1e-3, "lr_floor": 0.0, "warmup_steps": 200, "ema_decay": 0.99,
    "input_noise": 0.03, "augment": 1.0, "flip_prob": 0.5, "clean_share": 0.0,
    "adversarial_eps": 0.0, "attack_share": 1.0, "p_x_weight": 0.1, "energy_reg": 1e-4,
    "chain_batch_size": 64, "first_steps": 0, "steps": 3,
    "step_size": 0.1, "noise_std": 0.02, "noise_first": True, "pixel_grad_clip": 1.0, "clamp": 1.0,
    "buffer_size": 10000, "reinit_prob": 0.02, "restart_parts": 10, "restart_rank": 64,
    "long_chains": 400, "long_share": 0.3,
}  # fmt: skip
PRESETS["svhn"] = {**PRESETS["cifar10"], "flip_prob": 0.0}  # numbers mirrored are no numbers
DATASETS = tuple(PRESETS)
# For runs of an hour: a first layer of stride 2, three and a half times the arithmetic; more and stronger attacks; and what
# robustness wants over so many epochs, a rate that ends high and a smaller weight of log p(x).
PRESETS["mnist-hour"] = {
    **PRESETS["mnist"], "width": 64, "depth": 2, "stem_stride": 2, "lr_floor": 0.5,
    "adversarial_eps": 0.1, "attack_share": 0.7, "p_x_weight": 0.04,
}  # fmt: skip
# The run of the paper (arXiv 1912.03263, appendix A) as far as flags can say it; nobody has run it here.
PRESETS["paper"] = {
    "arch": "wide-resnet", "width": 10, "depth": 28, "stem_stride": 1,
    "epochs": 150, "pretrain_epochs": 1, "batch_size": 64,
    "lr": 1e-4, "lr_floor": 1.0, "warmup_steps": 1000, "ema_decay": 0.0,
    "input_noise": 0.03, "augment": 1.0, "flip_prob": 0.5, "clean_share": 0.0, "adversarial_eps": 0.0, "attack_share": 1.0,
    "p_x_weight": 1.0, "energy_reg": 0.0,
    "chain_batch_size": 64, "first_steps": 0, "steps": 20,
    "step_size": 1.0, "noise_std": 0.01, "noise_first": False, "pixel_grad_clip": 0.0, "clamp": 0.0,
    "buffer_size": 10000, "reinit_prob": 0.05, "restart_parts": 1, "restart_rank": 64, "long_chains": 0, "long_share": 0.0,
}  # fmt: skip
SHIPPED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results", "mnist-ten-minutes.pt")
WIDE_RESNET_SHAPE = {"width": 2, "depth": 10, "stem_stride": 1}  # sized for a laptop; the paper's is --width 10 --depth 28


class UserError(Exception):
    """A mistake that the user can mend: one sentence that says what to do."""


class Stopped(Exception):
    """A training was stopped by a signal and saved its state; the message says how to go on."""

    def __init__(self, message, signal_number):
        super().__init__(message)
        self.exit_code = 128 + signal_number  # as shells report it


def first_line(error):
    """Return why an error was raised: the first line of its message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def wait_for_first():
    """Let rank 0 say first why all processes end: torchrun ends the others as soon as one has failed."""
    if RANK:
        time.sleep(SECONDS_TO_SAY_WHY)


def exits_cleanly(main):
    """Wrap a script's main: a mistake becomes one line on stderr and exit code 2, a signal exit code 128 + its number."""

    @functools.wraps(main)
    def wrapped(argv=None):
        global START
        if argv is not None:  # called from Python: the clock starts now
            START = time.perf_counter()
        try:
            return main(argv)
        except UserError as error:
            say, exit_code = f"error: {error}", 2
        except OSError as error:  # a disk that is full, a folder that vanished: the checkpoint that lies there is whole
            place = f"{str(error.filename)!r}: " if error.filename else ""
            say = f"error: {place}{error.strerror or error}; mend that and run it again; a training goes on with --resume"
            exit_code = 2
        except (MemoryError, RuntimeError) as error:
            reason = first_line(error)
            if RANK and re.search("peer|Gloo|NCCL", reason):
                say, exit_code = f"the other processes are gone ({reason})", 1
            elif isinstance(error, MemoryError) or re.search("allocate memory|out of memory|size calculation", reason):
                say = f"error: not enough memory ({reason}): lower --batch-size, --width, --buffer-size or --chunk-size"
                exit_code = 2
            else:
                raise
        except FloatingPointError as error:
            say, exit_code = f"error: {error}", 1
        except Stopped as stopped:
            say, exit_code = str(stopped), stopped.exit_code
        except KeyboardInterrupt:
            say, exit_code = "interrupted; a training run goes on from its last checkpoint with --resume", 130
        if exit_code in (1, 2):
            wait_for_first()
        print(f"process {RANK}: {say}" if RANK else say, file=sys.stderr)
        raise SystemExit(exit_code)

    return wrapped


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows every default, and the module's docstring as it is written."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """ArgumentParser with the project's conventions: no abbreviations, defaults in the help, errors in one line."""

    def __init__(self, description):
        super().__init__(
            usage="%(prog)s [flags]", description=description, allow_abbrev=False, formatter_class=_HelpFormatter
        )  # the flags stand below in their groups

    def error(self, message):
        """Print one sentence and exit with code 2; for a mistyped flag it names the nearest."""
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1) if unknown else None
        if near:
            message += f"; did you mean {near[0]}?"
        wait_for_first()
        self.exit(2, "" if RANK else f"error: {message} (see {self.prog} --help)\n")  # rank 0 says it for all


def _number(kind, low, high, low_open, words):
    """Make an argparse type: a finite number of a kind within bounds, described in words when it is not."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {words}") from None
        if not math.isfinite(value) or value < low or value > high or (low_open and value == low):
            raise argparse.ArgumentTypeError(f"{text} is not {words}")
        return value

    return convert


positive_int = _number(int, 1, math.inf, False, "a whole number from 1 up")
count = _number(int, 0, math.inf, False, "a whole number from 0 up")
seed = _number(int, 0, 2**32 - 1, False, "a whole number from 0 to 4294967295")
positive = _number(float, 0, math.inf, True, "a number above 0")
non_negative = _number(float, 0, math.inf, False, "a number from 0 up")
fraction = _number(float, 0, 1, False, "a number from 0 to 1")
decay = _number(float, 0, 0.999999, False, "a number from 0 to 0.999999")


def add_data_flags(parser):
    """Add the flags that choose the data."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=DATASETS, default="digits", help="data set")
    group.add_argument("--preset", choices=tuple(PRESETS), help="defaults of the other flags; without it the data set's own")
    add_data_dir_flag(group)
    group.add_argument("--image-size", type=positive_int, help="of --dataset folder: side in pixels that images are resized to")


def add_data_dir_flag(group):
    """Add --data-dir to a group."""
    group.add_argument(
        "--data-dir", default=os.environ.get("SGLD_NRG_DATA", "data"),
        help="folder that holds data sets or receives their download, with --dataset folder your folder of images for each "
        "class, or your .npz of images and labels; SGLD_NRG_DATA sets the default",
    )  # fmt: skip


def add_model_flags(parser):
    """Add the flags that shape the network."""
    group = parser.add_argument_group("model")
    group.add_argument("--arch", choices=("small-cnn", "wide-resnet"), help="network")
    group.add_argument(
        "--width", type=positive_int, help="small-cnn: channels of the first layer; wide-resnet: widening factor"
    )
    group.add_argument(
        "--depth", type=positive_int, help="small-cnn: halving layers after the first; wide-resnet: 6n + 4 layers"
    )
    group.add_argument(
        "--stem-stride", type=int, choices=(1, 2, 4),
        help="small-cnn: stride of the first layer; with 2 or 4 it shrinks the image too, and a Langevin step costs less",
    )  # fmt: skip


def add_optimisation_flags(parser):
    """Add the flags of the optimiser and of the length of a run; returns the group, for a script's own."""
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=positive_int, help="passes over the training images")
    group.add_argument(
        "--max-minutes", type=positive,
        help="wall-clock budget in minutes, from the start of the script, within which the learning-rate schedule "
        "completes; without --epochs it alone decides the length, with it whichever ends first",
    )  # fmt: skip
    group.add_argument("--batch-size", type=positive_int, help="training images in an iteration")
    group.add_argument("--optimizer", choices=("adam", "adamw", "sgd"), default="adam", help="optimiser; sgd has momentum 0.9")
    group.add_argument("--lr", type=positive, help="learning rate of the optimiser at its highest")
    group.add_argument(
        "--lr-floor", type=fraction,
        help="share of --lr at which its half cosine ends; 0: it falls to nothing, 1: it stays where the warm-up brings it",
    )  # fmt: skip
    group.add_argument("--warmup-steps", type=count, help="iterations over which the learning rate rises from 0")
    group.add_argument("--weight-decay", type=non_negative, default=0.0, help="weight decay of the optimiser")
    group.add_argument(
        "--max-grad-norm", type=non_negative, default=0.0, help="clip the norm of the weight gradient to this; 0: not"
    )
    group.add_argument(
        "--ema-decay", type=decay,
        help="decay of the averaged weights, which are the ones kept, after a start with shorter averages; 0: no averaging",
    )  # fmt: skip
    group.add_argument(
        "--input-noise", type=non_negative, help="standard deviation of the noise on training images, pixels on [-1, 1]"
    )
    group.add_argument(
        "--augment", type=non_negative,
        help="for the cross-entropy alone: strength of random rotation, zoom, shear and shift, 1 being 11 degrees, 10 %%, "
        "0.15 and a fourteenth of the side; 0: not",
    )  # fmt: skip
    group.add_argument(
        "--flip-prob", type=fraction, help="for the cross-entropy alone: probability that an image is mirrored left to right"
    )
    group.add_argument(
        "--sam-rho", type=non_negative, default=0.0,
        help="sharpness-aware minimisation: descend the gradient found this far up the loss, L2 norm of all weights; costs a "
        "second forward and backward pass; 0: not",
    )  # fmt: skip
    add_precision_flag(group)
    return group


def add_checkpoint_flag(group):
    """Add --checkpoint to a group."""
    own = os.path.join("results", "digits", "jem.pt")
    group.add_argument(
        "--checkpoint", metavar="FILE", default=own if os.path.exists(own) else SHIPPED,
        help="checkpoint that train_jem.py wrote; without one of your own the small one of MNIST that comes with the project",
    )  # fmt: skip


def add_classifier_flag(group):
    """Add --classifier to a group."""
    group.add_argument(
        "--classifier", metavar="FILE", help="classifier checkpoint; without it classifier.pt in the run's folder"
    )


def add_precision_flag(group):
    """Add --precision to a group."""
    group.add_argument(
        "--precision", choices=("auto", "float32", "bf16"), default="auto",
        help="arithmetic of the network; auto: bf16 autocast where the processor has bf16 instructions",
    )  # fmt: skip


def add_speed_flags(group):
    """Add --compile and --cuda-graph, of fast.py, to a group."""
    group.add_argument(
        "--compile", action="store_true",
        help="compile the chains' Langevin step; takes up to a minute, and goes on without where it fails",
    )  # fmt: skip
    group.add_argument(
        "--cuda-graph", action=argparse.BooleanOptionalAction, default=None,
        help="capture the chains, in a training whole iterations, as CUDA graphs and replay them; goes on without where that "
        "fails; the default on a GPU, but for several processes",
    )  # fmt: skip


def add_run_flags(parser):
    """Add the flags of a run and of its output; returns the group, for a script's own."""
    group = parser.add_argument_group("output")
    group.add_argument("--out-dir", help="folder that receives everything the script writes")
    group.add_argument("--seed", type=seed, default=0, help="seed of every random draw")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    group.add_argument("--dry-run", action="store_true", help="go through everything in a few steps and keep no file")
    return group


def add_rerun_flags(group):
    """Add when a training script writes checkpoints, and what it does when its folder already holds a run."""
    group.add_argument(
        "--save-minutes", type=positive, default=1.0, help="minutes between two checkpoints besides those that end an epoch"
    )
    group.add_argument(
        "--save-steps", type=positive_int, help="iterations between two checkpoints; without it time alone decides"
    )
    group.add_argument(
        "--tensorboard", action="store_true", help="also write scalars, grids and histograms for the package tensorboard"
    )
    existing = group.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue the run in --out-dir from its checkpoint")
    existing.add_argument("--overwrite", action="store_true", help="replace the run in --out-dir")


def parse(parser, argv=None):
    """Parse a command line, for a script with --dataset with that data set's preset as defaults.

    The result also has `given`, the names of the flags that stand on the command line.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    names = vars(parser.parse_args([]))
    if "dataset" in names:
        peek = Parser(None)
        for action in ("--dataset", "--preset", "--arch"):
            peek.add_argument(action)
        wanted = peek.parse_known_args([word for word in argv if word not in ("-h", "--help")])[0]
        dataset = wanted.dataset if wanted.dataset in DATASETS else "digits"
        preset = PRESETS[wanted.preset if wanted.preset in PRESETS else dataset]
        preset = {**preset, "out_dir": os.path.join("results", dataset)}
        if wanted.arch == "wide-resnet":
            preset.update(WIDE_RESNET_SHAPE)
        parser.set_defaults(**{name: value for name, value in preset.items() if name in names})
    args = parser.parse_args(argv)
    absent = object()
    marked = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, absent)))
    args.given = frozenset(name for name in names if getattr(marked, name) is not absent)
    if getattr(args, "image_size", None) and args.dataset != "folder":
        parser.error(f"--image-size has no use with --dataset {args.dataset}, whose images have one size")
    if args.dry_run and getattr(args, "resume", False):
        parser.error("--dry-run keeps no file, so there is nothing for --resume to continue")
    if args.out_dir is None:  # a script that reads a checkpoint writes beside it
        folder, name = os.path.split(args.checkpoint)
        args.out_dir = (folder or ".") if name == "jem.pt" else os.path.splitext(args.checkpoint)[0]
    if getattr(args, "max_minutes", None) and "epochs" not in args.given:
        args.epochs = None
    return args


def describe_settings(args):
    """Return the lines that a training script prints first: the preset's settings, with what was overridden marked."""
    words, preset = [], args.preset or args.dataset
    for name, default in PRESETS[preset].items():
        value = getattr(args, name, default)
        if hasattr(args, name):
            words.append(f"{name} {value}" + ("*" if name in args.given else ""))
    return f"preset {preset} (* given on the command line): " + ", ".join(words)
