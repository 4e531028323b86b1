"""Faster ways to run the chains of sgld.py and the iterations of train_jem.py.

Compiled steps and CUDA graphs: both give the plain result, to the rounding of the network's
arithmetic, and fall back to the plain version if unavailable.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from sgld_nrg.sgld import Energy, Langevin, check_finite, frozen, langevin_step, run_chains
from sgld_nrg.support.errors import first_line

PIECE = 20  # Langevin steps in one CUDA graph, at most: a longer chain is replayed piece by piece

Chains = Callable[..., Tensor]  # called like sgld.run_chains


def _say(flag: str, why: str) -> None:
    print(f"{flag}: {why}; going on without", file=sys.stderr, flush=True)


def chains_from(args: Namespace, module: nn.Module) -> Chains:
    """Return what runs the chains as --compile asks for it: sgld.run_chains or its like."""
    return Compiled(module).run_chains if args.compile else run_chains


def graphs_from(args: Namespace, device: torch.device, ranks: int) -> Graphs | None:
    """Return the CUDA graphs that --cuda-graph asks for, by default on a single GPU, or None."""
    wanted = ranks == 1 if args.cuda_graph is None else args.cuda_graph
    if wanted and device.type == "cuda":
        return Graphs()
    if args.cuda_graph:
        _say("--cuda-graph", "that needs a CUDA device")
    return None


class Compiled:
    """Chains whose Langevin step is traced into one graph, without autograd, and compiled.

    What the step makes of the weights alone, such as their casts, is taken out of it and done once
    a chain. module: the network behind the energies; a change of its weights in place is seen by
    the next chain. Each shape of the chains compiles anew, which takes up to a minute.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.fast: dict[Hashable, tuple[Callable, Callable]] = {}
        self.failed = False

    def run_chains(self, *arguments: Any, **settings: Any) -> Tensor:
        """Run chains as `sgld.run_chains` does."""
        return run_chains(*arguments, **settings, step=partial(self._step, {}))

    def _step(
        self,
        made: dict[Hashable, Any],
        energy: Energy,
        x: Tensor,
        langevin: Langevin,
        noise: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Take a step as `sgld.langevin_step` does; made: what was made of the weights, by key."""
        named = (("x", x), ("noise", noise), ("labels", labels))
        given: dict[str, Any] = {name: part for name, part in named if part is not None}
        layout = ((k, part.shape, part.dtype, part.stride()) for k, part in given.items())
        key = (energy, langevin, *layout)
        plain = partial(langevin_step, energy, langevin=langevin)
        if key not in self.fast and not self.failed:
            self._compile(key, plain, given)
        if self.failed:
            return plain(**given)
        weights_of, rest = self.fast[key]
        with torch.no_grad():
            if key not in made:
                made[key] = weights_of()
            return rest(*given.values(), *made[key])

    def _compile(self, key: Hashable, plain: Callable, given: dict[str, Tensor]) -> None:
        """Compile the step of such inputs; if that fails, say so and remember it."""

        def step(*values: Tensor) -> tuple[Tensor, Tensor]:
            return plain(**dict(zip(given, values, strict=True)))

        try:
            with frozen(self.module):
                weights_of, rest = _split(make_fx(step)(*given.values()))
                rest = torch.compile(rest, dynamic=False)
                with torch.no_grad():
                    rest(*given.values(), *weights_of())
            self.fast[key] = weights_of, rest
        except Exception as error:  # no compiler, no Triton, an unknown operation: each its own
            _say("--compile", f"cannot compile here ({first_line(error)})")
            self.failed = True


def _split(traced: torch.fx.GraphModule) -> tuple[Callable, Callable]:
    """Cut a traced function in two: it is rest(*inputs, *weights_of()), weights_of() has none."""
    first, rest = torch.fx.Graph(), torch.fx.Graph()
    early: dict[torch.fx.Node, torch.fx.Node] = {}
    late: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in traced.graph.nodes:
        known = bool(node.all_input_nodes) and all(part in early for part in node.all_input_nodes)
        if node.op == "get_attr" or (node.op == "call_function" and known):
            early[node] = first.node_copy(node, early.__getitem__)
        elif node.op == "placeholder":
            late[node] = rest.node_copy(node)
    crossing = [node for node in early if any(user not in early for user in node.users)]
    first.output(tuple(early[node] for node in crossing))
    late |= {node: rest.placeholder(node.name) for node in crossing}
    for node in traced.graph.nodes:
        if node not in early and node not in late:
            late[node] = rest.node_copy(node, late.__getitem__)
    return torch.fx.GraphModule(traced, first), torch.fx.GraphModule(traced, rest)


class Graphs:
    """Functions of tensors as CUDA graphs: run plainly at first, captured, then replayed.

    The GPU runs a small network's kernels in less time than the host needs to launch them one by
    one; a graph is launched at once. A function that cannot be captured, because it waits for the
    GPU, runs as it is, and so does all after it.
    """

    def __init__(self) -> None:
        self.seen: set[Hashable] = set()
        self.captured: dict[Hashable, Any] = {}
        self.pool: Any = None
        self.failed = False

    def run(
        self,
        key: Hashable,
        function: Callable,
        inputs: Sequence[Tensor],
        generator: torch.Generator | None,
    ) -> Any:
        """Return function(*inputs): tensors, in tuples, lists and dicts, kept until the next call.

        key: the same for calls that differ in the inputs' values alone. inputs: on one GPU.
        generator: what the function draws from, or None for the device's own; it goes on as it
        would without a graph.
        """
        if self.failed:
            return function(*inputs)
        if key not in self.seen:
            self.seen.add(key)
            return self._beside(function, inputs)
        if key not in self.captured:
            self._capture(key, function, inputs, generator)
            if self.failed:
                return function(*inputs)
        places, graph, results = self.captured[key]
        for place, value in zip(places, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        return results

    def _beside(self, function: Callable, inputs: Sequence[Tensor]) -> Any:
        """Run a function on a stream of its own, which sets things up as a capture wants them."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            results = function(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        return results

    def _capture(
        self,
        key: Hashable,
        function: Callable,
        inputs: Sequence[Tensor],
        generator: torch.Generator | None,
    ) -> None:
        """Capture a function on copies of its inputs; if that fails, say so and remember it."""
        default = torch.cuda.default_generators[inputs[0].device.index]
        generator = generator or default
        states = [(each, each.get_state()) for each in (default, generator)]
        places, graph = [value.clone() for value in inputs], torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph.register_generator_state(generator)
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                results = function(*places)
            self.captured[key] = places, graph, results
        except RuntimeError as error:
            _say("--cuda-graph", f"cannot capture this ({first_line(error)})")
            self.failed = True
            for each, state in states:  # after a broken capture a generator takes no set_state
                fresh = torch.Generator(inputs[0].device)
                fresh.set_state(state)
                each.graphsafe_set_state(fresh.graphsafe_get_state())


def in_graphs(graphs: Graphs | None, chains: Chains) -> Chains:
    """Return what runs chains as CUDA graphs, or `chains` itself without graphs.

    The result is called like `sgld.run_chains`, which `chains` is or is like. Chains that are
    watched, by callback or return_trajectory, run without graphs.
    """
    if graphs is None:
        return chains

    def captured(
        energy: Energy,
        x: Tensor,
        steps: int,
        langevin: Langevin,
        *,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
        check: bool = True,
        **rest: Any,
    ) -> Tensor:
        drawn = {"generator": generator, **rest}
        watched = rest.get("callback") is not None or rest.get("return_trajectory")
        if watched or steps < 1:
            return chains(energy, x, steps, langevin, labels=labels, check=check, **drawn)

        def piece(count: int, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, list]:
            seen: list[Tensor] = []  # a graph cannot look at its energies: it hands them out
            watch = (lambda number, x, energies: seen.append(energies)) if check else None
            settings = {**drawn, "labels": labels, "callback": watch, "check": False}
            return chains(energy, x, count, langevin, **settings), seen

        found: list[Tensor] = []
        for start in range(0, steps, PIECE):
            count = min(PIECE, steps - start)
            inputs = (x,) if labels is None else (x, labels)
            shapes = ((part.shape, part.dtype) for part in inputs)
            key = (count, generator, energy, langevin, check, rest.get("chunk_size"), *shapes)
            x, energies = graphs.run(key, partial(piece, count), inputs, generator)
            x = x.clone()
            found += torch.stack(energies) if energies else []
        if check:
            check_finite(found, x)
        return x

    return captured
