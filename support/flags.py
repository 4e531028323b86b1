"""The table of flags: name, type, help with its unit, and the default if no preset sets it."""

from __future__ import annotations

import os
from argparse import BooleanOptionalAction

from sgld_nrg.support.parser import (
    Either,
    Group,
    count,
    decay,
    flag,
    fraction,
    level,
    non_negative,
    positive,
    positive_int,
    seed,
)
from sgld_nrg.support.presets import OF_DATASET, PRESETS

DATASETS = tuple(OF_DATASET)

DATASET = flag("--dataset", str, "data set", "digits", choices=DATASETS)
DATA_DIR = flag(
    "--data-dir",
    str,
    "folder that holds data sets or receives their download; with --dataset folder your folder of "
    "images for each class (a hidden file in it keeps them if they are many), or your .npz of "
    "images and labels; SGLD_NRG_DATA sets the default",
    os.environ.get("SGLD_NRG_DATA", "data"),
)
CHECKPOINT_DATA_DIR = flag(
    "--data-dir", str, "folder of data sets, or your own data; default: the checkpoint's own"
)
CHECKPOINT = flag(
    "--checkpoint", str, "checkpoint of a JEM; one of MNIST ships with the project", metavar="FILE"
)
CLASSIFIER = flag(
    "--classifier", str, "classifier checkpoint, instead of classifier.pt beside", metavar="FILE"
)
CONTROL = flag(
    "--control",
    str,
    "checkpoint of the same network with the same attacks and augmentation and no density "
    "(train_jem.py --p-x-weight 0), instead of control.pt beside",
    metavar="FILE",
)
JUDGES = flag(
    "--judges",
    str,
    "folder of the classifiers whose features judge samples; trained for a data set if missing",
    "results/judges",
    metavar="DIR",
)
DEVICE = flag("--device", str, "auto, cpu, cuda, cuda:N or mps", "auto")
SEED = flag("--seed", seed, "seed of every random draw", 0)
OUT_DIR = flag("--out-dir", str, "folder that receives everything the script writes")
PRECISION = flag(
    "--precision",
    str,
    "arithmetic of the network; auto: bf16 autocast on a GPU or a processor that multiplies "
    "matrices in bf16 (AMX)",
    "auto",
    choices=("auto", "float32", "bf16"),
)
SPEED = (
    flag(
        "--compile",
        bool,
        "compile the Langevin step, which takes up to a minute; falls back if it fails",
    ),
    flag(
        "--cuda-graph",
        BooleanOptionalAction,
        "replay the chains, in a training whole iterations, as CUDA graphs; falls back if that "
        "fails; the default on a single GPU",
    ),
)
OUTPUT = (
    OUT_DIR,
    SEED,
    DEVICE,
    flag("--dry-run", bool, "go through everything in a few iterations and keep no file"),
)

