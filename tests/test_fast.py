"""Compiled steps, CUDA graphs and bf16: the chains are the plain ones, with a plain fallback."""

from argparse import Namespace
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from conftest import generator
from torch import nn
from torch.utils._pytree import tree_leaves

from sgld_nrg import train_jem
from sgld_nrg.models import build_model, energy_of
from sgld_nrg.sgld import Langevin, run_chains
from sgld_nrg.support import fast, restarts
from sgld_nrg.support.commands import parse
from sgld_nrg.support.parallel import Alone
from sgld_nrg.support.training import Setup, Training

CPU = torch.device("cpu")
LANGEVIN = Langevin(0.1, 0.1, noise_first=True, pixel_grad_clip=5.0, clamp=(-1, 1))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def small_cnn(device="cpu"):
    torch.manual_seed(0)
    return build_model("small-cnn", 10, 1, 28, width=8, depth=1, stem_stride=4).to(device)


def chain_of(energy, model, steps=5, count=4, source=None, chains=run_chains, **more):
    """Run chains from the same start with the same noise; source: a generator to take it from."""
    device = next(model.parameters()).device
    start = (2 * torch.rand(count, 1, 28, 28, generator=generator()) - 1).to(device)
    source = (source or torch.Generator(device)).manual_seed(1)
    return chains(energy, start, steps, LANGEVIN, module=model, generator=source, **more)


def assert_near(chain, plain):
    torch.testing.assert_close(chain, plain, rtol=0, atol=1e-5)  # pixels


@pytest.mark.slow
def test_a_compiled_step_gives_the_same_chain_and_sees_that_the_weights_change():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.SiLU())  # compiles in little time
    energy, compiled = energy_of(model), fast.Compiled(model)
    before = chain_of(energy, model)
    assert_near(chain_of(energy, model, chains=compiled.run_chains), before)
    with torch.no_grad():
        model[1].weight *= 30
    after = chain_of(energy, model)
    assert (after - before).abs().max() > 0.1 and not compiled.failed
    assert_near(chain_of(energy, model, chains=compiled.run_chains), after)


@pytest.fixture
def uncompiled(monkeypatch):
    """Make torch.compile leave what it is given, a traced step, as it is."""
    monkeypatch.setattr(torch, "compile", lambda traced, **_: traced)


def test_a_traced_step_gives_the_same_chain_of_every_network_and_class(uncompiled):
    labels = torch.tensor([3, 1, 4, 1])
    for model in (small_cnn(), build_model("wide-resnet", 10, 1, 28, width=1, depth=10)):
        energy, compiled = energy_of(model), fast.Compiled(model)
        of_classes = chain_of(energy, model, labels=labels)
        for more, plain in (
            ({}, chain_of(energy, model)),
            ({"labels": labels}, of_classes),
            ({"labels": labels, "chunk_size": 3}, of_classes),
        ):
            assert_near(chain_of(energy, model, chains=compiled.run_chains, **more), plain)
        assert compiled.fast and not compiled.failed


def test_a_traced_step_sees_that_the_weights_change(uncompiled):
    model = small_cnn()
    energy, compiled = energy_of(model), fast.Compiled(model)
    before = chain_of(energy, model)
    assert_near(chain_of(energy, model, chains=compiled.run_chains), before)
    with torch.no_grad():
        model.head.weight *= 100
    after = chain_of(energy, model)
    assert (after - before).abs().max() > 0.1 and not compiled.failed
    assert_near(chain_of(energy, model, chains=compiled.run_chains), after)


def test_what_a_step_makes_of_the_weights_alone_is_made_once_a_chain(uncompiled):
    model = small_cnn()
    energy, compiled = energy_of(model, "bf16"), fast.Compiled(model)
    chain_of(energy, model, chains=compiled.run_chains)
    ((key, (weights_of, rest)),) = compiled.fast.items()
    assert {weight.dtype for weight in weights_of()} == {torch.bfloat16}  # the casts are among it
    counted = Mock(wraps=weights_of)
    compiled.fast[key] = counted, rest
    chain_of(energy, model, steps=5, chains=compiled.run_chains)
    assert counted.call_count == 1


def test_a_step_that_cannot_be_compiled_goes_on_as_it_is_and_says_so_once(monkeypatch, capsys):
    def no_compiler(*_, **__):
        def fails(*_):
            raise RuntimeError("no C++ compiler\nand many lines more")

        return fails

    monkeypatch.setattr(torch, "compile", no_compiler)
    model = small_cnn()
    energy, compiled = energy_of(model), fast.Compiled(model)
    for count in (4, 3):
        found = chain_of(energy, model, count=count, chains=compiled.run_chains)
        assert torch.equal(found, chain_of(energy, model, count=count))
    said = "--compile: cannot compile here (no C++ compiler); going on without\n"
    assert capsys.readouterr().err == said


def test_the_flags_choose_how_chains_run():
    model = small_cnn()
    assert fast.chains_from(Namespace(compile=False), model) is run_chains
    compiled = fast.chains_from(Namespace(compile=True), model).__self__
    assert isinstance(compiled, fast.Compiled) and compiled.module is model


