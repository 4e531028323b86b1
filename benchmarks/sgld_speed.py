"""Time the Langevin step: ours, the paper's, and the machine's matrix product as the limit, alternating in one run.

    python benchmarks/sgld_speed.py --rounds 3 --batches 64 --steps 5

For each network, batch and number of steps K every method runs in turn, round after round, and the median counts. It
writes speed.json, speed.md and speed.png; with --costs also costs.png: how the time of an iteration grows with K, batch and
image size, what sample.py needs in memory, and how long the start takes.
"""

from __future__ import annotations

import itertools
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

# The first is the network of the MNIST preset, the second the one without its strided first layer, about as large.
NETWORKS = {
    "small-cnn": {"arch": "small-cnn", "width": 32, "depth": 2, "stem_stride": 2, "channels": 1, "image_size": 28},
    "small-cnn, first layer 3x3": {
        "arch": "small-cnn", "width": 16, "depth": 3, "stem_stride": 1, "channels": 1, "image_size": 28,
    },
    "wide-resnet 10-2": {"arch": "wide-resnet", "width": 2, "depth": 10, "stem_stride": 1, "channels": 3, "image_size": 32},
    "wide-resnet 28-10": {"arch": "wide-resnet", "width": 10, "depth": 28, "stem_stride": 1, "channels": 3, "image_size": 32},
}  # fmt: skip
MATRIX = 2048  # side of the matrices whose product is the limit
SGLD = {"step_size": 0.1, "noise_std": 0.1, "noise_first": True, "pixel_grad_clip": 5.0, "clamp": (-1, 1)}


def parse_args(argv=None):
    """Parse a command line; contradictory flags end the program with one sentence and exit code 2."""
    parser = cli.Parser(__doc__)
    cli.add_data_dir_flag(parser)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS)[:3], help="networks to time")
    parser.add_argument("--batches", type=cli.positive_int, nargs="+", default=[16, 64, 256, 1024], help="images at once")
    parser.add_argument("--steps", type=cli.positive_int, nargs="+", default=[1, 5, 20, 100], help="Langevin steps K of a run")
    parser.add_argument("--rounds", type=cli.positive_int, default=7, help="timings of each method, taken by turns")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--compile", action="store_true", help="also time our step compiled (on a GPU: as CUDA graphs)")
    parser.add_argument("--costs", action="store_true", help="also measure what an iteration, sample.py and the start cost")
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="a jem.pt for the memory of sample.py; without it one is trained on the digits"
    )
    parser.add_argument("--out-dir", default="results/speed", help="folder that receives everything the script writes")
    args = parser.parse_args(argv)
    if args.checkpoint and not os.path.isfile(args.checkpoint):
        parser.error(f"there is no checkpoint {args.checkpoint!r}: name another with --checkpoint")
    return args


if __name__ == "__main__":
    parse_args()  # --help and mistyped flags answer here, before torch is loaded

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import plots
import runs
import train_jem
from models import build_model, energy
from sgld import UniformRestart, energy_and_gradient, frozen, run_chains
from training import Training


def paper_chains(model, x, steps):
    """Run chains as the paper's published code does: float32, the energy's graph retained, parameters wanting gradients.

    The step is x.data += dlogsumexp/dx + 0.01 * noise. Source: arXiv 1912.03263, algorithm 1, and the description of its
    code; written anew here.
    """
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    x = x.clone().requires_grad_()
    for _ in range(steps):
        gradient = torch.autograd.grad(model(x).logsumexp(1).sum(), [x], retain_graph=True)[0]
        x.data += gradient + 0.01 * torch.randn_like(x)
    model.train()
    return x.detach()


def methods(model, device, args):
    """Return {name: callable (x, steps)} of every way to run chains that this machine has."""
    energies = {"ours": runs.chain_energy(model, device, runs.pick_precision("auto", device))}
    energies["ours, float32"] = runs.chain_energy(model, device, "float32")
    if args.compile:
        energies["ours, compiled"] = runs.Compiled(energies["ours"], device)

    def chains_of(energy_of):
        return lambda x, steps: run_chains(energy_of, x, steps, **SGLD, module=model)

    return {
        **{name: chains_of(energy_of) for name, energy_of in energies.items()},
        "the paper's": lambda x, steps: paper_chains(model, x, steps),
        **other_library(model),
    }


