"""Make a small checkpoint of a trained model, to send or to ship, in half precision.

    python benchmarks/small_checkpoint.py --checkpoint results/mnist/jem.pt --out mnist.pt

keeps what sample.py, predict.py and evaluate.py need: the averaged weights, the detector, the
Gaussians that chains start in, with --rank directions each in a common basis of --directions, and
--chains of the replay buffer. A training cannot go on from it. It prints the file's size and
SHA-256.
"""

from __future__ import annotations

import hashlib
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgld_nrg.support import checkpoints, commands, flags
from sgld_nrg.support.errors import UserError, exits_cleanly
from sgld_nrg.support.parser import Parser, flag, positive_int
from sgld_nrg.support.presets import BASE
from sgld_nrg.support.restarts import UniformRestart, compact, restart_from_state

FLAGS = (
    flags.CHECKPOINT,
    flag("--directions", positive_int, "of the basis that all Gaussians share", 150),
    flag("--rank", positive_int, "directions of each Gaussian, at most", 14),
    flag("--chains", positive_int, "chains of the replay buffer", 50),
    flag("--out", str, "checkpoint to write", metavar="FILE", required=True),
)


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """Read a list of arguments, or the command line's."""
    parser = Parser(__doc__, (("checkpoint", FLAGS),), commands.beside_checkpoint)
    return parser.parse_with_out(argv)


def small(checkpoint: dict[str, Any], directions: int, rank: int, chains: int) -> dict[str, Any]:
    """Return the dict of a small checkpoint: weights and the first chains as float16.

    directions, rank: of its restart distribution, as `restarts.compact` has them. Where its data
    lay is left out, for it is to be used elsewhere.
    """

    def halved(tensors: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value.half() if value.is_floating_point() else value
            for name, value in tensors.items()
        }

    kept = [*checkpoints.NEEDED["jem"], "origin", "detector"]
    needed = {name: checkpoint[name] for name in kept if name in checkpoint}
    if "origin" in needed:
        needed["origin"] = {**needed["origin"], "data_dir": ""}
    needed["args"] = {name: checkpoint["args"][name] for name in (*BASE, "p_xy_weight")}
    restart = restart_from_state(checkpoint["restart"])
    uniform = isinstance(restart, UniformRestart)
    needed["restart"] = restart.state_dict() if uniform else compact(restart, directions, rank)
    buffer = {name: value[:chains].clone() for name, value in checkpoint["buffer"].items()}
    return {**needed, "model": halved(checkpoint["model"]), "buffer": halved(buffer)}


@exits_cleanly
def main(args: Namespace) -> None:
    """Run the script with what `parse` returned."""
    checkpoint, path = checkpoints.load_checkpoint(args.checkpoint, "jem"), Path(args.out)
    if path.exists():
        raise UserError(f"{args.out!r} is there already: remove it, or name another with --out")
    state = small(checkpoint, args.directions, args.rank, args.chains)
    checkpoints.save_checkpoint(path, "jem", **state)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    print(f"wrote {path}: {path.stat().st_size / 1000:.0f} kB, SHA-256 {digest}")


if __name__ == "__main__":
    main(parse())
