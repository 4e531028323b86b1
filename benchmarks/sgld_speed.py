"""Time the Langevin step: ours, the paper's, and the machine's matrix product as the limit, alternating in one run.

    python benchmarks/sgld_speed.py --rounds 3 --batches 64 --steps 5

For each network, batch and number of steps K every method runs in turn, round after round, and the median counts. With
--candidates also what could make the step cheaper, one thing at a time. It writes speed.json, speed.md and speed.png.
"""

from __future__ import annotations

import copy
import itertools
import json
import shlex
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli

PRESET = cli.PRESETS["mnist"]
OF_MNIST = {name: PRESET[name] for name in ("arch", "width", "depth", "stem_stride")} | {"channels": 1, "image_size": 28}
WIDE_RESNET = {"arch": "wide-resnet", "stem_stride": 1, "channels": 3, "image_size": 32}
# The second is the first with small windows from the start: halving layers bring it to the maps that the first begins with.
NETWORKS = {
    "small-cnn": OF_MNIST,
    "small-cnn, first layer 3x3": {
        **OF_MNIST, "stem_stride": 1, "width": OF_MNIST["width"] // OF_MNIST["stem_stride"],
        "depth": OF_MNIST["depth"] + OF_MNIST["stem_stride"].bit_length() - 1,
    },
    "wide-resnet 10-2": WIDE_RESNET | {"width": 2, "depth": 10},
    "wide-resnet 28-10": WIDE_RESNET | {"width": 10, "depth": 28},
}  # fmt: skip
MATRIX = {"cpu": 2048, "mps": 2048, "cuda": 8192}  # side of the matrices whose product is the limit
SGLD = {name: PRESET[name] for name in ("step_size", "noise_std", "noise_first", "pixel_grad_clip")}  # the paper clamps nothing


