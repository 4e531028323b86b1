"""The sampler: exact and statistical tests, none of which knows our networks."""

import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, generator
from torch import nn

from sgld_nrg.sgld import Langevin, energy_and_gradient, frozen, langevin_step, run_chains


def quadratic(curvature):
    return lambda x: curvature * x.square().flatten(1).sum(1) / 2


class NetworkEnergy(nn.Module):
    """A small network with a part that behaves differently in training: dropout."""

    def __init__(self):
        super().__init__()
        self.first, self.dropout, self.last = nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 1)

    def forward(self, x):
        return self.last(self.dropout(torch.tanh(self.first(x)))).squeeze(1)


def test_a_step_without_noise_is_gradient_descent():
    x = torch.randn(5, 3, generator=generator())
    end = run_chains(quadratic(2.0), x, 3, Langevin(0.1, 0))
    torch.testing.assert_close(end, x * (1 - 0.1 * 2.0) ** 3)


def test_chains_descend_the_energy():
    x = torch.randn(50, 4, generator=generator()) * 3
    energy = quadratic(1.0)
    end = run_chains(energy, x, 20, Langevin(0.1, 0.01), generator=generator())
    assert (energy(end) < energy(x)).all()


def test_the_step_adds_noise_of_the_given_size_and_leaves_its_input():
    x, noise = torch.zeros(200, 500), torch.randn(200, 500, generator=generator())
    energies, new = langevin_step(lambda x: x.sum(1), x, Langevin(0.5, 0.2), noise)
    deviation = 0.2 / math.sqrt(x.numel())
    assert torch.equal(energies, torch.zeros(200))
    assert abs(new.mean() + 0.5) < 5 * deviation
    assert abs(new.std() - 0.2) < 5 * deviation / math.sqrt(2)
    assert not x.any()


@pytest.mark.parametrize(
    "curvature, step_size, noise_std", [(1.0, 0.1, 0.3), (4.0, 0.2, 0.1), (0.5, 0.5, 1.0)]
)
def test_stationary_variance_on_a_quadratic_energy_is_the_closed_form(
    curvature, step_size, noise_std
):
    chains = 20_000
    steps = int(8 / (curvature * step_size))
    variance = noise_std**2 / (1 - (1 - curvature * step_size) ** 2)
    start = torch.randn(chains, 1, generator=generator(1)) * 2 * variance**0.5
    langevin = Langevin(step_size, noise_std)
    end = run_chains(quadratic(curvature), start, steps, langevin, generator=generator(2))
    # of the start's four times too large variance
    left_over = (1 - curvature * step_size) ** (2 * steps) * 3
    assert abs(end.mean()) < 5 * (variance / chains) ** 0.5
    assert abs(end.var() / variance - 1) < 5 * (2 / chains) ** 0.5 + left_over


@pytest.mark.parametrize("curvature, step_size, noise_std", [(1.0, 0.1, 0.3), (1.5, 0.5, 0.2)])
def test_with_the_noise_first_the_stationary_variance_is_that_after_the_gradient(
    curvature, step_size, noise_std
):
    chains, rate = 20_000, (1 - curvature * step_size) ** 2
    steps = int(8 / (curvature * step_size))
    variance = rate * noise_std**2 / (1 - rate)
    start, langevin = torch.zeros(chains, 1), Langevin(step_size, noise_std, noise_first=True)
    end = run_chains(quadratic(curvature), start, steps, langevin, generator=generator(2))
    assert abs(end.var() / variance - 1) < 5 * (2 / chains) ** 0.5 + rate**steps


@pytest.mark.parametrize("noise_first", [False, True])
def test_a_run_of_chains_cut_in_two_is_the_same_run(noise_first):
    x, source = torch.randn(5, 3, generator=generator()), generator(1)
    energy, langevin = quadratic(1.0), Langevin(0.1, 0.2, noise_first)
    whole = run_chains(energy, x, 7, langevin, generator=generator(1))
    half = run_chains(energy, x, 4, langevin, generator=source)
    assert torch.equal(run_chains(energy, half, 3, langevin, generator=source), whole)


def test_moments_of_a_two_component_mixture_at_temperature_one():
    weights, means, deviation = torch.tensor([0.3, 0.7]), torch.tensor([-1.0, 1.5]), 0.7

    def energy(x):
        return -torch.logsumexp(weights.log() - (x - means).square() / (2 * deviation**2), dim=1)

    chains, step_size = 5_000, 0.02
    start = torch.rand(chains, 1, generator=generator(3)) * 6 - 3
    langevin = Langevin(step_size, math.sqrt(2 * step_size))
    end = run_chains(energy, start, 1000, langevin, generator=generator(4)).squeeze(1)
    mean = (weights * means).sum()
    variance = deviation**2 + (weights * means.square()).sum() - mean**2
    # of a discretised chain: order of step_size times the largest curvature
    bias = step_size / deviation**2
    assert abs(end.mean() - mean) < 5 * (variance / chains) ** 0.5 + bias
    assert abs(end.var() / variance - 1) < 5 * (2 / chains) ** 0.5 + bias
    below = torch.special.ndtr(torch.tensor([1.0, -1.5]) / 0.7)  # of each component
    share = (weights * below).sum()
    assert abs((end < 0).float().mean() - share) < 5 * (share * (1 - share) / chains) ** 0.5 + bias


