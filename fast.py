"""Faster ways to run the chains of sgld.py: the energy compiled, and the whole chain as one CUDA graph.

Both give the plain chain, to the rounding of the network's arithmetic, and where one is not to be had the plain one goes on.
"""

from __future__ import annotations

import sys

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from cli import first_line
from sgld import energy_and_gradient, frozen

PIECE = 20  # Langevin steps in one CUDA graph, at most: a longer chain is replayed piece by piece


def from_flags(args, energy_of, module, device):
    """Return (energy, graphs) as --compile and --cuda-graph ask for them, for sgld.run_chains.

    energy_of: callable as run_chains wants it. module: the torch.nn.Module behind it. device: torch.device of the chains.
    """
    graphs = ChainGraphs() if args.cuda_graph and device.type == "cuda" else None
    if args.cuda_graph and graphs is None:
        _say("--cuda-graph", "that needs a CUDA device")
    return Compiled(energy_of, module) if args.compile else energy_of, graphs


def _say(flag, why):
    print(f"{flag}: {why}; going on without", file=sys.stderr, flush=True)


class Compiled:
    """An energy whose value and gradient are traced into one graph, without autograd, and compiled by torch.compile.

    energy_of: callable as sgld.run_chains wants it. module: the torch.nn.Module behind it; a change of its weights in place
    is seen. Each shape of the chains compiles anew, which takes up to a minute.
    """

    def __init__(self, energy_of, module):
        self.plain, self.module = energy_of, module
        self.fast, self.failed = {}, False

    def __call__(self, x, labels=None):
        """Return E(x), or E(x, y) where labels are given: (N,), as the plain energy."""
        return self.plain(x) if labels is None else self.plain(x, labels)

    def with_gradient(self, x, labels=None):
        """Return E, shape (N,), and dE/dx, shaped like x; see sgld.energy_and_gradient."""
        inputs = (x,) if labels is None else (x, labels)
        key = tuple((part.shape, part.dtype, part.stride()) for part in inputs)
        if key not in self.fast:
            self.fast[key] = self._compile(*inputs)
        with torch.no_grad():
            return self.fast[key](*inputs)

    def _compile(self, *inputs):
        """Return the compiled function of these inputs, or the plain one where that fails."""

        def plain(*inputs):
            return energy_and_gradient(self.plain, *inputs)

        if self.failed:
            return plain
        try:
            with frozen(self.module):
                fast = torch.compile(make_fx(plain)(*inputs), dynamic=False)
                with torch.no_grad():
                    fast(*inputs)
            return fast
        except Exception as error:  # no C++ compiler, no Triton, an operation that it does not know: each raises its own
            _say("--compile", f"cannot compile here ({first_line(error)})")
            self.failed = True
            return plain


class ChainGraphs:
    """Chains on a GPU as CUDA graphs: captured where a shape or setting is first asked for, then replayed.

    Of a small network the GPU runs a step's kernels in less time than the host needs to launch them one by one; a graph is
    launched at once. The chains are those of the plain loop, bit for bit where the kernels are deterministic.
    """

    def __init__(self):
        self.captured, self.pool, self.failed = {}, None, False

    def run(self, loop, x, labels, steps, generator, settings):
        """Return what loop(x, labels, steps) does: the chains' ends (N, ...) and the energies (N,) of each step, in a list.

        settings: whatever else loop depends on, hashable. generator: the torch.Generator that loop draws from, or None for
        the device's own. A loop that cannot be captured, because it waits for the GPU, runs as it is.
        """
        energies = []
        for start in range(0, steps, PIECE):
            count = min(PIECE, steps - start)
            inputs = (x,) if labels is None else (x, labels)
            key = (count, generator, settings, *((part.shape, part.dtype) for part in inputs))
            if key not in self.captured and not self.failed:
                self._capture(key, loop, x, labels, count, generator)
            x, found = (loop if self.failed else self.captured[key])(x, labels, count)
            energies += found
        return x, energies

    def _capture(self, key, loop, x, labels, steps, generator):
        """Capture a piece of a chain; where that fails, say so and remember it."""
        default = torch.cuda.default_generators[x.device.index]
        generator = generator or default
        states = [(each, each.get_state()) for each in (default, generator)]
        try:
            self.captured[key] = self._graph(loop, x.clone(), None if labels is None else labels.clone(), steps, generator)
        except RuntimeError as error:
            _say("--cuda-graph", f"cannot capture the chain ({first_line(error)})")
            self.failed = True
        for each, state in states:  # the draws of the warming up are drawn again
            if self.failed:  # and a generator that a capture was broken off with takes no set_state
                fresh = torch.Generator(x.device)
                fresh.set_state(state)
                each.graphsafe_set_state(fresh.graphsafe_get_state())
            else:
                each.set_state(state)

    def _graph(self, loop, static_x, static_labels, steps, generator):
        """Return a callable (x, labels, steps) that replays loop on copies of its arguments."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loop(static_x, static_labels, min(steps, 2))  # whatever is set up in a first call, compiling too, is set up here
        torch.cuda.current_stream().wait_stream(side)
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(generator)
        with torch.cuda.graph(graph, pool=self.pool):
            ends, energies = loop(static_x, static_labels, steps)

        def replay(x, labels, steps):
            static_x.copy_(x)
            if labels is not None:
                static_labels.copy_(labels)
            graph.replay()
            return ends.clone(), list(torch.stack(energies))  # the next replay, of whichever graph, overwrites them

        return replay