def test_without_a_gpu_the_plain_chain_runs_and_a_line_says_so(capsys):
    assert fast.graphs_from(Namespace(cuda_graph=True), CPU, 1) is None
    said = "--cuda-graph: that needs a CUDA device; going on without\n"
    assert capsys.readouterr().err == said
    assert fast.graphs_from(Namespace(cuda_graph=None), CPU, 1) is None
    assert capsys.readouterr().err == ""
    assert fast.in_graphs(None, run_chains) is run_chains


def test_graphs_are_the_default_on_one_gpu_and_not_on_several():
    cases = ((None, 1, True), (None, 2, False), (True, 2, True), (False, 1, False))
    for flag, ranks, used in cases:
        graphs = fast.graphs_from(Namespace(cuda_graph=flag), torch.device("cuda"), ranks)
        assert (graphs is not None) == used


class PlainGraphs:
    """Stands in for fast.Graphs without a GPU: calls each function; results hold until the next."""

    def __init__(self):
        self.keys, self.lent = [], []

    def run(self, key, function, inputs, generator):
        results = function(*inputs)
        for value in self.lent:
            value.fill_(torch.nan)  # as a replay writes over what the one before it returned
        self.keys.append(key)
        self.lent = [value for value in tree_leaves(results) if value.is_floating_point()]
        return results


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("steps, pieces", [(1, [1]), (20, [20]), (45, [20, 20, 5])])
def test_chains_in_pieces_are_exactly_the_plain_ones(steps, pieces, with_labels):
    model, graphs, found, expected = small_cnn(), PlainGraphs(), [], []
    energy, labels = energy_of(model), torch.tensor([3, 1, 4, 1]) if with_labels else None
    source, plain_source = generator(), generator()
    chains = fast.in_graphs(graphs, run_chains)
    for more in ({}, {"check": False}, {"chunk_size": 3}):
        more = {"labels": labels, **more}
        found.append(chain_of(energy, model, steps, source=source, chains=chains, **more))
        expected.append(chain_of(energy, model, steps, source=plain_source, **more))
        assert torch.equal(source.get_state(), plain_source.get_state())
    assert all(map(torch.equal, found, expected))
    assert [key[0] for key in graphs.keys] == pieces * 3
    assert len(set(graphs.keys)) == len(set(pieces)) * 3  # like pieces share a graph, no others


def test_chains_that_are_watched_run_without_graphs():
    model, graphs, seen = small_cnn(), PlainGraphs(), []
    energy, chains = energy_of(model), fast.in_graphs(graphs, run_chains)
    watch = {"callback": lambda number, x, energies: seen.append(number)}
    assert torch.equal(chain_of(energy, model, chains=chains, **watch), chain_of(energy, model))
    trajectory = chain_of(energy, model, chains=chains, return_trajectory=True)
    assert torch.equal(trajectory, chain_of(energy, model, return_trajectory=True))
    assert seen == list(range(5)) and not graphs.keys


def cliff(x):
    """Return energies that chains climb in steps of 1 from 0 on, not finite from 3 on."""
    height = x.flatten(1).sum(1)
    return (-height).masked_fill(height >= 3, torch.inf)


@pytest.mark.parametrize("first, step", [(0.0, 3), (-20.0, 23), (-45.0, 48)])
def test_chains_in_pieces_that_stop_being_finite_are_found_with_their_step(first, step):
    chains = fast.in_graphs(PlainGraphs(), run_chains)
    with pytest.raises(FloatingPointError, match=f"energy is not finite at.* step {step} of 50"):
        chains(cliff, torch.full((2, 1), first), 50, Langevin(1.0, 0.0))


def test_bf16_chains_stay_beside_float32_ones():
    model = small_cnn()
    low, full = (chain_of(energy_of(model, precision), model) for precision in ("bf16", "float32"))
    assert 0 < (low - full).abs().max() < 0.01  # pixels; a step's noise is 0.1


@needs_gpu
@pytest.mark.parametrize("steps, graphs_made", [(1, 1), (6, 1), (40, 1), (50, 2)])
def test_a_replayed_chain_is_the_plain_one_with_and_without_classes(steps, graphs_made):
    model, graphs, source = small_cnn("cuda"), fast.Graphs(), torch.Generator("cuda")
    energy, chains = energy_of(model, "bf16"), fast.in_graphs(graphs, run_chains)
    for labels in (None, torch.tensor([3, 1, 4, 1], device="cuda")):
        expected = chain_of(energy, model, steps, labels=labels)
        for _ in range(3):  # as it is, captured, and replayed
            found = chain_of(energy, model, steps, source=source, chains=chains, labels=labels)
            assert_near(found, expected)
    assert not graphs.failed and len(graphs.captured) == 2 * graphs_made


