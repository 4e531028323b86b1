"""What the scripts share around a run: device, precision, run folder, checkpoint, metrics log and its columns."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import math
import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import parallel
from cli import UserError, first_line
from models import build_model, energy, joint_energy

FORMAT = "sgld-nrg 1"
FRESH_STEPS = 30  # of a fresh chain unless told otherwise: on the validation splits chains are best near it
# What a checkpoint of each kind must hold to be of use.
NEEDED = {"classifier": ("model_config", "model", "dataset", "finished")}
NEEDED["jem"] = (*NEEDED["classifier"], "sgld", "restart", "buffer", "conditional")
PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn")

# Columns of metrics.csv. Each value but the first five is the mean over the iterations since the row before.
COLUMNS = {
    "phase": "classifier or jem: which script's training the row belongs to",
    "step": "iterations done in this phase",
    "epoch": "step divided by the iterations of an epoch",
    "minutes": "wall-clock minutes of the run, pretraining in it included",
    "lr": "learning rate of the last iteration",
    "cross_entropy": "-log p(y|x) on training batches, with input noise, augmented and attacked as the flags say, nat",
    "accuracy": "share of training batches classified right; classifier: of the augmented, jem: of the images as they are",
    "energy_positive": "mean E on training batches",
    "energy_negative": "mean E on the chains after their Langevin steps",
    "energy_gap": "energy_negative - energy_positive",
    "chain_displacement": "mean over chains of the L2 distance between a chain's start and end in an iteration",
    "chain_saturated": "share of the chains' pixels at or beyond -1 or 1",
    "chain_age": "mean over the replay buffer of Langevin steps since the chain's restart",
    "rollbacks": "how often the training was taken back to a healthy state so far, see guard.py",
    "iterations_per_second": "training iterations a second, validation and figures left out",
    "val_cross_entropy": "-log p(y|x) on the validation split, averaged weights, nat; on the row that ends an epoch",
    "val_accuracy": "share of the validation split classified right, averaged weights",
}


def pick_device(name):
    """Return the torch.device for a --device value; auto takes CUDA, else the CPU. Raises UserError if it is not there.

    Of several processes that torchrun started on a machine each gets a GPU of its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"device {name!r} cannot be used here ({first_line(error)}): use --device auto or --device cpu"
        ) from error
    torch.backends.cudnn.benchmark = True  # a run's shapes are few: the fastest of cuDNN's algorithms is found once for each
    return device


def pick_precision(name, device):
    """Resolve a --precision value to float32 or bf16."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "float32"
    if device.type == "cpu":
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()  # emulated bf16 is slower than float32
        return "bf16" if native else "float32"
    return "float32"


def autocast(device, precision):
    """Return the context in which a network is called: bf16 autocast or nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def chain_energy(model, device, precision, conditional=joint_energy):
    """Return a network's energy as sgld.run_chains wants it: E(x) of (x), (N,) float32.

    Called as (x, labels) it returns conditional(logits, labels) instead: E(x, y) or another energy of models.py.
    """

    def energy_of(x, labels=None):
        with autocast(device, precision):
            logits = model(x).float()
        return energy(logits) if labels is None else conditional(logits, labels)

    return energy_of


def chain_settings(checkpoint):
    """Return the keyword arguments of sgld.run_chains that a JEM was trained with, the number of steps apart."""
    return {name: value for name, value in checkpoint["sgld"].items() if name != "steps"}


