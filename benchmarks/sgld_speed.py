"""Time the Langevin step: ours, the paper's, and the machine's matrix product as the limit.

    python benchmarks/sgld_speed.py --rounds 3 --batches 64 --steps 5

For each network, batch and number of steps K every method runs by turns, round after round, and the
median counts. It writes speed.json, speed.md and speed.png.
"""

from __future__ import annotations

import copy
import itertools
import json
import shlex
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from sgld_nrg.models import build_model, energy_of, marginal_energy
from sgld_nrg.sgld import Langevin, frozen, run_chains
from sgld_nrg.support import fast, flags, plots
from sgld_nrg.support.devices import pick_device, pick_precision
from sgld_nrg.support.errors import UserError, exits_cleanly
from sgld_nrg.support.layers import BlockStem, FlattenLast, HalvingConv, MapHead
from sgld_nrg.support.parser import Parser, flag, positive_int
from sgld_nrg.support.presets import MNIST

SHAPE = ("arch", "width", "depth", "stem_stride")
OF_MNIST: dict[str, Any] = {name: MNIST[name] for name in SHAPE} | {"channels": 1, "image_size": 28}
WIDE_RESNET: dict[str, Any] = {
    "arch": "wide-resnet",
    "stem_stride": 1,
    "channels": 3,
    "image_size": 32,
}
# The second has small windows from the start: halving layers bring it to the first one's maps.
NETWORKS = {
    "small-cnn": OF_MNIST,
    "small-cnn, first layer 3x3": OF_MNIST
    | {
        "stem_stride": 1,
        "width": OF_MNIST["width"] // OF_MNIST["stem_stride"],
        "depth": OF_MNIST["depth"] + OF_MNIST["stem_stride"].bit_length() - 1,
    },
    "wide-resnet 10-2": WIDE_RESNET | {"width": 2, "depth": 10},
    "wide-resnet 28-10": WIDE_RESNET | {"width": 10, "depth": 28},
}
MATRIX = {"cpu": 2048, "mps": 2048, "cuda": 8192}  # side of the matrices whose product is the limit
# the paper clamps nothing
LANGEVIN = Langevin(
    MNIST["step_size"], MNIST["noise_std"], MNIST["noise_first"], MNIST["pixel_grad_clip"]
)
OURS = (BlockStem, HalvingConv, FlattenLast, MapHead)
FLAGS = (
    flag("--networks", str, "networks to time", list(NETWORKS)[:3], nargs="+", choices=NETWORKS),
    flag("--batches", positive_int, "images at once", [16, 64, 256, 1024], nargs="+"),
    flag("--steps", positive_int, "Langevin steps K of a run", [1, 5, 20, 100], nargs="+"),
    flag("--rounds", positive_int, "timings of each method, taken by turns", 7),
    flags.DEVICE,
    flag("--compile", bool, "also time our step compiled"),
    flag("--cuda-graph", bool, "also time our chain, compiled or not, as a CUDA graph"),
    flags.OUT_DIR._replace(default="results/speed"),
)

Chains = Callable[[Tensor, int], Tensor]


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """Read a list of arguments, or the command line's."""
    return Parser(__doc__, (("measurement", FLAGS),)).parse(argv)


def paper_chains(model: nn.Module, x: Tensor, steps: int) -> Tensor:
    """Run chains as the paper's published code does: float32, graph and parameters' gradients kept.

    The step is x.data += dlogsumexp/dx + 0.01 * noise. Source: arXiv 1912.03263, algorithm 1, and
    the description of its code; written anew here.
    """
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    x = x.clone().requires_grad_()
    for _ in range(steps):
        likelihood = model(x).logsumexp(1).sum()
        gradient = torch.autograd.grad(likelihood, [x], retain_graph=True)[0]
        x.data += gradient + 0.01 * torch.randn_like(x)
    model.train()
    return x.detach()