def parse_args(argv=None):
    """Parse a command line; contradictory flags end the program with one sentence and exit code 2."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS)[:3], help="networks to time")
    parser.add_argument("--batches", type=cli.positive_int, nargs="+", default=[16, 64, 256, 1024], help="images at once")
    parser.add_argument("--steps", type=cli.positive_int, nargs="+", default=[1, 5, 20, 100], help="Langevin steps K of a run")
    parser.add_argument("--rounds", type=cli.positive_int, default=7, help="timings of each method, taken by turns")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--compile", action="store_true", help="also time our step compiled")
    parser.add_argument("--cuda-graph", action="store_true", help="also time our chain, compiled or not, as a CUDA graph")
    parser.add_argument("--candidates", action="store_true", help="also time what could make the step cheaper, part by part")
    parser.add_argument("--out-dir", default="results/speed", help="folder that receives everything the script writes")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_args()  # --help and mistyped flags answer here, before torch is loaded

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import fast
import plots
import runs
from models import BlockStem, FlattenLast, HalvingConv, MapHead, build_model, energy
from sgld import energy_and_gradient, frozen, run_chains


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


def chains_of(energy_of, module, graphs=None):
    """Return a callable (x, steps) that runs our chains on an energy."""
    return lambda x, steps: run_chains(energy_of, x, steps, **SGLD, module=module, graphs=graphs)


def methods(model, device, args):
    """Return {name: callable (x, steps)} of every way to run chains that this machine has."""
    now = runs.chain_energy(model, device, runs.pick_precision("auto", device))
    energies = {"ours": now, "ours, float32": runs.chain_energy(model, device, "float32")}
    if args.compile:
        energies["ours, compiled"] = fast.Compiled(now, model)
    ours = {name: chains_of(energy_of, model) for name, energy_of in energies.items()}
    if args.cuda_graph:
        del energies["ours, float32"]
        graphs = fast.ChainGraphs()
        ours |= {f"{name}, CUDA graph": chains_of(energy_of, model, graphs) for name, energy_of in energies.items()}
    plain = by_the_library(model, (BlockStem, HalvingConv, FlattenLast, MapHead)).to(memory_format=torch.contiguous_format)
    return {
        **ours,
        "the paper's": lambda x, steps: paper_chains(plain, x, steps),
        "the paper's, on our layers": lambda x, steps: paper_chains(model, x, steps),
        **other_library(model),
    }


def loop(energy_and_slope, model, one_call=False, in_place=False):
    """Return a callable (x, steps) of the bare chain: run_chains without its checks, for what varies inside the loop."""

    def run(x, steps):
        """Run chains from x, which is left as it is."""
        x = x.clone()
        with frozen(model):
            eps = torch.randn((steps, *x.shape), device=x.device) if one_call else None
            for step in range(steps):
                noise = eps[step] if one_call else torch.randn_like(x)
                x = x.add_(noise, alpha=SGLD["noise_std"]) if in_place else x + SGLD["noise_std"] * noise
                slope = energy_and_slope(x)[1]
                clip = SGLD["pixel_grad_clip"]
                slope = slope.clamp_(-clip, clip) if in_place else slope.clamp(-clip, clip)
                x = x.sub_(slope, alpha=SGLD["step_size"]) if in_place else x - SGLD["step_size"] * slope
        return x

    return run


def by_the_library(model, kind):
    """Return a copy of a network whose layers of one of our kinds, or of several, are those of torch that they derive from."""
    copied = copy.deepcopy(model)
    for layer in copied.modules():
        if isinstance(layer, kind):
            layer.__class__ = type(layer).__base__  # with the weights as they lie in memory, on the device where they are
    return copied


def candidates(model, x):
    """Return {name: callable (x, steps)} of what could make the step of the MNIST preset's network cheaper, or did.

    x: (N, C, H, W) float, images of the shape that will be asked for; on their device everything is to run.
    """
    device = x.device
    precision = runs.pick_precision("auto", device)
    now = runs.chain_energy(model, device, precision)
    plain, library = by_the_library(model, BlockStem), by_the_library(model, HalvingConv)
    contiguous = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    cast = {name: weight.detach().bfloat16() for name, weight in model.named_parameters()}

    def cast_energy(x):
        return energy(torch.func.functional_call(model, cast, x.bfloat16()).float())

    def one_thread(x, steps):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return chains_of(now, model)(x, steps)
        finally:
            torch.set_num_threads(threads)

    def slope(x):
        return energy_and_gradient(now, x)

    with frozen(model):
        graph = make_fx(slope)(x)
    return {
        "as it is": chains_of(now, model),
        "first layer as one strided convolution": chains_of(runs.chain_energy(plain, device, precision), plain),
        "strided layers by the convolution library": chains_of(runs.chain_energy(library, device, precision), library),
        "float32": chains_of(runs.chain_energy(model, device, "float32"), model),
        "weights not channels_last": chains_of(runs.chain_energy(contiguous, device, precision), contiguous),
        "weights kept cast to bf16": chains_of(cast_energy, model),
        "parameters wanting gradients": chains_of(now, None),
        "without the checks for finite values": loop(slope, model),
        "the same, updates in place": loop(slope, model, in_place=True),
        "the same, all noise in one call": loop(slope, model, one_call=True),
        "the same, a traced graph without autograd": loop(graph, model),
        "one thread": one_thread,
    }


def time_candidates(args, device):
    """Time the candidates by turns at the MNIST preset's batch and K; returns [{name, milliseconds_per_step, spread}]."""
    torch.manual_seed(0)
    model = build_model(num_classes=10, **OF_MNIST).to(device)
    x, steps = 2 * torch.rand(PRESET["chain_batch_size"], 1, 28, 28, device=device) - 1, PRESET["steps"]
    work = candidates(model, x)
    taken = {name: [] for name in work}
    for round_ in range(4 * args.rounds + 1):
        for name, call in work.items():
            elapsed = 1000 * seconds(lambda call=call: call(x, steps), device) / steps
            if round_:  # the first warms up
                taken[name].append(elapsed)
    rows = []
    for name, values in taken.items():
        middle = statistics.median(values)
        quarters = statistics.quantiles(values, n=4)
        rows.append({"name": name, "milliseconds_per_step": middle, "spread": (quarters[2] - quarters[0]) / middle})
    return rows


def other_library(model):
    """Return ebmkit's Langevin step on the same energy with the same settings, where that package is installed."""
    try:
        from ebm.jem import ClassifierEnergy
        from ebm.samplers.langevin import LangevinDynamics
    except ImportError:
        return {}

    sampler = LangevinDynamics(SGLD["step_size"], 1, SGLD["noise_std"], SGLD["pixel_grad_clip"])
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
    """Return {precision: callable} of one square matrix product each, of what the machine has: its limit."""
    pairs = {"float32": torch.float32}
    if runs.pick_precision("auto", device) == "bf16":
        pairs["bf16"] = torch.bfloat16
    side = MATRIX[device.type]
    factors = {name: torch.randn(2, side, side, device=device).to(kind) for name, kind in pairs.items()}
    return {name: lambda pair=pair: pair[0] @ pair[1] for name, pair in factors.items()}