def test_the_batched_gradient_is_that_of_each_row_alone():
    network = NetworkEnergy().eval()
    x = torch.randn(7, 6, generator=generator())
    values, gradient = energy_and_gradient(network, x)
    for row in range(7):
        alone_value, alone_gradient = energy_and_gradient(network, x[row : row + 1])
        torch.testing.assert_close(values[row : row + 1], alone_value)
        torch.testing.assert_close(gradient[row : row + 1], alone_gradient)


def test_no_parameter_gradient_and_no_graph_is_left():
    network = NetworkEnergy()
    x = torch.randn(4, 6, generator=generator())
    end = run_chains(network, x, 3, Langevin(0.1, 0.1), generator=generator())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not end.requires_grad and end.grad_fn is None and not x.requires_grad


@pytest.mark.parametrize("fails", [False, True])
def test_mixed_modes_and_frozen_parameters_come_out_as_they_went_in(fails):
    network = NetworkEnergy().train()
    network.dropout.eval()
    network.last.weight.requires_grad_(False)
    modes = [part.training for part in network.modules()]
    grads = [parameter.requires_grad for parameter in network.parameters()]

    def energy(x):
        assert not any(part.training for part in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())
        if fails:
            raise RuntimeError("halfway")
        return network(x)

    try:
        run_chains(energy, torch.zeros(2, 6), 2, Langevin(0.1, 0.1), module=network)
    except RuntimeError:
        assert fails
    assert [part.training for part in network.modules()] == modes
    assert [parameter.requires_grad for parameter in network.parameters()] == grads