@contextmanager
def replacing(path):
    """Yield a text file that takes the place of the one at path once it is whole."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "w", newline="") as file:
        yield file
    os.replace(temporary, path)


class MetricsLog:
    """metrics.csv of a run: values are added every iteration and written as means, a row at a time.

    path: the file; the rows of other phases in it are kept, and of this phase's rows those up to `resumed_at`
    (None: a new run, which keeps none). Values are summed where they lie, so logging waits for no GPU.
    """

    def __init__(self, path, phase, resumed_at=None):
        self.path, self.phase = Path(path), phase
        self.sums, self.count, self.seconds = {}, 0, 0.0
        if not parallel.first():
            return
        rows = read_metrics(self.path) if self.path.exists() else []
        if rows and list(rows[0]) != list(COLUMNS):
            raise UserError(f"{str(self.path)!r} is no metrics file of this project: name another folder with --out-dir")
        kept = [row for row in rows if row["phase"] != phase or (resumed_at is not None and int(row["step"]) <= resumed_at)]
        with replacing(self.path) as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(kept)

    def add(self, seconds, **values):
        """Add one iteration: how long it took, and scalar tensors on any device."""
        self.count, self.seconds = self.count + 1, self.seconds + seconds
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()

    def write(self, step, epoch, minutes, lr, **values):
        """Write a row of the means since the last one, with values of this moment beside them; returns it.

        Raises FloatingPointError naming the step, the term and the value where a mean is not finite.
        """
        means = {name: float(value) / self.count for name, value in parallel.mean(self.sums).items()}
        for name, value in means.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value} at step {step}")
        row = {"phase": self.phase, "step": step, "epoch": epoch, "minutes": minutes, "lr": lr, **means, **values}
        row["iterations_per_second"] = self.count / max(self.seconds, 1e-9)
        if parallel.first():
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, COLUMNS, restval="").writerow(
                    {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
                )
        self.sums, self.count, self.seconds = {}, 0, 0.0
        return row

    def state_dict(self):
        """Return the sums since the last row, so that a resumed run writes the row that an unbroken one would."""
        return {"sums": parallel.mean(self.sums), "count": self.count, "seconds": self.seconds}

    def load_state_dict(self, state):
        """Take up the sums of a stopped run."""
        self.sums, self.count, self.seconds = dict(state["sums"]), state["count"], state["seconds"]


def read_metrics(path):
    """Return the rows of a metrics.csv as dicts of strings, empty where a column has no value."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@contextmanager
def run_folder(args):
    """Yield the folder for a run's files: --out-dir, made if need be, or for --dry-run one that vanishes afterwards.

    A training has its folder to itself. Raises UserError where the folder cannot be made or written, and where another
    training is writing it.
    """
    if args.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    folder = Path(args.out_dir)
    if not parallel.first():
        yield folder  # rank 0 alone writes to it
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {str(folder)!r} ({error.strerror}): name another folder with --out-dir") from error
    if not hasattr(args, "resume") or fcntl is None:
        yield folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lifts it however the process ends
        except BlockingIOError:
            raise UserError(
                f"another training is writing to {str(folder)!r}: wait for it, or name another folder with --out-dir"
            ) from None
        yield folder
    finally:
        os.close(descriptor)


def open_checkpoint(path, args):
    """Return the checkpoint that --resume goes on from, or None for a new run.

    A resumed run keeps its settings: args takes them over, but for where and how long it runs. Raises UserError where
    a run would be replaced unasked, where there is nothing to resume, where the resumed run lacks a flag of this version, and
    where a flag contradicts it.
    """
    checkpoint = None if args.overwrite else load_for_all(path, path.stem, optional=True)
    if not args.resume:
        if checkpoint:
            state = "a finished run" if checkpoint["finished"] else "an unfinished run"
            raise UserError(
                f"{str(path)!r} holds {state}: continue it with --resume, replace it with --overwrite, "
                "or name another folder with --out-dir"
            )
        return None
    if not checkpoint:
        raise UserError(f"nothing to resume: {str(path)!r} does not exist; leave out --resume to start a run")
    if unknown := sorted(set(plain_arguments(args)) - set(checkpoint["args"])):
        raise UserError(
            f"the run in {str(path)!r} was begun by an older version, without --{unknown[0].replace('_', '-')}: "
            "finish it with that version, or start anew with --overwrite"
        )
    length = {"epochs", "max_minutes"}
    free = {"resume", "overwrite", "dry_run", "device", "data_dir", "out_dir", "tensorboard"} | (
        length if length & args.given else set()
    )
    for name, value in checkpoint["args"].items():
        if name in args.given - free and getattr(args, name) != value:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(args, name)} contradicts the run in {str(path)!r}, which has {value}: "
                "leave it out, or start anew with --overwrite"
            )
        if name not in free:
            setattr(args, name, value)
    return checkpoint


def save_checkpoint(path, kind, **state):
    """Write a checkpoint: to a temporary file first, flushed to the disk, then renamed, so that none is ever half there.

    The one that lay there and the one before it stay as `path`.1 and `path`.2, until `remove_older`.

    kind: "classifier" or "jem". state: plain types, tensors and state dicts only, so that torch.load accepts it with
    weights_only.
    """
    path, temporary = Path(path), Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, "kind": kind, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        _make_older(path)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {str(path)!r} ({error.strerror}); what stood there before is untouched") from error


def _older(path):
    """Return where older checkpoints are kept, the youngest first."""
    return [Path(f"{path}.{age}") for age in (1, 2)]


