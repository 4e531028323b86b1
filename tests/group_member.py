"""One of two processes that test_parallel.py starts: writes what a Group gives it.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python tests/group_member.py FOLDER
"""

import sys
import time
from pathlib import Path

import torch

from sgld_nrg.support import errors, parallel

CPU = torch.device("cpu")


def outcome(work):
    """Return what some work returns, or how it ended."""
    try:
        return work()
    except (errors.UserError, SystemExit) as end:
        return type(end).__name__, str(end)


def found_there(ranks, path):
    """Return whether a file is there already; the first process takes its time to make it."""
    with ranks.first_on_each_node():
        found = path.exists()
        if ranks.first:
            time.sleep(0.2)
            path.touch()
    return found


def mistaken():
    """Make a user's mistake."""
    raise errors.UserError("a mistake")


def main(folder):
    """Call the methods in turn, without `wrapped`, whose imports take seconds."""
    errors.SECONDS_TO_SAY_WHY = 0
    with parallel.processes(CPU) as ranks:
        print("said once")
        own = (ranks.rank, {"x": torch.full((2,), float(ranks.rank))})
        means = ranks.mean({"rank": ranks.rank, "one": torch.ones(())})
        found = {
            "place": (ranks.rank, ranks.count, ranks.first),
            "share": ranks.share(64, "--batch-size"),
            "no share": outcome(lambda: ranks.share(63, "--batch-size")),
            "found there": found_there(ranks, folder / "downloaded"),
            "largest": ranks.largest(ranks.rank, -ranks.rank, 0.5),
            "mean": {name: float(value) for name, value in means.items()},
            "mean of nothing": ranks.mean({}),
            "gathered": ranks.gathered({"rank": ranks.rank}),
            "gathered at first": ranks.gathered_at_first(own),
            "from first": ranks.from_first(lambda: f"made by {ranks.rank}"),
            "mistake of the first": outcome(lambda: ranks.from_first(mistaken)),
        }
        torch.save(found, folder / f"{ranks.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