@needs_gpu
def test_a_replayed_chain_goes_on_with_the_generator_and_the_weights_as_they_are():
    model, graphs = small_cnn("cuda"), fast.Graphs()
    energy, found = energy_of(model), []
    for chains in (fast.in_graphs(graphs, run_chains), run_chains):
        source = torch.Generator("cuda").manual_seed(1)
        x = torch.zeros(4, 1, 28, 28, device="cuda")
        for scale in (1.0, 2.0, 0.5):
            with torch.no_grad():
                model.head.weight *= scale
            x = chains(energy, x, 3, LANGEVIN, module=model, generator=source)
        found.append((x, source.get_state()))
    assert graphs.captured and not graphs.failed
    assert_near(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@needs_gpu
def test_an_energy_that_waits_for_the_gpu_runs_as_it_is(capsys):
    model, graphs, source = small_cnn("cuda"), fast.Graphs(), torch.Generator("cuda")
    plain, chains = energy_of(model), fast.in_graphs(graphs, run_chains)

    def waits(x):
        return plain(x) * float(x.sum() > -1e9)

    for energy in (waits, waits, plain):
        found = chain_of(energy, model, source=source, chains=chains)
        assert_near(found, chain_of(plain, model))
    said = "--cuda-graph: cannot capture this ("
    assert graphs.failed and capsys.readouterr().err.startswith(said)


@needs_gpu
def test_a_replayed_chain_that_stops_being_finite_is_found_with_its_step():
    graphs = fast.Graphs()
    chains = fast.in_graphs(graphs, run_chains)
    for _ in range(3):  # as it is, captured, and replayed
        with pytest.raises(FloatingPointError, match="step 3 of 25"):
            chains(cliff, torch.zeros(2, 1, device="cuda"), 25, Langevin(1.0, 0.0))
    assert graphs.captured and not graphs.failed


ITERATIONS = (
    "--dataset digits --restart-parts 3 --clean-share 0.5 --adversarial-eps 0.1 --augment 1 "
    "--first-steps 2 --steps 3 --precision float32 --optimizer sgd --lr 0.01 "
    "--warmup-iterations 0 --epochs 1"
)


def nine_iterations(run):
    """Do nine iterations of a training, from two to three steps; return what they lead to."""
    args, device = run.args, run.device
    restart = restarts.restart_from_flags(args, run.dataset, device)
    source = torch.Generator(device).manual_seed(1)
    buffer = train_jem.ReplayBuffer(500, restart, 0.1, device, source)
    clip, clamp = args.pixel_grad_clip or None, (-args.clamp, args.clamp) if args.clamp else None
    langevin = Langevin(args.step_size, args.noise_std, args.noise_first, clip, clamp)
    for number, (images, labels) in zip(range(9), run.batches(), strict=False):
        run.progress = number / 9
        if number == 6:
            buffer.load_state_dict(buffer.state_dict())  # in other memory
        steps = train_jem.steps_now(run.settings, run.progress)
        work = partial(train_jem.iteration, run, buffer, langevin, steps)
        key = (steps, run.rollbacks, buffer.images.data_ptr())
        run.update(run.replayed(key, work, images, labels))
    sums = run.journal.log.sums.values()
    weights = [parameter.detach() for parameter in run.model.parameters()]
    return [*weights, buffer.images, buffer.ages, run.generator.get_state(), *sums]


@pytest.mark.parametrize("more", [[], ["--p-xy-weight", "0.1"], ["--max-grad-norm", "1"]])
def test_an_iteration_through_graphs_is_exactly_the_plain_one(tmp_path, digits, more):
    args = parse("train_jem", [*ITERATIONS.split(), "--width", "8", *more])
    found, graphs = [], PlainGraphs()
    for chosen in (graphs, None):
        run = Training(args, Setup(digits, tmp_path, CPU, Alone()), "jem")
        run.graphs = chosen
        found.append(nine_iterations(run))
    assert len(graphs.keys) == 9 and len(set(graphs.keys)) == 3  # two and three steps, then moved
    assert all(map(torch.equal, *found))


@needs_gpu
@pytest.mark.parametrize("more", [[], ["--p-xy-weight", "0.1"], ["--max-grad-norm", "1"]])
def test_a_replayed_iteration_is_the_plain_one_after_a_rollback_too(tmp_path, digits, more):
    found, device = [], torch.device("cuda")
    for flag in ("--no-cuda-graph", "--cuda-graph"):
        args = parse("train_jem", [*ITERATIONS.split(), *more, flag])
        run = Training(args, Setup(digits, tmp_path, device, Alone()), "jem")
        found.append(nine_iterations(run))
    assert run.graphs.captured and not run.graphs.failed
    for plain, captured in zip(*found, strict=True):
        torch.testing.assert_close(captured, plain, rtol=1e-3, atol=1e-4)


@needs_gpu
@pytest.mark.slow
def test_a_compiled_and_captured_chain_stays_beside_the_plain_one():
    model, graphs, source = small_cnn("cuda"), fast.Graphs(), torch.Generator("cuda")
    for precision, tolerance in (("float32", 1e-3), ("bf16", 0.01)):
        energy, compiled = energy_of(model, precision), fast.Compiled(model)
        chains = fast.in_graphs(graphs, compiled.run_chains)
        for _ in range(2):
            chain = chain_of(energy, model, source=source, chains=chains)
            plain = chain_of(energy, model)
            torch.testing.assert_close(chain, plain, rtol=0, atol=tolerance)  # pixels
        assert not compiled.failed and not graphs.failed and graphs.captured