def other_library(model):
    """Return ebmkit's Langevin step on the same energy with the same settings, where that package is installed."""
    try:
        from ebm.jem import ClassifierEnergy
        from ebm.samplers.langevin import LangevinDynamics
    except ImportError:
        return {}

    sampler = LangevinDynamics(SGLD["step_size"], 1, SGLD["noise_std"], SGLD["pixel_grad_clip"], SGLD["clamp"])
    energy_model = ClassifierEnergy(model)
    return {"ebmkit": lambda x, steps: sampler.sample(energy_model, x, steps=steps)}


def seconds(work, device):
    """Return how long a call takes."""
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronise()
    start = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - start


def matrix_products(device):
    """Return {precision: callable} of one square matrix product each: the machine's limit."""
    pairs = {"float32": torch.float32, "bf16": torch.bfloat16}
    factors = {name: torch.randn(2, MATRIX, MATRIX, device=device).to(kind) for name, kind in pairs.items()}
    return {name: lambda pair=pair: pair[0] @ pair[1] for name, pair in factors.items()}


def operations(model, x):
    """Return the floating-point operations of one Langevin step per image: forward, and backward to the pixels."""
    with frozen(model), FlopCounterMode(display=False) as counter:
        energy_and_gradient(lambda part: energy(model(part)), x)
    return counter.get_total_flops() / len(x)


def time_chains(name, batch, steps, args, device):
    """Time all methods by turns on one network, batch and K; returns a row {method: {...}} for each."""
    torch.manual_seed(0)
    shape = NETWORKS[name]
    model = build_model(num_classes=10, **shape).to(device)
    x = 2 * torch.rand(batch, shape["channels"], shape["image_size"], shape["image_size"], device=device) - 1
    each, work = operations(model, x[:2]), methods(model, device, args)
    limits = matrix_products(device)
    for call in work.values():
        call(x, 1)
    taken = {name: [] for name in (*work, *limits)}
    for _ in range(args.rounds):
        for method, call in work.items():
            taken[method].append(seconds(lambda call=call: call(x, steps), device))
        for precision, call in limits.items():
            call()
            taken[precision].append(seconds(call, device))
    rates = {precision: 2 * MATRIX**3 / statistics.median(taken[precision]) for precision in limits}
    reference = statistics.median(taken["the paper's"])
    rows = []
    for method in work:
        middle = statistics.median(taken[method])
        low_precision = method in ("ours", "ours, compiled") and runs.pick_precision("auto", device) == "bf16"
        rows.append({
            "network": name, "batch": batch, "steps": steps, "method": method,
            "image_steps_per_second": batch * steps / middle,
            "milliseconds_per_step": 1000 * middle / steps,
            "spread": (max(taken[method]) - min(taken[method])) / middle,
            "times_the_papers": reference / middle,
            "share_of_limit": batch * steps / middle * each / rates["bf16" if low_precision else "float32"],
            "limit_gflops": rates["bf16" if low_precision else "float32"] / 1e9,
        })  # fmt: skip
    return rows


def iteration_costs(device):
    """Return {axis: [[value, milliseconds]]}: an iteration of training against K, batch and image size, the rest held."""
    base = {"steps": 5, "batch": 64, "size": 28}
    axes = {"steps": [1, 5, 10, 20, 40], "batch": [16, 64, 256, 512], "size": [16, 28, 32, 48, 64]}
    return {axis: [[value, iteration_cost(device, **{**base, axis: value})] for value in axes[axis]] for axis in axes}


def iteration_cost(device, steps, batch, size):
    """Return the milliseconds, median of 7, of an iteration of the MNIST preset's training on random images."""
    flags = ["--dataset", "mnist", "--from-scratch", "--steps", str(steps), "--batch-size", str(batch)]
    args = train_jem.parse_args([*flags, "--buffer-size", "2000"])
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

        iteration()
        return 1000 * statistics.median(seconds(iteration, device) for _ in range(7))


