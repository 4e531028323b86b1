"""The folder of a run and its checkpoints: written whole or not at all, read without executing."""

from __future__ import annotations

import os
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from sgld_nrg.sgld import Langevin
from sgld_nrg.support.errors import UserError, first_line
from sgld_nrg.support.parallel import Alone
from sgld_nrg.support.parser import plain

FORMATS = ("sgld-nrg 1", "sgld-nrg 2")  # those that are read; the last one is written
# What a checkpoint of each kind must hold to be of use.
NEEDED: dict[str, tuple[str, ...]] = {
    "classifier": ("model_config", "model", "dataset", "finished")
}
NEEDED["jem"] = (*NEEDED["classifier"], "sgld", "restart", "buffer", "conditional")
# Names of format 1 that changed, and a flag of it that is gone.
FORMER_FLAGS = {"warmup_steps": "warmup_iterations", "save_steps": "save_iterations"}
GONE_FLAGS = ("sam_rho",)
# Flags that runs of earlier versions lack, with what those did.
NEW_FLAGS: dict[str, Any] = {
    "pixel_range": None,
    "channel_axis": None,
    "background": "white",
    "other_data": False,
    "no_test": False,
    "shift": 0,
    "batch_norm": False,
    "pretrain_lr": 0.0,
    "outlier_weight": 0.0,
    "outlier_share": 0.125,
    "outlier_margin": 20.0,
}

Checkpoint = dict[str, Any]


def has_density(settings: Mapping[str, Any]) -> bool:
    """Return whether a training with these settings, {flag: value}, models p(x) or p(x, y)."""
    return settings["p_x_weight"] > 0 or settings["p_xy_weight"] > 0


def langevin_from(checkpoint: Checkpoint) -> Langevin:
    """Return the settings of the Langevin step that a JEM was trained with."""
    return Langevin(**{k: v for k, v in checkpoint["sgld"].items() if k in Langevin._fields})


@contextmanager
def output_folder(args: Namespace, ranks: Alone | None = None) -> Iterator[Path]:
    """Yield --out-dir, made if need be, for a script's files; for --dry-run a temporary folder.

    Raises UserError if the folder cannot be made or written to.
    """
    if args.dry_run:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    folder = Path(args.out_dir)
    if ranks is None or ranks.first:  # rank 0 alone writes to it
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(
                f"cannot write to {str(folder)!r} ({error.strerror}): "
                "name another folder with --out-dir"
            ) from error
    yield folder


@contextmanager
def training_folder(args: Namespace, ranks: Alone) -> Iterator[Path]:
    """Yield the output folder to one training at a time. Raises UserError if another one has it."""
    with output_folder(args, ranks) as folder:
        if args.dry_run or not ranks.first or fcntl is None:
            yield folder
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            try:  # the system lifts the lock however the process ends
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another training is writing to {str(folder)!r}: "
                    "wait for it, or name another folder with --out-dir"
                ) from None
            yield folder
        finally:
            os.close(descriptor)


def open_checkpoint(path: Path, args: Namespace, ranks: Alone) -> Checkpoint | None:
    """Return the checkpoint that --resume goes on from, or None for a new run.

    A resumed run keeps its settings: args takes them over, but for where and how long it runs.
    Raises UserError if a run would be replaced unasked, if there is nothing to resume, if the run
    lacks a flag of this version or has one that is gone, and if a flag contradicts it.
    """
    checkpoint = None if args.overwrite else load_for_all(path, path.stem, ranks, optional=True)
    if not args.resume:
        if checkpoint:
            state = "a finished run" if checkpoint["finished"] else "an unfinished run"
            raise UserError(
                f"{str(path)!r} holds {state}: continue it with --resume, replace it with "
                "--overwrite, or name another folder with --out-dir"
            )
        return None
    if not checkpoint:
        raise UserError(
            f"nothing to resume: {str(path)!r} does not exist; leave out --resume to start a run"
        )
    saved = dict(checkpoint["args"])
    for name in GONE_FLAGS:
        if saved.pop(name, None):
            raise _other_version(path, name, "with")
    for name in sorted(plain(args)):
        if name not in saved:
            raise _other_version(path, name, "without")
    free = {"resume", "overwrite", "dry_run", "device", "data_dir", "out_dir", "tensorboard"}
    free |= {"other_data", "no_test"}
    length = {"epochs", "max_minutes"}
    free |= length if length & args.given else set()
    for name, value in saved.items():
        if name in args.given - free and getattr(args, name) != value:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(args, name)} contradicts the run in "
                f"{str(path)!r}, which has {value}: leave it out, or start anew with --overwrite"
            )
        if name not in free:
            setattr(args, name, value)
    return checkpoint


