"""Compiled energies, CUDA graphs and bf16: the chain is the plain one, and where they are not to be had it goes on."""

from argparse import Namespace
from unittest.mock import Mock

import pytest
import torch
from torch import nn

import fast
import parallel
import restarts
import runs
import train_jem
from models import build_model, joint_energy
from sgld import run_chains
from training import Training

CPU = torch.device("cpu")
SETTINGS = {"step_size": 0.1, "noise_std": 0.1, "noise_first": True, "pixel_grad_clip": 5.0, "clamp": (-1, 1)}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def small_cnn(device="cpu"):
    torch.manual_seed(0)
    return build_model("small-cnn", 10, 1, 28, width=8, depth=1, stem_stride=4).to(device)


def chain_of(energy_of, model, steps=5, count=4, generator=None, **more):
    device = next(model.parameters()).device
    start = (2 * torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(0)) - 1).to(device)
    generator = (generator or torch.Generator(device)).manual_seed(1)
    return run_chains(energy_of, start, steps, **SETTINGS, module=model, generator=generator, **more)


def assert_near(chain, plain):
    torch.testing.assert_close(chain, plain, rtol=0, atol=1e-5)  # pixels


def test_a_compiled_energy_gives_the_same_chain_and_sees_that_the_weights_change():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.SiLU())  # little, for it compiles long
    plain = runs.chain_energy(model, CPU, "float32")
    compiled = fast.Compiled(plain, model)
    assert_near(chain_of(compiled, model), chain_of(plain, model))
    before = chain_of(plain, model)
    with torch.no_grad():
        model[1].weight *= 30
    after = chain_of(plain, model)
    assert (after - before).abs().max() > 0.1 and not compiled.failed
    assert_near(chain_of(compiled, model), after)


def test_a_traced_energy_gives_the_same_chain_of_every_network_and_class(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda traced, **_: traced)  # what is compiled, as it is
    labels = torch.tensor([3, 1, 4, 1])
    for model in (small_cnn(), build_model("wide-resnet", 10, 1, 28, width=1, depth=10)):
        plain = runs.chain_energy(model, CPU, "float32", joint_energy)
        compiled = fast.Compiled(plain, model)
        assert_near(chain_of(compiled, model), chain_of(plain, model))
        assert_near(chain_of(compiled, model, labels=labels), chain_of(plain, model, labels=labels))
        assert_near(chain_of(compiled, model, labels=labels, chunk_size=3), chain_of(plain, model, labels=labels))
        assert not compiled.failed


def test_what_a_step_makes_of_the_weights_alone_is_made_once_a_chain(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda traced, **_: traced)
    model = small_cnn()
    compiled = fast.Compiled(runs.chain_energy(model, CPU, "bf16"), model)
    chain_of(compiled, model)
    ((key, (weights_of, rest)),) = compiled.fast.items()
    assert {weight.dtype for weight in weights_of()} == {torch.bfloat16}  # the casts are among it
    counted = Mock(wraps=weights_of)
    compiled.fast[key] = counted, rest
    chain_of(compiled, model, steps=5)
    assert counted.call_count == 1


def test_an_energy_that_cannot_be_compiled_goes_on_as_it_is_and_says_so_once(monkeypatch, capsys):
    def no_compiler(*_, **__):
        def fails(*_):
            raise RuntimeError("no C++ compiler\nand many lines more")

        return fails

    monkeypatch.setattr(torch, "compile", no_compiler)
    model = small_cnn()
    plain = runs.chain_energy(model, CPU, "float32")
    compiled = fast.Compiled(plain, model)
    assert torch.equal(chain_of(compiled, model), chain_of(plain, model))
    assert torch.equal(chain_of(compiled, model, count=3), chain_of(plain, model, count=3))
    assert capsys.readouterr().err == "--compile: cannot compile here (no C++ compiler); going on without\n"


def test_without_a_gpu_the_plain_chain_runs_and_a_line_says_so(capsys):
    model, args = small_cnn(), Namespace(compile=False, cuda_graph=True)
    plain = runs.chain_energy(model, CPU, "float32")
    assert fast.from_flags(args, plain, model, CPU) == (plain, None)
    assert capsys.readouterr().err == "--cuda-graph: that needs a CUDA device; going on without\n"
    assert fast.from_flags(Namespace(compile=False, cuda_graph=None), plain, model, CPU) == (plain, None)
    assert capsys.readouterr().err == ""


def test_graphs_are_the_default_on_one_gpu_and_not_on_several(monkeypatch):
    gpu = torch.device("cuda")
    for flag, ranks, used in ((None, 1, True), (None, 2, False), (True, 2, True), (False, 1, False)):
        monkeypatch.setattr(parallel, "ranks", lambda ranks=ranks: ranks)
        _, graphs = fast.from_flags(Namespace(compile=False, cuda_graph=flag), None, None, gpu)
        assert (graphs is not None) == used


def test_bf16_chains_stay_beside_float32_ones():
    model = small_cnn()
    low, full = (chain_of(runs.chain_energy(model, CPU, precision), model) for precision in ("bf16", "float32"))
    assert 0 < (low - full).abs().max() < 0.01  # pixels; a step's noise is 0.1


