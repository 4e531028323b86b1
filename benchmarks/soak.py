"""Watch the memory of a long training and of a long sampling, second by second.

    python benchmarks/soak.py --minutes 2 --num 2000

trains on --dataset for some minutes, draws fresh chains with sample.py from what came out, and writes soak.json, soak.md and
soak.png: resident memory against time for both, and the training's energy gap, accuracy and rollbacks.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli

PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def parse_args(argv=None):
    """Parse a command line; contradictory flags end the program with one sentence and exit code 2."""
    parser = cli.Parser(__doc__)
    cli.add_data_dir_flag(parser)
    parser.add_argument("--dataset", choices=cli.DATASETS, default="mnist", help="data set, and with it the preset")
    parser.add_argument("--minutes", type=cli.positive, default=60.0, help="wall-clock budget of the training")
    parser.add_argument("--num", type=cli.positive_int, default=100_000, help="fresh chains to draw afterwards")
    parser.add_argument("--every", type=cli.positive, default=1.0, help="seconds between two readings of the memory")
    parser.add_argument("--seed", type=cli.seed, default=0, help="seed of training and sampling")
    parser.add_argument("--out-dir", default="results/soak", help="folder that receives everything the script writes")
    args = parser.parse_args(argv)
    if not Path("/proc/self/statm").exists():
        parser.error("the memory of a process is read from /proc, which this system does not have: use Linux")
    return args


def watch(command, every, log):
    """Run a command and read its resident memory until it ends; returns [[minutes, MiB]]. Raises UserError if it fails."""
    readings, start = [], time.perf_counter()
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        while process.poll() is None:
            pages = Path(f"/proc/{process.pid}/statm").read_text().split()
            if len(pages) > 1 and int(pages[1]):
                readings.append([(time.perf_counter() - start) / 60, int(pages[1]) * PAGE / 2**20])
            time.sleep(every)
    if process.returncode:
        raise cli.UserError(f"{Path(command[1]).name} ended with exit code {process.returncode}: read {str(log)!r}")
    return readings


def growth(readings):
    """Return the medians, MiB, of the second and of the last tenth of the readings: where memory settled, where it ended."""
    tenth = max(len(readings) // 10, 1)
    values = [memory for _, memory in readings]
    return statistics.median(values[tenth : 2 * tenth] or values), statistics.median(values[-tenth:])


@cli.exits_cleanly
def main(argv=None):
    """Run the script with a list of arguments, or with the command line's."""
    args = parse_args(argv)
    given = sys.argv[1:] if argv is None else argv
    folder = Path(args.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    run, seed = folder / "run", ["--seed", str(args.seed)]
    train = [sys.executable, str(ROOT / "train_jem.py"), "--dataset", args.dataset, "--data-dir", args.data_dir, *seed]
    memory = {
        "training": watch(
            [*train, "--max-minutes", str(args.minutes), "--overwrite", "--out-dir", str(run)], args.every, folder / "train.log"
        )
    }
    sample = [sys.executable, str(ROOT / "sample.py"), "--checkpoint", str(run / "jem.pt"), "--num", str(args.num), *seed]
    target = ["--save-array", str(folder / "drawn.npz")]
    memory["sampling"] = watch([*sample, *target], args.every, folder / "sample.log")

    import plots
    import runs

    rows = [row for row in runs.read_metrics(run / "metrics.csv") if row["phase"] == "jem"]
    found = {
        "command": f"python benchmarks/soak.py {shlex.join(given)}", "memory": memory, "iterations": int(rows[-1]["step"]),
        "rollbacks": int(rows[-1]["rollbacks"]), "validation_accuracy": float(rows[-1]["val_accuracy"]),
        "largest_energy_gap": max(abs(float(row["energy_gap"])) for row in rows[len(rows) // 10 :]),
    }  # fmt: skip
    (folder / "soak.json").write_text(json.dumps(found, indent=1) + "\n")
    lines = [f"Made by `{found['command']}`.", ""]
    for name, readings in memory.items():
        settled, last = growth(readings)
        lines.append(
            f"- {name}: {readings[-1][0]:.1f} minutes, memory {settled:.0f} MiB once settled, {last:.0f} MiB at the end, "
            f"{max(value for _, value in readings):.0f} MiB at most"
        )
    lines.append(
        f"- training: {found['iterations']:,} iterations, {found['rollbacks']} rollbacks, largest energy gap after the first "
        f"tenth {found['largest_energy_gap']:.2f} nat, validation accuracy {100 * found['validation_accuracy']:.2f} %"
    )
    (folder / "soak.md").write_text("\n".join(lines) + "\n")
    plots.save_soak(memory, rows, folder / "soak.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