def sampling_memory(checkpoint, folder):
    """Return [[images, MiB]]: the largest memory of sample.py for more and more images of two steps each."""
    found = []
    for count in (100, 1000, 10_000, 100_000):
        command = [sys.executable, str(ROOT / "sample.py"), "--checkpoint", checkpoint, "--num", str(count), "--steps", "2"]
        target = ["--out-dir", str(folder), "--save-array", str(Path(folder) / "drawn.npz")]
        process = subprocess.Popen([*command, *target], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise cli.UserError(f"sample.py failed on {checkpoint!r}: give a jem.pt with --checkpoint")
        found.append([count, usage.ru_maxrss / 1024])
    return found


def starting_times(args, folder):
    """Return the seconds of `train_jem.py --help`, and to the end of the first iteration of a training: medians of 5."""
    script, shown, first = [sys.executable, str(ROOT / "train_jem.py")], [], []
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    dataset = "mnist" if Path(args.data_dir, "MNIST", "raw").is_dir() else "digits"
    for number in range(5):
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


def measure_costs(args, device):
    """Measure what an iteration, sample.py's memory and the start cost: a dict of plain types."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint
        if not checkpoint:
            checkpoint = str(Path(folder) / "jem.pt")
            train_jem.main(["--dataset", "digits", "--from-scratch", "--epochs", "1", "--out-dir", folder])
        return {
            "iteration": iteration_costs(device),
            "memory": sampling_memory(checkpoint, folder),
            "start": starting_times(args, folder),
        }


def markdown(args, rows, costs):
    """Return the tables."""
    lines = [f"Made by `python benchmarks/sgld_speed.py {shlex.join(args.given)}`, {args.machine}.", ""]
    columns = ["network", "batch", "K", "method", "ms a step", "spread", "image-steps/s", "times the paper's", "of the limit"]
    lines += ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for row in rows:
        lines.append(
            f"| {row['network']} | {row['batch']} | {row['steps']} | {row['method']} | {row['milliseconds_per_step']:.2f} | "
            f"{100 * row['spread']:.0f} % | {row['image_steps_per_second']:,.0f} | {row['times_the_papers']:.2f} | "
            f"{100 * row['share_of_limit']:.0f} % of {row['limit_gflops']:.0f} GFLOP/s |"
        )
    if costs:
        lines += ["", "Milliseconds of a training iteration (K 5, batch 64, 28x28 pixels, one of them varied):", ""]
        for axis, values in costs["iteration"].items():
            lines.append(f"- {axis}: " + ", ".join(f"{value}: {milliseconds:.0f}" for value, milliseconds in values))
        memory = ", ".join(f"{count:,}: {mebibytes:.0f} MiB" for count, mebibytes in costs["memory"])
        lines += [f"- largest memory of sample.py against images: {memory}"]
        lines += [f"- seconds: {', '.join(f'{name} {value:.2f}' for name, value in costs['start'].items())}"]
    return "\n".join(lines) + "\n"


@cli.exits_cleanly
def main(argv=None):
    """Run the script with a list of arguments, or with the command line's."""
    args = parse_args(argv)
    args.given = sys.argv[1:] if argv is None else argv
    device = runs.pick_device(args.device)
    args.machine = f"torch {torch.__version__}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    folder = Path(args.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = list(itertools.product(args.networks, args.batches, args.steps))
    rows = []
    for name, batch, steps in tqdm(wanted, disable=None):
        rows += time_chains(name, batch, steps, args, device)
    costs = measure_costs(args, device) if args.costs else None
    (folder / "speed.json").write_text(json.dumps({"machine": args.machine, "rows": rows, "costs": costs}, indent=1) + "\n")
    (folder / "speed.md").write_text(markdown(args, rows, costs))
    plots.save_speed(rows, folder / "speed.png")
    if costs:
        plots.save_costs(costs, folder / "costs.png")
    print(markdown(args, rows, costs))


if __name__ == "__main__":
    main()