def plain_layers(model: nn.Module) -> nn.Module:
    """Return a copy of a network whose layers are those of torch that ours derive from."""
    copied = copy.deepcopy(model)
    for layer in copied.modules():
        if isinstance(layer, OURS):
            layer.__class__ = type(layer).__base__
    return copied.to(memory_format=torch.contiguous_format)


def methods(model: nn.Module, device: torch.device, args: Namespace) -> dict[str, Chains]:
    """Return {name: callable (x, steps)} of every way to run chains that was asked for."""
    now = energy_of(model, pick_precision("auto", device))
    runners = {"ours": run_chains}
    if args.compile:
        runners["ours, compiled"] = fast.Compiled(model).run_chains
    if args.cuda_graph:
        graphs = {
            f"{name}, CUDA graph": fast.in_graphs(fast.Graphs(), chains)
            for name, chains in runners.items()
        }
        runners |= graphs

    def with_runner(chains: fast.Chains, energy: Callable = now) -> Chains:
        return lambda x, steps: chains(energy, x, steps, LANGEVIN, module=model)

    plain = plain_layers(model)
    return {
        **{name: with_runner(chains) for name, chains in runners.items()},
        "ours, float32": with_runner(run_chains, energy_of(model, "float32")),
        "the paper's": lambda x, steps: paper_chains(plain, x, steps),
        "the paper's, on our layers": lambda x, steps: paper_chains(model, x, steps),
    }


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Return how long a call takes."""
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronise()
    start = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - start


def matrix_products(device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Return {precision: callable} of one square matrix product each: the machine's limit."""
    kinds = {"float32": torch.float32}
    if pick_precision("auto", device) == "bf16":
        kinds["bf16"] = torch.bfloat16
    side = MATRIX[device.type]
    factors = {name: torch.randn(2, side, side, device=device).to(kinds[name]) for name in kinds}
    return {name: lambda pair=pair: pair[0] @ pair[1] for name, pair in factors.items()}


def operations(model: nn.Module, x: Tensor) -> float:
    """Return the floating-point operations of one Langevin step per image, forward and backward."""
    with frozen(model), FlopCounterMode(display=False) as counter:
        # backward, because the counter does not know torch.autograd.grad
        marginal_energy(model(x.clone().requires_grad_())).sum().backward()
    return counter.get_total_flops() / len(x)


def time_chains(
    name: str, batch: int, steps: int, args: Namespace, device: torch.device
) -> list[dict[str, Any]]:
    """Time all methods by turns on one network, batch and K; returns a row for each."""
    torch.manual_seed(0)
    shape = NETWORKS[name]
    model, side = build_model(num_classes=10, **shape).to(device), shape["image_size"]
    x = 2 * torch.rand(batch, shape["channels"], side, side, device=device) - 1
    each, work = operations(model, x[:2]), methods(model, device, args)
    limits = matrix_products(device)
    for call in (*work.values(), *work.values()):
        call(x, steps)  # warms up: the first time compiles, the second captures
    taken: dict[str, list[float]] = {name: [] for name in (*work, *limits)}
    for _ in range(args.rounds):
        for method, call in work.items():
            taken[method].append(seconds(lambda call=call: call(x, steps), device))
        for precision, product in limits.items():
            product()
            taken[precision].append(seconds(product, device))
    middle = {name: statistics.median(values) for name, values in taken.items()}
    rates = {precision: 2 * MATRIX[device.type] ** 3 / middle[precision] for precision in limits}
    rows = []
    for method in work:
        ours = method.startswith("ours") and method != "ours, float32"
        limit = rates["bf16" if ours and "bf16" in rates else "float32"]
        time_taken, spread = middle[method], max(taken[method]) - min(taken[method])
        rows.append(
            {
                "network": name,
                "batch": batch,
                "steps": steps,
                "method": method,
                "image_steps_per_second": batch * steps / time_taken,
                "milliseconds_per_step": 1000 * time_taken / steps,
                "spread": spread / time_taken,
                "times_the_papers": middle["the paper's"] / time_taken,
                "share_of_limit": batch * steps / time_taken * each / limit,
                "limit_gflops": limit / 1e9,
            }
        )
    return rows


