"""Make a small checkpoint of a trained model, to send or to ship: what sample.py and evaluate.py need, in half precision.

    python export.py --checkpoint results/mnist/jem.pt --out mnist.pt

keeps the averaged weights, --parts Gaussians of each class that chains start in, with --rank directions each, and --chains
of the replay buffer; the training cannot go on from it. It prints the file's size and SHA-256.
"""

from __future__ import annotations

import cli


def parse_args(argv=None):
    """Parse a command line; contradictory flags end the program with one sentence and exit code 2."""
    parser = cli.Parser(__doc__)
    cli.add_checkpoint_flag(parser)
    parser.add_argument(
        "--parts", type=cli.positive_int, default=10, help="Gaussians of each class, at most, the most frequent"
    )
    parser.add_argument("--rank", type=cli.positive_int, default=16, help="directions of each Gaussian, at most")
    parser.add_argument("--chains", type=cli.positive_int, default=100, help="chains of the replay buffer")
    parser.add_argument("--out", metavar="FILE", required=True, help="checkpoint to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and mistyped flags answer here, before torch is loaded

import hashlib
from pathlib import Path

import torch

import runs
from cli import UserError
from restarts import restart_from_state


def small(checkpoint, parts, rank, chains):
    """Return the dict of a small checkpoint: weights, restarts and the first chains as float16, the rest as it is.

    checkpoint: what train_jem.py wrote. parts: Gaussians of each class that are kept, the most frequent, the classes being as
    frequent as before. rank: columns of each Gaussian's factor that are kept, those of largest variance.
    """

    def halved(tensors):
        return {
            name: value.half() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in tensors.items()
        }

    restart = restart_from_state(checkpoint["restart"]).state_dict()
    if "factor" in restart:
        weights = restart["weights"]
        kept, places = weights.topk(min(parts, weights.shape[1]))
        gaussians = (places + weights.shape[1] * torch.arange(len(weights))[:, None]).flatten()
        restart["weights"] = kept * weights.sum(1, keepdim=True) / kept.sum(1, keepdim=True)
        restart["mean"], restart["factor"] = restart["mean"][gaussians], restart["factor"][gaussians]
        strongest = restart["factor"].square().sum(1).argsort(dim=1, descending=True)[:, :rank]
        restart["factor"] = restart["factor"].gather(2, strongest[:, None].expand(-1, restart["factor"].shape[1], -1))
    buffer = {name: value[:chains].clone() for name, value in checkpoint["buffer"].items()}
    kept = {name: checkpoint[name] for name in runs.NEEDED["jem"]}
    return {**kept, "model": halved(checkpoint["model"]), "restart": halved(restart), "buffer": halved(buffer)}


@cli.exits_cleanly
def main(argv=None):
    """Run the script with a list of arguments, or with the command line's."""
    args = parse_args(argv)
    checkpoint, path = runs.load_checkpoint(args.checkpoint, "jem"), Path(args.out)
    if path.exists():
        raise UserError(f"{args.out!r} is there already: remove it, or name another place with --out")
    if not path.absolute().parent.is_dir():
        raise UserError(f"there is no folder for --out {args.out!r}: make it, or name another place")
    runs.save_checkpoint(path, "jem", **small(checkpoint, args.parts, args.rank, args.chains))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    print(f"wrote {path}: {path.stat().st_size / 1000:.0f} kB, SHA-256 {digest}")


if __name__ == "__main__":
    main()
