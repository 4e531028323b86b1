"""Fixtures and helpers: the digits, one tiny trained run that many tests look at, larger data."""

import os
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image

from sgld_nrg.support import checkpoints, data, plots
from sgld_nrg.support.commands import parse
from sgld_nrg.support.parallel import Alone
from sgld_nrg.support.training import Setup, Training

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
if SHARED.is_dir():
    os.environ.setdefault("SGLD_NRG_DATA", str(SHARED))

os.environ["SGLD_NRG_LOOKS"] = os.devnull  # what tests look at is no one's choice

TINY = ["--dataset", "digits", "--width", "8", "--epochs", "4", "--buffer-size", "200"]
TINY += ["--warmup-iterations", "20", "--lr", "1e-3", "--chain-batch-size", "64", "--steps", "10"]


def run(script, *flags):
    """Run a script of the top floor in this process: run("train_jem", "--epochs", 1)."""
    import_module(f"sgld_nrg.{script}").main(parse(script, list(map(str, flags))))


def generator(seed=0):
    """Return a generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def training(dataset, folder, *flags, **rest):
    """Return a JEM's training on the CPU, in float32, that has not begun."""
    args = parse("train_jem", [*TINY, "--precision", "float32", *map(str, flags)])
    return Training(args, Setup(dataset, folder, torch.device("cpu"), Alone()), "jem", **rest)


def write_folder(root, sizes, mode="L", side=8):
    """Write sizes[name] pictures for each class, no two alike: class n has the grey n + 1."""
    for label, (name, count) in enumerate(sizes.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture = Image.new("L", (side, side), label + 1)
            picture.putpixel((side - 1, side - 1), number)
            picture.convert(mode).save(root / name / f"{number}.png")


class Bomb:
    """Unpickling one makes a file in the current folder."""

    def __reduce__(self):
        return open, ("exploded", "w")


@pytest.fixture(scope="session")
def digits():
    """The digits data set."""
    return data.load("digits", "unused")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The folder of a JEM that trained for some seconds on the digits. Not to be written to."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    run("train_jem", *TINY, "--pretrain-epochs", 20, "--out-dir", folder)
    return folder


@pytest.fixture
def checkpoint(tiny_run):
    """The checkpoint of the tiny run."""
    return checkpoints.load_checkpoint(tiny_run / "jem.pt", "jem")


@pytest.fixture
def no_curves(monkeypatch):
    """Let trainings draw no curves, which takes longer than the training in most tests."""
    monkeypatch.setattr(plots, "save_curves", lambda rows, path: None)