def markdown(args: Namespace, machine: str, rows: list[dict[str, Any]], given: str) -> str:
    """Return the table."""
    lines = [f"Made by `python benchmarks/sgld_speed.py {given}`, {machine}.", ""]
    columns = ["network", "batch", "K", "method", "ms a step", "spread", "image-steps/s"]
    columns += ["times the paper's", "of the limit"]
    lines += ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for row in rows:
        lines.append(
            f"| {row['network']} | {row['batch']} | {row['steps']} | {row['method']} | "
            f"{row['milliseconds_per_step']:.4g} | {100 * row['spread']:.0f} % | "
            f"{row['image_steps_per_second']:,.0f} | {row['times_the_papers']:.2f} | "
            f"{100 * row['share_of_limit']:.0f} % of {row['limit_gflops']:,.0f} GFLOP/s |"
        )
    return "\n".join(lines) + "\n"


def save_figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw image-steps per second: a column for each network, against the batch and against K.

    The one that is held is the middle of those measured.
    """
    networks = list(dict.fromkeys(row["network"] for row in rows))
    names = list(dict.fromkeys(row["method"] for row in rows))
    values = {name: sorted({row[name] for row in rows}) for name in ("batch", "steps")}
    words = {"batch": "batch", "steps": "K"}
    pairs = (("batch", "steps"), ("steps", "batch"))
    lines = [pair for pair in pairs if len(values[pair[0]]) > 1] or [("batch", "steps")]
    figure, axes = plots.panels_of(len(lines), len(networks), 3.6, 2.7)
    for line, (along, held) in enumerate(lines):
        fixed = values[held][(len(values[held]) - 1) // 2]
        for axis, network in zip(axes[line], networks, strict=True):
            for name, colour in zip(names, itertools.cycle(plots.SERIES_COLOURS), strict=False):
                wanted = (network, name, fixed)
                points = [
                    (row[along], row["image_steps_per_second"])
                    for row in rows
                    if (row["network"], row["method"], row[held]) == wanted
                ]
                style = {"marker": ".", "color": colour, "linewidth": 1.2}
                axis.plot(*zip(*points, strict=True), label=name, **style)
            axis.set(title=f"{network}, {words[held]} {fixed}", xlabel=words[along])
            axis.set(xscale="log", yscale="log")
            axis.set_xticks(values[along], values[along])
            axis.set_xticks([], minor=True)
            axis.grid(alpha=0.3, which="both")
        axes[line, 0].set_ylabel("image-steps per second")
    plots.legend(figure, axes, ncols=1 + len(networks))
    plots.finish(figure, path)


@exits_cleanly
def main(args: Namespace) -> None:
    """Run the script with what `parse` returned."""
    device = pick_device(args.device)
    if args.cuda_graph and device.type != "cuda":
        raise UserError(
            f"--cuda-graph needs a CUDA device, and this is {str(device)!r}: "
            "leave it out, or name another --device"
        )
    where = f"{torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    machine = f"torch {torch.__version__}, {where}"
    folder = Path(args.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    wanted = list(itertools.product(args.networks, args.batches, args.steps))
    for name, batch, steps in tqdm(wanted, disable=None):
        rows += time_chains(name, batch, steps, args, device)
    found = {"machine": machine, "rows": rows}
    (folder / "speed.json").write_text(json.dumps(found, indent=1) + "\n")
    text = markdown(args, machine, rows, shlex.join(sys.argv[1:]))
    (folder / "speed.md").write_text(text)
    save_figure(rows, folder / "speed.png")
    print(text)


if __name__ == "__main__":
    main(parse())
