"""Every look at a test set is counted: results/looks.csv gets a line for each."""

from __future__ import annotations

import csv
import os
import sys
from argparse import Namespace
from datetime import UTC, datetime
from pathlib import Path

from sgld_nrg.support.commands import command_line
from sgld_nrg.support.log import git_commit

COLUMNS = ("date", "commit", "data_set", "command", "what_for")


def record(script: str, args: Namespace, data_set: str, what_for: str) -> None:
    """Append a line to results/looks.csv, or to the file that SGLD_NRG_LOOKS names.

    script: as on the command line, "python evaluate.py". A dry run, which shows nothing, counts
    for nothing. If the file cannot be written, that is said, and the run goes on.
    """
    if getattr(args, "dry_run", False):
        return
    path = Path(os.environ.get("SGLD_NRG_LOOKS", "results/looks.csv"))
    date = datetime.now(UTC).isoformat(timespec="minutes")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", newline="") as file:
            writer = csv.writer(file)
            if not file.tell():
                writer.writerow(COLUMNS)
            writer.writerow([date, git_commit(), data_set, command_line(script, args), what_for])
    except OSError as error:
        print(f"this look is not counted: {str(path)!r}: {error.strerror}", file=sys.stderr)