class MethodEnergy(nn.Module):
    """A network in train mode whose energy is a method; a batch would move its statistics."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout, self.last = nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 1)
        self.dropout.eval()
        self.last.bias.requires_grad_(False)

    def energy(self, x):
        assert not any(part.training for part in self.modules())
        return self.last(self.dropout(self.norm(x))).squeeze(1)


def test_the_network_behind_a_bound_method_comes_out_as_it_went_in():
    network, x = MethodEnergy(), torch.randn(8, 6, generator=generator()) + 3
    buffers = {name: value.clone() for name, value in network.named_buffers()}
    modes = [part.training for part in network.modules()]
    grads = [parameter.requires_grad for parameter in network.parameters()]
    run_chains(network.energy, x, 3, Langevin(0.1, 0.1), generator=generator())
    assert network.training and [part.training for part in network.modules()] == modes
    assert [parameter.requires_grad for parameter in network.parameters()] == grads
    assert all(torch.equal(value, buffers[name]) for name, value in network.named_buffers())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_frozen_without_a_module_does_nothing():
    with frozen(None) as nothing:
        assert nothing is None


def test_same_seed_same_chains_bit_for_bit_and_the_global_generator_is_left_alone():
    x = torch.randn(8, 6, generator=generator())
    network = NetworkEnergy()
    before, langevin = torch.get_rng_state(), Langevin(0.1, 0.1)
    first, second, other = (
        run_chains(network, x, 5, langevin, generator=generator(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first, other)


@pytest.mark.parametrize("chunk_size", [1, 3, 10, 64])
def test_chunks_give_the_same_chains_as_one_batch(chunk_size):
    x, labels = torch.randn(10, 6, generator=generator()), torch.arange(10)
    network = NetworkEnergy()

    def energy(x, labels):
        return network(x) * (1 + labels)

    settings = {"labels": labels, "module": network}
    whole, chunked = (
        run_chains(
            energy, x, 6, Langevin(0.1, 0.1), generator=generator(1), chunk_size=size, **settings
        )
        for size in (None, chunk_size)
    )
    torch.testing.assert_close(chunked, whole)


def test_chunks_bound_the_rows_of_a_call():
    rows = []

    def energy(x):
        rows.append(len(x))
        return x.sum(1)

    run_chains(energy, torch.zeros(10, 2), 1, Langevin(0.1, 0), chunk_size=4)
    assert rows == [4, 4, 2]


def test_the_gradient_is_clipped_per_pixel_and_the_chain_clamped():
    x = torch.tensor([[0.5, -0.5, 0.01]])
    energy = quadratic(10.0)  # gradient 5, -5, 0.1
    clipped = run_chains(energy, x, 1, Langevin(0.1, 0, pixel_grad_clip=1.0))
    torch.testing.assert_close(clipped, torch.tensor([[0.4, -0.4, 0.0]]))
    langevin = Langevin(1.0, 0.1, clamp=(-1, 1))
    clamped = run_chains(lambda x: -10 * x.sum(1), x, 5, langevin, generator=generator())
    assert torch.equal(clamped, torch.ones(1, 3))


def test_the_callback_sees_every_step_and_the_trajectory_holds_it():
    x, seen = torch.ones(3, 2), []
    watched = {"callback": lambda *now: seen.append(now), "return_trajectory": True}
    trajectory = run_chains(quadratic(1.0), x, 4, Langevin(0.5, 0), **watched)
    assert trajectory.shape == (5, 3, 2)
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    for step, chains, energies in seen:
        torch.testing.assert_close(chains, x * 0.5**step)
        torch.testing.assert_close(energies, quadratic(1.0)(chains))
        torch.testing.assert_close(trajectory[step], chains)
    torch.testing.assert_close(trajectory[-1], x * 0.5**4)


def test_zero_steps_return_the_start():
    x = torch.randn(3, 2)
    assert torch.equal(run_chains(quadratic(1.0), x, 0, Langevin(0.1, 0.1)), x)


def test_an_energy_that_stops_being_finite_is_named_with_its_step():
    def energy(x):
        return torch.where(x.abs().sum(1) > 3, torch.nan, 1.0) * -x.sum(1)

    # the chain goes 1, 2, 3, 4: the energy at 4 is the fourth, of step 3
    with pytest.raises(FloatingPointError, match="step 3 of 5"):
        run_chains(energy, torch.ones(4, 1), 5, Langevin(1.0, 0))


@pytest.mark.parametrize(
    "settings",
    [
        {"step_size": 0},
        {"step_size": math.nan},
        {"noise_std": -1},
        {"noise_std": math.inf},
        {"pixel_grad_clip": 0},
        {"clamp": (1, -1)},
    ],
)
def test_langevin_settings_that_mean_nothing_are_refused_by_name(settings):
    langevin = Langevin(0.1, 0.1)._replace(**settings)
    with pytest.raises(ValueError, match=next(iter(settings))):
        run_chains(quadratic(1.0), torch.zeros(2, 2), 1, langevin)


@pytest.mark.parametrize("settings", [{"steps": -1}, {"chunk_size": 0}])
def test_counts_that_mean_nothing_are_refused_by_name(settings):
    usable = {"steps": 1, "langevin": Langevin(0.1, 0.1)}
    with pytest.raises(ValueError, match=next(iter(settings))):
        run_chains(quadratic(1.0), torch.zeros(2, 2), **{**usable, **settings})


@pytest.mark.parametrize("chains, labels, chunk_size", [(512, 500, 250), (5, 10, None)])
def test_labels_that_are_not_one_a_chain_are_refused(chains, labels, chunk_size):
    called = []

    def energy(x, labels):
        called.append(len(x))
        return (x * labels[: len(x), None]).sum(1)

    settings = {"labels": torch.zeros(labels), "chunk_size": chunk_size}
    with pytest.raises(ValueError, match=f"labels.* {labels} for {chains} chains"):
        run_chains(energy, torch.zeros(chains, 2), 1, Langevin(0.1, 0.1), **settings)
    assert not called


def test_a_start_that_has_no_gradient_is_refused_with_what_to_do():
    x, langevin = torch.ones(2, 2), Langevin(0.1, 0)
    with pytest.raises(ValueError, match=r"torch.int64: call x\.float\(\)"):
        run_chains(quadratic(1.0), x.long(), 1, langevin)
    with torch.inference_mode():
        made_inside = torch.ones(2, 2)
        with pytest.raises(ValueError, match=r"inference_mode.*use torch\.no_grad"):
            run_chains(quadratic(1.0), x, 1, langevin)
    with pytest.raises(ValueError, match=r"inference_mode.*clone x outside"):
        run_chains(quadratic(1.0), made_inside, 1, langevin)
    with torch.no_grad():
        end = run_chains(quadratic(1.0), made_inside.clone(), 1, langevin)
    torch.testing.assert_close(end, 0.9 * x)


def test_an_energy_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match="one value a row"):
        run_chains(lambda x: x, torch.zeros(2, 2), 1, Langevin(0.1, 0))


def test_the_module_needs_torch_alone():
    code = """if True:
        import sys
        from sgld_nrg import sgld
        ours = {name for name in sys.modules if name.startswith("sgld_nrg")}
        assert ours == {"sgld_nrg", "sgld_nrg.sgld"}, ours
        others = {"torchvision", "sklearn", "matplotlib"} & set(sys.modules)
        assert not others, others
    """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_chains_that_are_not_checked_come_back_as_they_are():
    def broken(x):
        return (x * float("nan")).sum(1)

    langevin = Langevin(0.1, 0.1)
    assert run_chains(broken, torch.zeros(2, 3), 1, langevin, check=False).isnan().all()
    with pytest.raises(FloatingPointError):
        run_chains(broken, torch.zeros(2, 3), 1, langevin)
