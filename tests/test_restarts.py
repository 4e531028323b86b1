"""Restart distributions: what they draw, how often, and that they survive their state."""

import pytest
import torch
from conftest import generator

from sgld_nrg.support import restarts
from sgld_nrg.support.restarts import GaussianRestart, UniformRestart, restart_from_state


def test_uniform_restarts_fill_the_pixel_range():
    restart = UniformRestart((1, 4, 4), 10)
    x = restart.draw(torch.zeros(1000, dtype=torch.int64), generator())
    assert x.shape == (1000, 1, 4, 4) and x.min() >= -1 and x.max() <= 1
    assert abs(x.mean()) < 5 * (1 / 3 / x.numel()) ** 0.5
    assert abs(x.var() - 1 / 3) < 5 * (4 / 45 / x.numel()) ** 0.5


def test_gaussian_restarts_have_the_mean_and_covariance_of_their_class():
    truth = torch.tensor([[0.05, 0.03], [0.03, 0.04]]) / 4
    factor = torch.linalg.cholesky(truth)
    means = torch.tensor([[-0.3, 0.2], [0.4, 0.0]])
    labels = torch.arange(2).repeat_interleave(5000)
    images = means[labels] + torch.randn(10_000, 2, generator=generator()) @ factor.T
    restart = GaussianRestart.fit(images.view(-1, 1, 1, 2), labels, 2)
    for label in range(2):
        drawn = restart.draw(torch.full((20_000,), label), generator(1)).flatten(1)
        torch.testing.assert_close(drawn.mean(0), means[label], atol=0.01, rtol=0)
        torch.testing.assert_close(torch.cov(drawn.T), truth, atol=0.001, rtol=0)


def test_a_low_rank_gaussian_keeps_the_directions_of_largest_variance():
    x = torch.randn(4000, 3, generator=generator()) * torch.tensor([0.2, 0.001, 0.1])
    labels = torch.zeros(4000, dtype=torch.int64)
    restart = GaussianRestart.fit(x.view(-1, 1, 1, 3), labels, 1, rank=2)
    drawn = restart.draw(labels, generator(1)).flatten(1)
    torch.testing.assert_close(drawn.std(0), torch.tensor([0.2, 0.0, 0.1]), atol=0.01, rtol=0)


@pytest.mark.parametrize("count", [300, 1100])  # fewer and more than restarts.LARGE
def test_the_leading_directions_of_many_coordinates_are_found_without_their_covariance(count):
    state = torch.random.get_rng_state()
    hidden = torch.randn(count, 2, generator=generator()) * torch.tensor([3.0, 1.0])
    directions = torch.linalg.qr(torch.randn(1200, 2, generator=generator(1))).Q
    x = 0.1 * hidden @ directions.T + 0.001 * torch.randn(count, 1200, generator=generator(2))
    labels = torch.zeros(count, dtype=torch.int64)
    restart = GaussianRestart.fit(x.view(-1, 3, 20, 20), labels, 1, rank=2)
    centred = x - x.mean(0)
    covariance, found = centred.T @ centred / (count - 1), restart.factor[0] @ restart.factor[0].T
    assert (covariance - found).norm() < 0.02 * covariance.norm()
    # the random start of the decomposition is its own
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_class_of_two_clusters_is_drawn_from_a_gaussian_for_each():
    parts = torch.tensor([0, 0, 0, 1]).repeat(1000)
    x = torch.where(parts == 0, -0.5, 0.5)[:, None]
    x = x + 0.05 * torch.randn(4000, 3, generator=generator())
    labels = torch.zeros(4000, dtype=torch.int64)
    restart = GaussianRestart.fit(x.view(-1, 1, 1, 3), labels, 1, parts=parts)
    drawn = restart.draw(labels, generator(1)).flatten(1)
    left = drawn[:, 0] < 0
    assert abs(left.float().mean() - 0.75) < 0.03 and restart.num_classes == 1
    for rows, centre in ((left, -0.5), (~left, 0.5)):
        torch.testing.assert_close(drawn[rows].mean(0), torch.full((3,), centre), atol=0.01, rtol=0)
        torch.testing.assert_close(drawn[rows].std(0), torch.full((3,), 0.05), atol=0.005, rtol=0)
    again = restart_from_state(restart.state_dict())
    first, second = (each.draw(labels[:9], generator()) for each in (restart, again))
    assert torch.equal(first, second)


