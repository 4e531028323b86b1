"""Measure what grows: an iteration with K, batch and image size; sample.py's memory with the images; and the start.

    python benchmarks/costs.py --out-dir results/costs

writes costs.json, costs.md and costs.png. Nothing is trained but, without --checkpoint, one epoch on the digits.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli


def parse_args(argv=None):
    """Parse a command line; contradictory flags end the program with one sentence and exit code 2."""
    parser = cli.Parser(__doc__)
    cli.add_data_dir_flag(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="a jem.pt for the memory of sample.py; without it one is trained on the digits"
    )
    cli.add_speed_flags(parser)
    parser.add_argument("--out-dir", default="results/costs", help="folder that receives everything the script writes")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and mistyped flags answer here, before torch is loaded

import torch
from sgld_speed import seconds

import data
import plots
import runs
import train_jem
from restarts import UniformRestart
from training import Training

AXES = {"steps": [1, 5, 10, 20, 40], "batch": [16, 64, 256, 512], "size": [16, 28, 32, 48, 64]}
COUNTS = (100, 1000, 10_000, 100_000)  # images that sample.py draws
STARTS = 5


def iteration_costs(device, speed_flags):
    """Return {axis: [[value, milliseconds]]}: an iteration of training against K, batch and image size, the rest held."""
    base = {"steps": cli.PRESETS["mnist"]["steps"], "batch": 64, "size": 28}
    return {
        axis: [[value, iteration_cost(device, speed_flags, **{**base, axis: value})] for value in AXES[axis]] for axis in AXES
    }


def iteration_cost(device, speed_flags, steps, batch, size):
    """Return the milliseconds, median of 7, of an iteration of the MNIST preset's training on random images.

    Of batch images, and chains in the preset's proportion. speed_flags: of --compile and --cuda-graph.
    """
    preset = cli.PRESETS["mnist"]
    chains = max(1, batch * preset["chain_batch_size"] // preset["batch_size"])
    flags = ["--dataset", "mnist", "--from-scratch", "--steps", str(steps), "--batch-size", str(batch)]
    args = train_jem.parse_args([*flags, "--chain-batch-size", str(chains), "--buffer-size", "2000", *speed_flags])
    split = data.Split(2 * torch.rand(1024, 1, size, size) - 1, torch.arange(1024) % 10)
    dataset = data.Dataset("mnist", 10, split, split, split)
    with tempfile.TemporaryDirectory() as folder:
        run = Training(args, dataset, Path(folder), "jem", device)
        long = {"long_chains": args.long_chains, "long_share": args.long_share}
        restart = UniformRestart(dataset.shape, dataset.num_classes)
        buffer = train_jem.ReplayBuffer(args.buffer_size, restart, args.reinit_prob, device, run.generator, **long)
        images, labels = (tensor[:batch].to(device) for tensor in split)

        def iteration():
            train_jem.iterate(run, buffer, images, labels)

        for _ in range(3):
            iteration()  # warms up: what is compiled is so in the first, what is captured in the second
        return 1000 * statistics.median(seconds(iteration, device) for _ in range(7))


def sampling_memory(checkpoint, folder):
    """Return [[images, MiB]]: the largest memory of sample.py for more and more images of two steps each."""
    found = []
    for count in COUNTS:
        command = [sys.executable, str(ROOT / "sample.py"), "--checkpoint", checkpoint, "--num", str(count), "--steps", "2"]
        target = ["--out-dir", str(folder), "--save-array", str(Path(folder) / "drawn.npz")]
        process = subprocess.Popen([*command, *target], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise cli.UserError(f"sample.py failed on {checkpoint!r}: give a jem.pt with --checkpoint")
        found.append([count, usage.ru_maxrss / 1024])
    return found


def starting_times(args, folder):
    """Return the seconds of `train_jem.py --help`, and to the end of the first iteration of a training: medians of STARTS."""
    script, shown, first = [sys.executable, str(ROOT / "train_jem.py")], [], []
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    dataset = "mnist" if Path(args.data_dir, "MNIST", "raw").is_dir() else "digits"
    for number in range(STARTS):
        start = time.perf_counter()
        subprocess.run([*script, "--help"], **quiet, check=True)
        shown.append(time.perf_counter() - start)
        target = Path(folder) / f"start-{number}"
        flags = ["--dataset", dataset, "--data-dir", args.data_dir, "--from-scratch", "--log-every", "1"]
        start = time.perf_counter()
        training = subprocess.Popen([*script, *flags, "--out-dir", str(target)], **quiet)
        while training.poll() is None and not ((log := target / "metrics.csv").exists() and log.read_text().count("\n") > 1):
            time.sleep(0.01)
        first.append(time.perf_counter() - start)
        training.kill()
        training.wait()
    return {"help": statistics.median(shown), f"first iteration on {dataset}": statistics.median(first)}


def measure(args, device):
    """Measure what an iteration, sample.py's memory and the start cost: a dict of plain types."""
    speed_flags = ["--compile"] if args.compile else []
    if args.cuda_graph is not None:
        speed_flags.append("--cuda-graph" if args.cuda_graph else "--no-cuda-graph")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint
        if not checkpoint:
            checkpoint = str(Path(folder) / "jem.pt")
            train_jem.main(["--dataset", "digits", "--from-scratch", "--epochs", "1", "--out-dir", folder])
        return {
            "iteration": iteration_costs(device, speed_flags),
            "memory": sampling_memory(checkpoint, folder),
            "start": starting_times(args, folder),
        }


def markdown(args, found):
    """Return the numbers as a list."""
    machine = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    lines = [f"Made by `python benchmarks/costs.py {shlex.join(args.given)}`, {machine}.", ""]
    steps = cli.PRESETS["mnist"]["steps"]
    lines += [f"Milliseconds of a training iteration (K {steps}, batch 64, 28x28 pixels, one of them varied):", ""]
    for axis, values in found["iteration"].items():
        lines.append(f"- {axis}: " + ", ".join(f"{value}: {milliseconds:.0f}" for value, milliseconds in values))
    memory = ", ".join(f"{count:,}: {mebibytes:.0f} MiB" for count, mebibytes in found["memory"])
    lines += ["", f"Largest memory of sample.py against images: {memory}."]
    lines += ["", f"Seconds from the start: {', '.join(f'{name} {value:.2f}' for name, value in found['start'].items())}."]
    return "\n".join(lines) + "\n"


@cli.exits_cleanly
def main(argv=None):
    """Run the script with a list of arguments, or with the command line's."""
    args = parse_args(argv)
    args.given = sys.argv[1:] if argv is None else argv
    if args.checkpoint and not os.path.isfile(args.checkpoint):
        raise cli.UserError(f"there is no checkpoint {args.checkpoint!r}: name another with --checkpoint")
    folder = Path(args.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    found = measure(args, runs.pick_device(args.device))
    (folder / "costs.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "costs.md").write_text(markdown(args, found))
    plots.save_costs(found, folder / "costs.png")
    print(markdown(args, found))


if __name__ == "__main__":
    main()