def operations(model, x):
    """Return the floating-point operations of one Langevin step per image: forward, and backward to the pixels."""
    with frozen(model), FlopCounterMode(display=False) as counter:
        energy(model(x.clone().requires_grad_())).sum().backward()  # the counter does not know torch.autograd.grad
    return counter.get_total_flops() / len(x)


def time_chains(name, batch, steps, args, device):
    """Time all methods by turns on one network, batch and K; returns a row {method: {...}} for each."""
    torch.manual_seed(0)
    shape = NETWORKS[name]
    model = build_model(num_classes=10, **shape).to(device)
    x = 2 * torch.rand(batch, shape["channels"], shape["image_size"], shape["image_size"], device=device) - 1
    each, work = operations(model, x[:2]), methods(model, device, args)
    limits = matrix_products(device)
    for call in (*work.values(), *work.values()):
        call(x, steps)  # warms up: what is compiled is so the first time, what is captured the second
    taken = {name: [] for name in (*work, *limits)}
    for _ in range(args.rounds):
        for method, call in work.items():
            taken[method].append(seconds(lambda call=call: call(x, steps), device))
        for precision, call in limits.items():
            call()
            taken[precision].append(seconds(call, device))
    rates = {precision: 2 * MATRIX[device.type] ** 3 / statistics.median(taken[precision]) for precision in limits}
    reference = statistics.median(taken["the paper's"])
    rows = []
    for method in work:
        middle = statistics.median(taken[method])
        low_precision = "bf16" in rates and method.startswith("ours") and method != "ours, float32"
        limit = rates["bf16" if low_precision else "float32"]
        rows.append({
            "network": name, "batch": batch, "steps": steps, "method": method,
            "image_steps_per_second": batch * steps / middle,
            "milliseconds_per_step": 1000 * middle / steps,
            "spread": (max(taken[method]) - min(taken[method])) / middle,
            "times_the_papers": reference / middle,
            "share_of_limit": batch * steps / middle * each / limit,
            "limit_gflops": limit / 1e9,
        })  # fmt: skip
    return rows


def markdown(args, rows, parts):
    """Return the tables."""
    lines = [f"Made by `python benchmarks/sgld_speed.py {shlex.join(args.given)}`, {args.machine}.", ""]
    columns = ["network", "batch", "K", "method", "ms a step", "spread", "image-steps/s", "times the paper's", "of the limit"]
    lines += ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for row in rows:
        lines.append(
            f"| {row['network']} | {row['batch']} | {row['steps']} | {row['method']} | {row['milliseconds_per_step']:.4g} | "
            f"{100 * row['spread']:.0f} % | {row['image_steps_per_second']:,.0f} | {row['times_the_papers']:.2f} | "
            f"{100 * row['share_of_limit']:.0f} % of {row['limit_gflops']:,.0f} GFLOP/s |"
        )
    if parts:
        now = parts[0]["milliseconds_per_step"]
        lines += [
            "",
            f"The step of the MNIST preset (batch {PRESET['chain_batch_size']}, K {PRESET['steps']}), "
            "changed in one thing each; spread is between quartiles:",
            "",
        ]
        lines += ["| | ms a step | spread | times as long |", "| --- | --- | --- | --- |"]
        for row in parts:
            cost = row["milliseconds_per_step"]
            lines.append(f"| {row['name']} | {cost:.2f} | {100 * row['spread']:.0f} % | {cost / now:.2f} |")
    return "\n".join(lines) + "\n"


@cli.exits_cleanly
def main(argv=None):
    """Run the script with a list of arguments, or with the command line's."""
    args = parse_args(argv)
    args.given = sys.argv[1:] if argv is None else argv
    device = runs.pick_device(args.device)
    if args.cuda_graph and device.type != "cuda":
        raise cli.UserError(
            f"--cuda-graph needs a CUDA device, and this is {str(device)!r}: leave it out, or name another --device"
        )
    where = f"{torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    args.machine = f"torch {torch.__version__}, {where}"
    folder = Path(args.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = list(itertools.product(args.networks, args.batches, args.steps))
    rows = []
    for name, batch, steps in tqdm(wanted, disable=None):
        rows += time_chains(name, batch, steps, args, device)
    parts = time_candidates(args, device) if args.candidates else None
    (folder / "speed.json").write_text(
        json.dumps({"machine": args.machine, "rows": rows, "candidates": parts}, indent=1) + "\n"
    )
    (folder / "speed.md").write_text(markdown(args, rows, parts))
    plots.save_speed(rows, folder / "speed.png")
    print(markdown(args, rows, parts))


if __name__ == "__main__":
    main()