def test_each_class_is_drawn_from_its_own_gaussians_as_often_as_they_weigh():
    means = torch.arange(6).view(6, 1) / 10
    weights = torch.tensor([[1.0, 2.0, 1.0], [3.0, 1.0, 0.0]])
    restart = GaussianRestart(means, torch.zeros(6, 1, 1), (1,), weights)
    labels = torch.tensor([0, 1]).repeat_interleave(4000)
    found = (10 * restart.draw(labels, generator())).round().long().view(2, 4000)
    counts = torch.stack([row.bincount(minlength=6) for row in found])
    wanted = torch.tensor([[1000, 2000, 1000, 0, 0, 0], [0, 0, 0, 3000, 1000, 0]])
    torch.testing.assert_close(counts, wanted, atol=5 * 1000**0.5, rtol=0)
    assert not counts[wanted == 0].any()


def test_rows_that_are_wanted_do_not_depend_on_which_others_are():
    restart = GaussianRestart(torch.rand(3, 8), torch.rand(3, 8, 2), (8,))
    labels, wanted = torch.arange(60) % 3, torch.arange(60) % 7 == 0
    some, every = (restart.draw(labels, generator(), rows) for rows in (wanted, None))
    assert torch.equal(some[wanted], every[wanted])


def test_few_images_of_many_pixels_have_the_covariance_they_have():
    x = torch.rand(20, 100, generator=generator()) - 0.5
    restart = GaussianRestart.fit(x.view(-1, 1, 10, 10), torch.zeros(20, dtype=torch.int64), 1)
    covariance = restart.factor[0] @ restart.factor[0].T
    torch.testing.assert_close(covariance, torch.cov(x.T), atol=1e-5, rtol=1e-3)


def test_restarts_drawn_at_once_are_those_drawn_class_by_class():
    restart = GaussianRestart(torch.rand(3, 8), torch.rand(3, 8, 2), (1, 2, 4))
    z, labels = torch.randn(50, 2), torch.arange(50) % 3
    torch.testing.assert_close(restart._at_once(z, labels), restart._one_by_one(z, labels, None))


def test_a_class_without_images_is_named():
    with pytest.raises(ValueError, match="class 1 has 0"):
        GaussianRestart.fit(torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64), 2)


def test_classes_are_as_frequent_among_the_chains_as_in_the_training_images():
    images, labels = torch.rand(200, 1, 2, 2), torch.tensor([0] * 100 + [1] * 80 + [2] * 20)
    for parts in (None, torch.arange(200) % 3):
        restart = GaussianRestart.fit(images, labels, 3, parts=parts)
        for numbers in (torch.arange(1000), torch.arange(5000, 6000)):
            counts = restart.labels(numbers).bincount(minlength=3)
            torch.testing.assert_close(counts, torch.tensor([500, 400, 100]), atol=3, rtol=0)
    one_each = GaussianRestart(torch.rand(3, 4), torch.rand(3, 4, 2), (1, 2, 2))
    counts = one_each.labels(torch.arange(300)).bincount()
    torch.testing.assert_close(counts, torch.tensor([100] * 3), atol=3, rtol=0)
    assert UniformRestart((1, 2, 2), 3).labels(torch.arange(5)).tolist() == [0, 1, 2, 0, 1]


def test_restart_distributions_survive_their_state_dict():
    labels = torch.tensor([0, 1, 1])
    uniform = UniformRestart((1, 2, 2), 2)
    gaussian = GaussianRestart(torch.rand(2, 4), torch.rand(2, 4, 3), (1, 2, 2))
    for restart in (uniform, gaussian):
        again = restart_from_state(restart.state_dict())
        assert torch.equal(again.draw(labels, generator()), restart.draw(labels, generator()))


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
def test_starts_are_numbers_of_the_kind_of_the_images(kind):
    images, labels = torch.rand(40, 1, 2, 2, generator=generator()), torch.arange(40) % 2
    restart = GaussianRestart.fit(images.to(kind), labels, 2)
    again = restart_from_state(restart.state_dict())
    for each in (restart, again):
        drawn = each.draw(torch.zeros(4000, dtype=torch.int64), generator())
        assert drawn.dtype == kind
        spread = drawn.float().var(0) / images[labels == 0].clamp(-1, 1).var(0)
        assert spread.min() > 0.7 and spread.max() < 1.3


