"""Make a small checkpoint of a trained model, to send or to ship, in half precision.

    python benchmarks/small_checkpoint.py --checkpoint results/mnist/jem.pt --out mnist.pt

keeps what sample.py and evaluate.py need: the averaged weights, --parts Gaussians of each class
that chains start in, with --rank directions each, and --chains of the replay buffer. A training
cannot go on from it. It prints the file's size and SHA-256.
"""

from __future__ import annotations

import hashlib
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgld_nrg.support import checkpoints, commands, flags
from sgld_nrg.support.errors import UserError, exits_cleanly
from sgld_nrg.support.parser import Parser, flag, positive_int
from sgld_nrg.support.restarts import restart_from_state

FLAGS = (
    flags.CHECKPOINT,
    flag("--parts", positive_int, "Gaussians of each class, at most, the most frequent", 10),
    flag("--rank", positive_int, "directions of each Gaussian, at most", 16),
    flag("--chains", positive_int, "chains of the replay buffer", 100),
    flag("--out", str, "checkpoint to write", metavar="FILE", required=True),
)


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """Read a list of arguments, or the command line's."""
    return Parser(__doc__, (("checkpoint", FLAGS),), commands.beside_checkpoint).parse(argv)


def small(checkpoint: dict[str, Any], parts: int, rank: int, chains: int) -> dict[str, Any]:
    """Return the dict of a small checkpoint: weights, restarts and the first chains as float16.

    parts: Gaussians of each class that are kept, the most frequent, the classes being as frequent
    as before. rank: columns of each Gaussian's factor that are kept, those of largest variance.
    """

    def halved(tensors: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value.half() if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in tensors.items()
        }

    restart = restart_from_state(checkpoint["restart"]).state_dict()
    if "factor" in restart:
        weights, mean, factor = restart["weights"], restart["mean"], restart["factor"]
        kept, places = weights.topk(min(parts, weights.shape[1]))
        gaussians = places + weights.shape[1] * torch.arange(len(weights))[:, None]
        mean, factor = mean[gaussians.flatten()], factor[gaussians.flatten()]
        strongest = factor.square().sum(1).argsort(dim=1, descending=True)[:, :rank]
        columns = strongest[:, None].expand(-1, factor.shape[1], -1)
        restart["weights"] = kept * weights.sum(1, keepdim=True) / kept.sum(1, keepdim=True)
        restart["mean"], restart["factor"] = mean, factor.gather(2, columns)
    buffer = {name: value[:chains].clone() for name, value in checkpoint["buffer"].items()}
    parts_of = {"model": checkpoint["model"], "restart": restart, "buffer": buffer}
    kept = [*checkpoints.NEEDED["jem"], "origin", "detector"]
    needed = {name: checkpoint[name] for name in kept if name in checkpoint}
    return {**needed, **{name: halved(tensors) for name, tensors in parts_of.items()}}


@exits_cleanly
def main(args: Namespace) -> None:
    """Run the script with what `parse` returned."""
    checkpoint, path = checkpoints.load_checkpoint(args.checkpoint, "jem"), Path(args.out)
    if path.exists():
        raise UserError(f"{args.out!r} is there already: remove it, or name another with --out")
    if not path.absolute().parent.is_dir():
        raise UserError(f"there is no folder for --out {args.out!r}: make it, or name another")
    state = small(checkpoint, args.parts, args.rank, args.chains)
    checkpoints.save_checkpoint(path, "jem", **state)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    print(f"wrote {path}: {path.stat().st_size / 1000:.0f} kB, SHA-256 {digest}")


if __name__ == "__main__":
    main(parse())