# How pictures are read when what they hold leaves it open; reading.Reading.
READING = (
    flag(
        "--pixel-range",
        float,
        "the numbers of black and white in an array or a floating-point picture, if unclear",
        nargs=2,
        metavar=("LOW", "HIGH"),
    ),
    flag(
        "--channel-axis",
        str,
        "where an array has its channels, if unclear",
        choices=("first", "last"),
    ),
    flag(
        "--background",
        str,
        "what transparent pixels are laid over",
        "white",
        choices=("white", "black"),
    ),
)
OTHER_DATA = flag("--other-data", bool, "go on with data that the checkpoint was not trained on")
DATA: Group = (
    "data",
    (
        DATASET,
        flag("--preset", str, "defaults of the other flags, not the data set's", choices=PRESETS),
        DATA_DIR,
        flag("--image-size", positive_int, "of --dataset folder: side that images are resized to"),
        *READING,
    ),
)
MODEL: Group = (
    "model",
    (
        flag("--arch", str, "network", choices=("small-cnn", "vgg", "wide-resnet")),
        flag(
            "--width",
            positive_int,
            "small-cnn: channels of the first layer; vgg: of the first stage; wide-resnet: factor",
        ),
        flag(
            "--depth",
            positive_int,
            "small-cnn: halving layers; vgg: halving stages; wide-resnet: 6n + 4 layers",
        ),
        flag(
            "--stem-stride",
            int,
            "small-cnn: stride of the first layer; 2 or 4 make a Langevin step cheaper",
            choices=(1, 2, 4),
        ),
    ),
)
OPTIMISATION = (
    flag("--epochs", positive_int, "passes over the training images"),
    flag(
        "--max-minutes",
        positive,
        "wall-clock budget in minutes, from the start of the script, within which the schedule "
        "completes; alone it decides the length, with --epochs whichever ends first",
    ),
    flag(
        "--batch-norm",
        BooleanOptionalAction,
        "train the classifier with batch normalisation, which is folded into its convolutions: "
        "the density never has it",
    ),
    flag("--batch-size", positive_int, "training images in an iteration"),
    flag("--optimizer", str, "optimiser; sgd has momentum 0.9", choices=("adam", "adamw", "sgd")),
    flag("--lr", positive, "learning rate of the optimiser at its highest"),
    flag("--lr-floor", fraction, "share of --lr at which its half cosine ends; 1: constant"),
    flag("--warmup-iterations", count, "iterations over which the learning rate rises from 0"),
    flag("--weight-decay", non_negative, "weight decay of the optimiser"),
    flag("--max-grad-norm", non_negative, "clip the weight gradient's norm to this; 0: off", 0.0),
    flag("--ema-decay", decay, "decay of the averaged weights, the ones kept; 0: no averaging"),
    flag("--input-noise", non_negative, "standard deviation of noise on data, pixels on [-1, 1]"),
    flag(
        "--augment",
        non_negative,
        "for the cross-entropy alone: strength of random rotation, zoom, shear and shift, 1 being "
        "11 degrees, 10 %%, 0.15 and a fourteenth of the side; 0: off",
    ),
    flag(
        "--shift",
        count,
        "for the cross-entropy alone: largest random shift in pixels, which unlike --augment "
        "interpolates nothing; 0: off",
    ),
    flag("--flip-prob", fraction, "for the cross-entropy alone: probability of mirroring an image"),
    PRECISION,
)
PRETRAINING = (
    Either(
        (CLASSIFIER, flag("--from-scratch", bool, "start from random weights, not a classifier"))
    ),
    flag("--pretrain-epochs", positive_int, "epochs of the classifier, if one is trained first"),
    flag("--pretrain-lr", non_negative, "its learning rate; 0: --lr"),
)
LOSS: Group = (
    "loss",
    (
        flag("--p-y-given-x-weight", non_negative, "weight of log p(y|x), the cross-entropy", 1.0),
        flag(
            "--p-x-weight",
            non_negative,
            "weight of log p(x), the marginal density; 0: none, the cross-entropy alone, for the "
            "control that shows what augmentation and attacks do by themselves",
        ),
        flag(
            "--p-xy-weight",
            non_negative,
            "weight of log p(x, y), with class-conditional chains, instead of --p-x-weight",
            0.0,
        ),
        flag("--energy-reg", non_negative, "weight of the regulariser: mean E^2, data and chains"),
        flag(
            "--outlier-weight",
            non_negative,
            "weight of the loss that keeps the energy of outliers, data of another contrast and "
            "brightness, above the data's; 0: off",
        ),
        flag("--outlier-share", fraction, "outliers in an iteration, as a share of --batch-size"),
        flag(
            "--outlier-margin", non_negative, "how far above the data's their energy is to be, nat"
        ),
        flag("--clean-share", fraction, "share of the cross-entropy on images as they are"),
        flag(
            "--adversarial-eps",
            fraction,
            "adversarial training: augmented images after one attack step inside this L-inf "
            "radius, pixels on [0, 1]; 0: off",
        ),
        flag("--attack-share", fraction, "share of the augmented images that are attacked"),
    ),
)
SGLD: Group = (
    "SGLD",
    (
        flag("--chain-batch-size", positive_int, "chains drawn and run in an iteration"),
        flag("--steps", positive_int, "Langevin steps of each chain in an iteration"),
        flag(
            "--first-steps",
            count,
            "Langevin steps in the first iteration, from which they grow evenly to --steps; 0, or "
            "--steps given alone: --steps throughout",
        ),
        flag("--step-size", positive, "multiplies the energy gradient, pixels on [-1, 1]"),
        flag("--noise-std", non_negative, "noise of a step, standard deviation on [-1, 1]"),
        flag("--noise-first", BooleanOptionalAction, "add a step's noise before its gradient"),
        flag("--pixel-grad-clip", non_negative, "clip each pixel's energy gradient; 0: off"),
        flag("--clamp", non_negative, "clamp chains and data to [-CLAMP, CLAMP]; 0: off"),
        *SPEED,
    ),
)
BUFFER: Group = (
    "replay buffer",
    (
        flag("--buffer-size", positive_int, "persistent chains"),
        flag("--reinit-prob", fraction, "probability that a drawn chain is restarted"),
        flag("--long-chains", count, "chains of the buffer that never restart and so grow old"),
        flag("--long-share", fraction, "share of each draw that comes from the long chains"),
        flag(
            "--restart",
            str,
            "where chains start: noise, or Gaussians fitted to each class's training images",
            "gaussian",
            choices=("uniform", "gaussian"),
        ),
        flag("--restart-parts", positive_int, "Gaussians of each class, fitted to its clusters"),
        flag("--restart-rank", positive_int, "principal directions of each Gaussian"),
    ),
)
RUN = (
    *OUTPUT,
    OTHER_DATA,
    flag("--save-minutes", positive, "minutes between checkpoints besides each epoch's", 1.0),
    flag("--save-iterations", positive_int, "iterations between checkpoints, besides minutes"),
    flag("--no-test", bool, "do not look at the test set at the end, for runs to choose among"),
    flag("--tensorboard", bool, "also write scalars, grids and histograms for TensorBoard"),
    Either(
        (
            flag("--resume", bool, "continue the run in --out-dir from its checkpoint"),
            flag("--overwrite", bool, "replace the run in --out-dir"),
        )
    ),
)
GUARD = (
    flag(
        "--max-rollbacks",
        count,
        "how often a training that diverges is taken back to a healthy state, with different "
        "noise, a lower lr, then more steps, then a stronger regulariser",
        4,
    ),
    flag("--no-guard", bool, "do not look for divergence: only non-finite values end a run"),
    flag("--log-every", positive_int, "iterations between two rows of metrics.csv", 50),
    flag("--grid-every", positive_int, "epochs between two sample grids after the first", 1),
)
STARTS: Group = (
    "where chains start",
    (
        flag(
            "--source",
            str,
            "new chains, or the replay buffer's",
            "fresh",
            choices=("fresh", "buffer"),
        ),
        flag("--by-energy", bool, "with --source buffer: the lowest energies, then the highest"),
        flag(
            "--from-images",
            str,
            "start at these instead: an image, a folder of them, an .npz or .npy file, or the word "
            "test for the test images",
            metavar="PATH",
        ),
        flag(
            "--inpaint",
            str,
            "with --from-images: hold the pictures but for a part, which is sampled: left, right, "
            "top, bottom, centre, or an image file that is white there",
            metavar="PART",
        ),
        flag(
            "--denoise",
            positive,
            "with --from-images: add noise of this standard deviation, pixels on [-1, 1], and "
            "descend the energy without any",
            metavar="STD",
        ),
    ),
)
CLASSES = {"nargs": "+", "metavar": "CLASS"}
ENERGY: Group = (
    "energy",
    (
        Either(
            (
                flag("--class-label", str, "chains on E(x, y), a row a class", **CLASSES),
                flag("--mixture", str, "chains on -log sum_y exp f(x)[y] over classes", **CLASSES),
                flag(
                    "--interpolate",
                    str,
                    "chains on the energy of one class that turns into another's, a row a chain",
                    nargs=2,
                    metavar=("CLASS", "CLASS"),
                ),
            )
        ),
    ),
)
CHAINS: Group = (
    "SGLD",
    (
        flag("--num", positive_int, "chains", 64),
        flag(
            "--steps",
            count,
            "Langevin steps; default 30, of the buffer's chains 0, with --denoise 10, from other "
            "images 100, and with --interpolate 100 a column",
        ),
        flag("--step-size", positive, "multiplies the energy gradient; default the training's"),
        flag("--noise-std", non_negative, "noise of a step, on [-1, 1]; default the training's"),
        flag("--keep-noise", bool, "do not end with a step without noise, which takes noise off"),
        *SPEED,
        flag("--chunk-size", positive_int, "chains that run at once: it bounds the memory", 250),
    ),
)
PICTURES = (
    *OUTPUT,
    flag("--animate", bool, "also write a GIF of the chains on their way"),
    flag(
        "--save-array",
        str,
        "also write images (N, C, H, W) float32 in [0, 1], and labels if conditional",
        metavar="FILE.npz",
    ),
)
PICTURE_PATHS = flag(
    "paths",
    str,
    "pictures: paths of image files, of folders of them, of .npz and .npy files",
    nargs="*",  # not "+": a mistyped flag is told before a missing path
    metavar="PATH",
)
VERDICTS = (
    flag(
        "--alpha",
        level,
        "pictures of a p-value below look unfamiliar, classes of one below are ruled out; of "
        "pictures like the training's, this happens at most to this share",
        0.05,
    ),
    flag(
        "--save-csv",
        str,
        "table of the verdicts; without it predictions.csv in --out-dir",
        metavar="FILE.csv",
    ),
    *OUTPUT,
)
OOD = (
    CHECKPOINT_DATA_DIR,
    OTHER_DATA,
    *READING,
    flag(
        "--ood",
        str,
        "out-of-distribution sets: names, .npz or .npy files of images, folders of image files; "
        "without it all that are made from the test images and all of torchvision's that lie under "
        "--data-dir",
        nargs="+",
        metavar="NAME_OR_PATH",
    ),
    flag("--download", bool, "download torchvision's out-of-distribution sets if missing"),
)
MEASUREMENT: Group = (
    "measurement",
    (
        flag(
            "--attacks",
            str,
            "norms of the attacks",
            ["linf", "l2"],
            nargs="+",
            choices=("linf", "l2", "none"),
        ),
        flag("--bins", positive_int, "equal-width bins of the calibration errors", 15),
        flag(
            "--longest-chain",
            positive_int,
            "Langevin steps after which the long chains end; without it 1000, with --quick 100",
            metavar="STEPS",
        ),
        flag(
            "--chains",
            positive_int,
            "chains that run long; without it 500 (on a GPU 10000), with --quick 150 (400)",
        ),
        flag(
            "--attacked",
            positive_int,
            "images attacked; without it 500 (on a GPU 1000), with --quick 60 (120)",
        ),
        JUDGES,
        flag(
            "--fid",
            bool,
            "also measure the FID, over the Inception features that torchmetrics has if "
            "torch-fidelity is installed and its weights can be downloaded",
        ),
        flag("--quick", bool, "smaller samples and fewer attacks: an answer within a minute"),
    ),
)

TRAIN_CLASSIFIER = (DATA, MODEL, ("optimisation", OPTIMISATION), ("output", RUN))
TRAIN_JEM = (
    DATA,
    MODEL,
    ("optimisation", (*OPTIMISATION, *PRETRAINING)),
    LOSS,
    SGLD,
    BUFFER,
    ("output", (*RUN, *GUARD)),
)
SAMPLE = (
    ("data", (CHECKPOINT_DATA_DIR, OTHER_DATA, *READING)),
    ("model", (CHECKPOINT, PRECISION)),
    STARTS,
    ENERGY,
    CHAINS,
    ("output", PICTURES),
)
PREDICT = (
    ("data", (PICTURE_PATHS, CHECKPOINT_DATA_DIR, OTHER_DATA, *READING)),
    ("model", (CHECKPOINT,)),
    ("output", VERDICTS),
)
EVALUATE = (
    ("data", OOD),
    ("model", (CHECKPOINT, CLASSIFIER, CONTROL)),
    MEASUREMENT,
    ("output", OUTPUT),
)