@pytest.mark.parametrize("low, high, bounds", [(-0.5, 0.5, (-1, 1)), (0, 255, (0, 255))])
def test_starts_lie_within_the_pixel_range_or_the_images_own(low, high, bounds):
    images = torch.rand(50, 1, 2, 2, generator=generator()) * (high - low) + low
    images.view(-1)[:2] = torch.tensor([low, high])
    restart = GaussianRestart.fit(images, torch.zeros(50, dtype=torch.int64), 1)
    for each in (restart, restart_from_state(restart.state_dict())):
        drawn = each.draw(torch.zeros(4000, dtype=torch.int64), generator())
        assert (drawn.min(), drawn.max()) == bounds


def test_a_state_without_a_range_is_clamped_to_the_pixel_range():
    restart = GaussianRestart(torch.zeros(1, 2), 10 * torch.eye(2)[None], (2,), clamp=(-50, 50))
    state = restart.state_dict()
    del state["clamp"]
    labels = torch.zeros(1000, dtype=torch.int64)
    assert restart.draw(labels, generator()).abs().max() > 10
    assert restart_from_state(state).draw(labels, generator()).abs().max() == 1


def test_clusters_cut_a_class_by_what_its_images_look_like():
    centres = torch.tensor([-0.5, 0.5]).repeat(105)[:, None, None, None]
    images = torch.randn(210, 1, 4, 4) * 0.01 + centres
    labels = torch.zeros(210, dtype=torch.int64)
    labels[-4:] = 1
    first = restarts.clusters(images, labels, 2, seed=0)[:206]
    assert len(first[::2].unique()) == len(first[1::2].unique()) == 1 and first[0] != first[1]
    # few images have few clusters: no start is a training image
    parts = restarts.clusters(images, labels, 10, seed=0)
    assert len(parts[:206].unique()) == 4 and len(parts[-4:].unique()) == 1


def test_small_integers_are_packed_two_to_a_byte():
    values = torch.randint(-8, 8, (3, 4, 5), generator=generator()).to(torch.int8)
    packed = restarts._packed(values)
    assert packed.shape == (3, 4, 3) and packed.dtype == torch.uint8
    assert torch.equal(restarts._unpacked(packed)[..., :5], values)


def test_a_compact_restart_draws_nearly_the_same_and_is_a_fraction_of_the_size():
    basis = torch.linalg.qr(torch.randn(100, 12, generator=generator()))[0]
    mean = torch.randn(6, 12, generator=generator(1)) @ basis.T / 3
    falling = torch.tensor([0.3, 0.1, 0.03])  # the directions come strongest first
    factor = basis @ torch.linalg.qr(torch.randn(6, 12, 3, generator=generator(2)))[0] * falling
    weights = torch.tensor([[0.1, 0.2, 0.3], [0.15, 0.2, 0.05]])
    restart = GaussianRestart(mean, factor, (1, 10, 10), weights, clamp=(-9, 9))
    state = restarts.compact(restart, directions=12, rank=3)
    again = restart_from_state(state)
    assert torch.equal(again.weights, weights) and again.shape == (1, 10, 10)
    assert (again.mean - mean).abs().max() < 0.02 * mean.abs().max()
    spread, wanted = (f @ f.transpose(1, 2) for f in (again.factor, factor))
    assert (spread - wanted).norm() < 0.2 * wanted.norm()
    labels = torch.tensor([0, 1]).repeat(50)
    near, full = again.draw(labels, generator(3)), restart.draw(labels, generator(3))
    assert (near - full).abs().max() < 0.1  # of the same label, part and place
    few = restart_from_state(restarts.compact(restart, directions=12, rank=1))
    assert few.factor.shape == (6, 100, 1)
    strongest = factor.square().sum(1).amax(1)
    torch.testing.assert_close(few.factor.square().sum((1, 2)), strongest, rtol=0.05, atol=0)
