"""Faster ways to run the chains of sgld.py and the iterations of train_jem.py: compiled steps, and CUDA graphs.

Both give the plain result, to the rounding of the network's arithmetic, and where one is not to be had it goes on without.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch.fx.experimental.proxy_tensor import make_fx

import parallel
from cli import first_line
from sgld import chain_step, frozen

PIECE = 20  # Langevin steps in one CUDA graph, at most: a longer chain is replayed piece by piece


def from_flags(args, energy_of, module, device):
    """Return (energy, graphs) as --compile and --cuda-graph ask for them, for sgld.run_chains.

    energy_of: callable as run_chains wants it. module: the torch.nn.Module behind it. device: torch.device of the chains.
    """
    wanted = parallel.ranks() == 1 if args.cuda_graph is None else args.cuda_graph
    graphs = ChainGraphs() if wanted and device.type == "cuda" else None
    if args.cuda_graph and graphs is None:
        _say("--cuda-graph", "that needs a CUDA device")
    return Compiled(energy_of, module) if args.compile else energy_of, graphs


def _say(flag, why):
    print(f"{flag}: {why}; going on without", file=sys.stderr, flush=True)


class Compiled:
    """An energy whose whole Langevin step is traced into one graph, without autograd, and compiled by torch.compile.

    What the step makes of the weights alone, such as their casts, is taken out of it and done once a chain.

    energy_of: callable as sgld.run_chains wants it. module: the torch.nn.Module behind it; a change of its weights in place
    is seen by the next chain. Each shape of the chains compiles anew, which takes up to a minute.
    """

    def __init__(self, energy_of, module):
        self.plain, self.module = energy_of, module
        self.fast, self.failed = {}, False

    def __call__(self, x, labels=None):
        """Return E(x), or E(x, y) where labels are given: (N,), as the plain energy."""
        return self.plain(x) if labels is None else self.plain(x, labels)

    def stepper(self, **settings):
        """Return what takes the steps of one run of chains: a callable like sgld.chain_step with these settings."""
        plain, made = partial(chain_step, self, **settings), {}  # made: the compiled steps with what they need of the weights

        def step(x, noise=None, labels=None):
            given = {name: part for name, part in (("x", x), ("noise", noise), ("labels", labels)) if part is not None}
            layout = ((name, part.shape, part.dtype, part.stride()) for name, part in given.items())
            key = (*settings.values(), *layout)
            if key not in self.fast and not self.failed:
                self._compile(key, plain, given)
            if self.failed:
                return plain(**given)
            weights_of, rest = self.fast[key]
            with torch.no_grad():
                if key not in made:
                    made[key] = weights_of()
                return rest(*given.values(), *made[key])

        return step

    def _compile(self, key, plain, given):
        """Compile the step of such inputs, {name: tensor}; where that fails, say so and remember it."""

        def step(*values):
            return plain(**dict(zip(given, values, strict=True)))

        try:
            with frozen(self.module):
                weights_of, rest = _split(make_fx(step)(*given.values()))
                rest = torch.compile(rest, dynamic=False)
                with torch.no_grad():
                    rest(*given.values(), *weights_of())
            self.fast[key] = weights_of, rest
        except Exception as error:  # no C++ compiler, no Triton, an operation that it does not know: each raises its own
            _say("--compile", f"cannot compile here ({first_line(error)})")
            self.failed = True


def _split(traced):
    """Cut a traced function in two, (weights_of, rest): it is rest(*inputs, *weights_of()), and weights_of takes no inputs."""
    first, rest, early, late = torch.fx.Graph(), torch.fx.Graph(), {}, {}
    for node in traced.graph.nodes:
        known = node.op == "call_function" and node.all_input_nodes and all(part in early for part in node.all_input_nodes)
        if node.op == "get_attr" or known:
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
    """Functions of tensors as CUDA graphs: run as they are when first asked for, captured the second time, then replayed.

    Of a small network the GPU runs the kernels in less time than the host needs to launch them one by one; a graph is
    launched at once. A function that cannot be captured, because it waits for the GPU, runs as it is, and so does all after it.
    """

    def __init__(self):
        self.seen, self.captured, self.pool, self.failed = set(), {}, None, False

    def run(self, key, function, inputs, generator):
        """Return function(*inputs): tensors, in tuples, lists and dicts, that hold until the next call.

        key: hashable; the same for calls that differ in the inputs' values alone. inputs: tensors on one GPU. generator: the
        torch.Generator that the function draws from, or None for the device's own; it goes on as it would without a graph.
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

    def _beside(self, function, inputs):
        """Run a function on a stream of its own, which sets up what a first call sets up as a capture wants it."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            results = function(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        return results

    def _capture(self, key, function, inputs, generator):
        """Capture a function on copies of its inputs; where that fails, say so and remember it."""
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
            for each, state in states:  # a generator that a capture was broken off with takes no set_state
                fresh = torch.Generator(inputs[0].device)
                fresh.set_state(state)
                each.graphsafe_set_state(fresh.graphsafe_get_state())


class ChainGraphs(Graphs):
    """Chains as CUDA graphs: those of the plain loop, bit for bit where the kernels are deterministic."""

    def chains(self, loop, x, labels, steps, generator, settings):
        """Return what loop(x, labels, steps) does: the chains' ends (N, ...) and a list of energies (N,), which may be empty.

        settings: whatever else loop depends on, hashable. generator: as in `run`.
        """
        energies = []
        for start in range(0, steps, PIECE):
            count = min(PIECE, steps - start)
            inputs = (x,) if labels is None else (x, labels)
            key = (count, generator, settings, *((part.shape, part.dtype) for part in inputs))

            def piece(x, labels=None, count=count):
                return loop(x, labels, count)

            x, found = self.run(key, piece, inputs, generator)
            x = x.clone()
            energies += torch.stack(found) if found else []
        return x, energies