def _make_older(path):
    """Keep what lies at path under its older name too, and what lay there under the next: path is never missing."""
    first, second = _older(path)
    if not path.exists():
        return
    if first.exists():
        os.replace(first, second)
    try:
        os.link(path, first)
    except OSError:  # a file system without links
        shutil.copyfile(path, first)


def remove_older(path):
    """Remove the older checkpoints of a finished run."""
    for older in _older(path):
        older.unlink(missing_ok=True)


def load_checkpoint(path, kind, device="cpu"):
    """Read a checkpoint of one kind ("classifier" or "jem") without ever executing code from it.

    Raises UserError for a missing file, for one that is no checkpoint of this project, and for the other kind; where an
    older one is intact the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {str(path)!r}: make one with python train_{kind}.py, or name another")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises half a dozen types for the many ways a file can be no checkpoint
        intact = next((str(older) for older in _older(path) if _is_intact(older, kind)), None)
        advice = f"copy the older {intact!r} over it to go on from that" if intact else "name another file"
        raise UserError(f"{str(path)!r} is damaged or no checkpoint ({type(error).__name__}): {advice}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or state.get("kind") not in NEEDED:
        raise UserError(f"{str(path)!r} is no checkpoint of this project: name one that train_{kind}.py wrote")
    if state["kind"] != kind:
        raise UserError(
            f"{str(path)!r} holds a {state['kind']}, where a {kind} is needed: make one with python train_{kind}.py"
        )
    if missing := [name for name in NEEDED[kind] if name not in state]:
        raise UserError(f"{str(path)!r} lacks {', '.join(missing)}: it is no whole checkpoint, name another")
    return _in_float32(state)


def load_for_all(path, kind, optional=False):
    """Return what load_checkpoint does, read by the first rank alone; optional: None where there is no such file."""
    return parallel.from_first(lambda: None if optional and not path.exists() else load_checkpoint(path, kind))


def _in_float32(value):
    """Return a checkpoint, or a part of it, with the half-precision tensors that export.py makes as float32."""
    if isinstance(value, dict):
        return {name: _in_float32(part) for name, part in value.items()}
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.float16 else value


def _is_intact(path, kind):
    """Tell whether a checkpoint of a kind can be read."""
    try:
        load_checkpoint(path, kind)
    except UserError:
        return False
    return True


def load_model(state, device):
    """Rebuild the network of a checkpoint from its model_config, with the weights that were kept.

    Raises UserError where the weights are not those of that network.
    """
    try:
        model = build_model(**state["model_config"]).to(device)
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError("the checkpoint's weights do not fit its model_config: train it again, or name another") from error
    return model


def model_config_from(args, dataset):
    """Return the model_config for a data set. Raises UserError for a shape that no network has."""
    channels, size, _ = dataset.shape
    config = {
        "arch": args.arch, "num_classes": dataset.num_classes, "channels": channels, "image_size": size,
        "width": args.width, "depth": args.depth, "stem_stride": args.stem_stride,
    }  # fmt: skip
    try:
        with torch.device("meta"):
            build_model(**config)
    except ValueError as error:
        raise UserError(str(error)) from error
    return config


def open_board(args, folder):
    """Return the TensorBoard writer of a run's folder, or None without --tensorboard. Raises UserError without the package."""
    if not args.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs a package: pip install tensorboard, or leave the flag out") from error
    return SummaryWriter(folder / "tensorboard")


def report_files(args, paths):
    """Print which files a script wrote, or that a dry run kept none."""
    print("dry run: it went through and keeps no file" if args.dry_run else "wrote " + ", ".join(map(str, paths)))


def plain_arguments(args):
    """Return the arguments as a dict of plain types."""
    return {name: value for name, value in vars(args).items() if name != "given"}


def write_config(folder, phase, args, **resolved):
    """Record in config.json, under the phase's name, all that is needed to repeat a run; other phases' entries stay."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{str(path)!r} is not JSON: move it away, or name another folder with --out-dir") from error
    config[phase] = {
        "arguments": plain_arguments(args),
        "resolved": {"threads": torch.get_num_threads(), **resolved},
        "packages": package_versions(),
        "git_commit": git_commit(),
    }
    with replacing(path) as file:
        file.write(json.dumps(config, indent=2) + "\n")


def package_versions():
    """Return the versions of the packages that results depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def git_commit():
    """Return the commit this code is at, with a + where files differ from it, or None outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")