@needs_gpu
@pytest.mark.parametrize("steps, graphs_made", [(1, 1), (6, 1), (40, 1), (50, 2)])
def test_a_replayed_chain_is_the_plain_one_with_and_without_classes(steps, graphs_made):
    model, graphs, generator = small_cnn("cuda"), fast.ChainGraphs(), torch.Generator("cuda")
    plain = runs.chain_energy(model, torch.device("cuda"), "bf16", joint_energy)
    for labels in (None, torch.tensor([3, 1, 4, 1], device="cuda")):
        expected = chain_of(plain, model, steps, labels=labels)
        for _ in range(3):  # as it is, captured, and replayed
            assert_near(chain_of(plain, model, steps, labels=labels, generator=generator, graphs=graphs), expected)
    assert not graphs.failed and len(graphs.captured) == 2 * graphs_made


@needs_gpu
def test_a_replayed_chain_goes_on_with_the_generator_and_the_weights_as_they_are():
    model, graphs = small_cnn("cuda"), fast.ChainGraphs()
    plain = runs.chain_energy(model, torch.device("cuda"), "float32")
    found = []
    for chosen in (graphs, None):
        generator, x = torch.Generator("cuda").manual_seed(1), torch.zeros(4, 1, 28, 28, device="cuda")
        for scale in (1.0, 2.0, 0.5):
            with torch.no_grad():
                model.head.weight *= scale
            x = run_chains(plain, x, 3, **SETTINGS, module=model, generator=generator, graphs=chosen)
        found.append((x, generator.get_state()))
    assert_near(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@needs_gpu
def test_an_energy_that_waits_for_the_gpu_runs_as_it_is(capsys):
    model, graphs, generator = small_cnn("cuda"), fast.ChainGraphs(), torch.Generator("cuda")
    plain = runs.chain_energy(model, torch.device("cuda"), "float32")

    def waits(x):
        return plain(x) * float(x.sum() > -1e9)

    for energy_of in (waits, waits, plain):
        assert_near(chain_of(energy_of, model, generator=generator, graphs=graphs), chain_of(plain, model))
    assert graphs.failed and capsys.readouterr().err.startswith("--cuda-graph: cannot capture this (")


@needs_gpu
def test_a_replayed_chain_that_stops_being_finite_is_found_with_its_step():
    graphs = fast.ChainGraphs()

    def cliff(x):
        return torch.where(x.flatten(1).sum(1) < 3, -x.flatten(1).sum(1), torch.inf)

    for _ in range(2):
        with pytest.raises(FloatingPointError, match="step 3 of 25"):
            run_chains(cliff, torch.zeros(2, 1, device="cuda"), 25, 1.0, 0.0, graphs=graphs)


@needs_gpu
@pytest.mark.parametrize("more", [[], ["--p-xy-weight", "0.1"], ["--sam-rho", "0.05", "--max-grad-norm", "1"]])
def test_a_replayed_iteration_is_the_plain_one_after_a_rollback_too(tmp_path, digits, more):
    found = []
    for flags in (["--no-cuda-graph"], ["--cuda-graph"]):
        args = train_jem.parse_args(
            ["--dataset", "digits", "--restart-parts", "3", "--clean-share", "0.5", "--adversarial-eps", "0.1",
             "--augment", "1", "--first-steps", "2", "--steps", "3", "--precision", "float32", "--optimizer", "sgd",
             "--lr", "0.01", "--warmup-steps", "0", "--epochs", "1", *more, *flags]
        )  # fmt: skip
        device = torch.device("cuda")
        run = Training(args, digits, tmp_path, "jem", device)
        restart = restarts.from_flags(args, digits, device)
        buffer = train_jem.ReplayBuffer(500, restart, 0.1, device, torch.Generator(device).manual_seed(1))
        for number, (images, labels) in zip(range(9), run.batches(), strict=False):
            run.done = number / 9  # from two to three steps
            if number == 6:
                buffer.load_state_dict(buffer.state_dict())  # in other memory
            train_jem.iterate(run, buffer, images, labels)
        found.append([*run.model.parameters(), buffer.images, buffer.ages, run.generator.get_state(), *run.log.sums.values()])
    assert run.iterations.captured and not run.iterations.failed
    for captured, plain in zip(*found, strict=True):
        torch.testing.assert_close(captured, plain, rtol=1e-3, atol=1e-4)


@needs_gpu
def test_a_compiled_and_captured_chain_stays_beside_the_plain_one():
    model, graphs, generator = small_cnn("cuda"), fast.ChainGraphs(), torch.Generator("cuda")
    for precision, tolerance in (("float32", 1e-3), ("bf16", 0.01)):
        plain = runs.chain_energy(model, torch.device("cuda"), precision)
        compiled = fast.Compiled(plain, model)
        for _ in range(2):
            chain = chain_of(compiled, model, generator=generator, graphs=graphs)
            torch.testing.assert_close(chain, chain_of(plain, model), rtol=0, atol=tolerance)  # pixels
        assert not compiled.failed and not graphs.failed and graphs.captured