def _other_version(path: Path, name: str, how: str) -> UserError:
    return UserError(
        f"the run in {str(path)!r} was begun by another version, {how} "
        f"--{name.replace('_', '-')}: finish it with that version, or start anew with --overwrite"
    )


def save_checkpoint(path: Path | str, kind: str, **state: Any) -> None:
    """Write a checkpoint: to a temporary file, flushed to the disk, then renamed: never half a one.

    The one that lay there and the one before it stay as `path`.1 and `path`.2, until
    `remove_older`. kind: "classifier" or "jem". state: plain types, tensors and state dicts only,
    which torch.load accepts with weights_only. Raises UserError if it cannot be written.
    """
    write_whole(Path(path), {"format": FORMATS[-1], "kind": kind, **state}, keep_older=True)


def write_whole(path: Path, state: dict[str, Any], keep_older: bool = False) -> None:
    """Write plain types and tensors to a temporary file, flush it, and rename it.

    keep_older: what lay at path stays as `path`.1. Raises UserError if it cannot be written.
    """
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if keep_older:
            _make_older(path)
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's writer has its own word for a full disk
        temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"cannot write {str(path)!r} ({reason}): is the disk full? "
            "What stood there before is untouched"
        ) from error


def read_state(path: Path) -> dict[str, Any] | None:
    """Return what `write_whole` wrote, or None if it is not there or damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # half a dozen types, for the many ways to be damaged
        return None


def _flush_folder(folder: Path) -> None:
    """Flush a folder to the disk, so that a renamed file outlives a power cut."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    with suppress(OSError):  # some file systems flush no folders
        os.fsync(descriptor)
    os.close(descriptor)


def _older(path: Path) -> list[Path]:
    """Return where older checkpoints are kept, the youngest first."""
    return [Path(f"{path}.{age}") for age in (1, 2)]


def _make_older(path: Path) -> None:
    """Keep what lies at path under its older name too, and what lay there under the next."""
    first, second = _older(path)
    if not path.exists():
        return
    if first.exists():
        os.replace(first, second)
    try:
        os.link(path, first)
    except OSError:  # a file system without links
        shutil.copyfile(path, first)


def remove_older(path: Path) -> None:
    """Remove the older checkpoints of a finished run."""
    for older in _older(path):
        older.unlink(missing_ok=True)


def load_checkpoint(path: Path | str, kind: str, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint of one kind ("classifier" or "jem") without executing code from it.

    Raises UserError for a missing file, for one that is no checkpoint of this project, and for the
    other kind; if an older one is intact the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"there is no checkpoint {str(path)!r}: make one with python train_{kind}.py, "
            "or name another"
        )
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # half a dozen types, for the many ways to be no checkpoint
        intact = next((str(older) for older in _older(path) if _is_intact(older, kind)), None)
        advice = f"copy the older {intact!r} over it to go on from that" if intact else ""
        raise UserError(
            f"{str(path)!r} is damaged or no checkpoint ({type(error).__name__}): "
            f"{advice or 'name another file'}"
        ) from error
    ours = isinstance(state, dict) and state.get("format") in FORMATS
    if not ours or state.get("kind") not in NEEDED:
        raise UserError(
            f"{str(path)!r} is no checkpoint of this project: name one that train_{kind}.py wrote"
        )
    if state["kind"] != kind:
        raise UserError(
            f"{str(path)!r} holds a {state['kind']}, and a {kind} is needed: "
            f"make one with python train_{kind}.py"
        )
    if missing := [name for name in NEEDED[kind] if name not in state]:
        raise UserError(
            f"{str(path)!r} lacks {', '.join(missing)}: it is no whole checkpoint, name another"
        )
    return _upgraded(_in_float32(state))


def load_for_all(path: Path, kind: str, ranks: Alone, optional: bool = False) -> Checkpoint | None:
    """Return what load_checkpoint does, read by rank 0; optional: None if there is no such file."""
    return ranks.from_first(
        lambda: None if optional and not path.exists() else load_checkpoint(path, kind)
    )


def _upgraded(state: Checkpoint) -> Checkpoint:
    """Return a checkpoint of an earlier version with the names and flags of today's."""
    if state["format"] != FORMATS[-1]:
        former = state.get("args", {}).items()
        state["args"] = {FORMER_FLAGS.get(name, name): value for name, value in former}
        if "training" in state:
            state["training"]["iteration"] = state["training"].pop("step")
    return {**state, "args": {**NEW_FLAGS, **state.get("args", {})}}


def _in_float32(value: Any) -> Any:
    """Return a checkpoint, or a part of it, with half-precision tensors as float32."""
    if isinstance(value, dict):
        return {name: _in_float32(part) for name, part in value.items()}
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float16 else value


def _is_intact(path: Path, kind: str) -> bool:
    """Tell whether a checkpoint of a kind can be read."""
    try:
        load_checkpoint(path, kind)
    except UserError:
        return False
    return True
