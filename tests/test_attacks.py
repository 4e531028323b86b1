"""Attacks: closed forms on linear classifiers, exact properties on small random networks."""

import math

import pytest
import torch
from conftest import generator
from torch import nn

from sgld_nrg.models import build_model, marginal_energy
from sgld_nrg.sgld import Langevin, langevin_step, run_chains
from sgld_nrg.support import attacks
from sgld_nrg.support.attacks import NORMS, pgd, refined, single_step


def uniform(*shape, bound=1.0, seed=0, dtype=torch.float32):
    return (2 * torch.rand(shape, generator=generator(seed), dtype=dtype) - 1) * bound


class Linear:
    """Two classes with logits (-s, s) / 2, s = w.x + b: the margin of label y is (2y - 1) s.

    Keeps what it sees.
    """

    def __init__(self, shape=(2, 3, 3), bias=0.0, seed=5):
        self.weight, self.bias, self.seen = uniform(*shape, seed=seed), bias, []

    def margin(self, x, labels):
        return (2 * labels - 1) * ((x * self.weight).flatten(1).sum(1) + self.bias)

    def __call__(self, x):
        self.seen.append(x.detach())
        score = (x * self.weight).flatten(1).sum(1) + self.bias
        return torch.stack([-score, score], 1) / 2

    def strength(self, norm):
        """Return the weight's dual norm: what a perturbation of radius 1 lowers the margin by."""
        return self.weight.abs().sum() if norm == "linf" else self.weight.norm()


def right_labels(model, x):
    with torch.no_grad():
        return model(x).argmax(1)


def cnn(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model("small-cnn", num_classes=4, channels=1, image_size=8, width=4, depth=2)


class MixedNetwork(nn.Module):
    """A network whose parts are in different modes, with one that differs in training: dropout."""

    def __init__(self):
        super().__init__()
        self.first, self.dropout, self.last = nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)
        self.train()
        self.first.eval()
        self.last.bias.requires_grad_(False)

    def forward(self, x):
        assert not self.dropout.training and not self.last.weight.requires_grad
        return self.last(self.dropout(torch.tanh(self.first(x.flatten(1)))))

    def state(self):
        modes = [part.training for part in self.modules()]
        return modes, [parameter.requires_grad for parameter in self.parameters()]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("side", [0.999, 1.001])
def test_a_linear_classifier_flips_exactly_when_eps_passes_margin_over_dual_norm(norm, side):
    model, x = Linear(), uniform(8, 2, 3, 3, bound=0.3)
    labels = right_labels(model, x)
    thresholds = model.margin(x, labels) / model.strength(norm) / 2  # of eps, on [0, 1]
    for image in thresholds.argsort()[[1, 4, 7]]:
        eps = float(thresholds[image]) * side
        settings = {"attack_steps": 60, "attack_step_size": eps / 4}
        attack = pgd(model, x, labels, norm, eps, generator=generator(), **settings)
        assert attack.correct[image] == (side < 1)
        assert torch.equal(attack.correct, thresholds > eps)


@pytest.mark.parametrize("norm", NORMS)
def test_the_loss_of_a_linear_classifier_rises_to_the_closed_form(norm):
    model, x, eps = Linear(), uniform(8, 2, 3, 3, bound=0.3), 0.05
    labels = torch.arange(8) % 2
    settings = {"attack_steps": 60, "attack_step_size": eps / 4}
    attack = pgd(model, x, labels, norm, eps, generator=generator(), **settings)
    worst = nn.functional.softplus(2 * eps * model.strength(norm) - model.margin(x, labels)).mean()
    torch.testing.assert_close(attack.losses[-1], worst)
    torch.testing.assert_close(nn.functional.cross_entropy(model(attack.images), labels), worst)
    assert attack.losses.shape == (61,)


@pytest.mark.parametrize("norm, slack", [("linf", 1e-5), ("l2", 0.03)])
def test_the_default_steps_come_close_to_the_strongest_attack(norm, slack):
    model, x, eps = Linear(), uniform(8, 2, 3, 3, bound=0.3), 0.05
    labels = right_labels(model, x)
    attack = pgd(model, x, labels, norm, eps, generator=generator())
    lowered = model.margin(x, labels) - model.margin(attack.images, labels)
    assert (lowered > (1 - slack) * 2 * eps * model.strength(norm)).all()


def test_the_linf_attack_is_optimal_when_the_pixel_range_binds():
    model, x, eps = Linear(), uniform(8, 2, 3, 3), 0.3
    labels = right_labels(model, x)
    attack = pgd(model, x, labels, "linf", eps, generator=generator())
    away = (1 - 2 * labels).view(-1, 1, 1, 1) * model.weight.sign()
    torch.testing.assert_close(attack.images, (x + 2 * eps * away).clamp(-1, 1))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack_step_size", [None, 3.0])
def test_the_perturbation_stays_in_the_ball_and_in_the_pixel_range(norm, attack_step_size):
    model, x, eps, seen = cnn(), uniform(16, 1, 8, 8).mul(1.5).clamp(-1, 1), 0.2, []

    def logits_of(images):
        seen.append(images.detach())
        return model(images)

    labels = right_labels(model, x)
    settings = {"attack_steps": 5, "attack_step_size": attack_step_size, "random_starts": 2}
    attack = pgd(logits_of, x, labels, norm, eps, generator=generator(), **settings)
    order = math.inf if norm == "linf" else 2
    for images in (*seen, attack.images):
        assert images.abs().max() <= 1
        radii = torch.linalg.vector_norm((images - x).flatten(1), order, dim=1)
        assert radii.max() <= 2 * eps * (1 + 1e-5)
    assert not torch.equal(attack.images, x)


@pytest.mark.parametrize("norm", NORMS)
def test_the_random_start_is_uniform_in_the_ball(norm):
    model, x, eps, images = Linear((1, 1, 2)), torch.zeros(20_000, 1, 1, 2), 0.2, 20_000
    labels = torch.zeros(images, dtype=torch.int64)
    pgd(model, x, labels, norm, eps, attack_steps=1, generator=generator())
    start = model.seen[1].flatten(1) / (2 * eps)  # the first call sees the clean images
    assert (start.mean(0).abs() < 5 * (1 / 3 / images) ** 0.5).all()
    if norm == "linf":
        assert (start.square().mean(0) - 1 / 3).abs().max() < 5 * (4 / 45 / images) ** 0.5
    else:  # the share of a disc's area within a radius is the radius squared: uniform on [0, 1]
        share = start.square().sum(1)
        assert abs(share.mean() - 1 / 2) < 5 * (1 / 12 / images) ** 0.5
        assert abs((share < 0.25).float().mean() - 0.25) < 5 * (0.25 * 0.75 / images) ** 0.5


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack_step_size", [None, 0.1])
def test_eps_zero_leaves_the_images_clean(norm, attack_step_size):
    model, x = cnn(), uniform(6, 1, 8, 8)
    labels = right_labels(model, x)
    labels[:2] = (labels[:2] + 1) % 4
    settings = {"attack_steps": 3, "attack_step_size": attack_step_size}
    attack = pgd(model, x, labels, norm, 0, generator=generator(), **settings)
    assert torch.equal(attack.images, x)
    assert attack.correct.tolist() == [False] * 2 + [True] * 4


def test_an_image_that_is_wrong_without_attack_is_never_correct():
    model, x = Linear(), uniform(8, 2, 3, 3, bound=0.3)
    wrong = 1 - right_labels(model, x)
    for eps in (0.01, 0.5):
        attack = pgd(model, x, wrong, "linf", eps, attack_steps=3, generator=generator())
        assert not attack.correct.any()


def test_a_harmful_clean_image_is_kept_when_the_attack_ends_somewhere_harmless():
    def logits_of(x):  # wrong only at 0 exactly; the gradient leads astray
        score = torch.where(x == 0, -1.0, 1.0).flatten() + 1e-3 * x.flatten()
        return torch.stack([score, -score], 1)

    x, labels = torch.zeros(3, 1, 1, 1), torch.zeros(3, dtype=torch.int64)
    attack = pgd(logits_of, x, labels, "linf", 0.1, attack_steps=3, generator=generator())
    assert torch.equal(attack.images, x) and not attack.correct.any()


@pytest.mark.parametrize("norm, eps", [("linf", 0.12), ("l2", 0.6)])
def test_with_one_seed_more_starts_only_ever_take_images_from_the_defender(norm, eps):
    model, x = cnn(), uniform(64, 1, 8, 8, bound=0.8)
    labels = right_labels(model, x)
    settings = {"attack_steps": 1, "attack_step_size": eps / 50}  # weak: the random start matters
    few, many = (
        pgd(model, x, labels, norm, eps, random_starts=n, generator=generator(1), **settings)
        for n in (1, 8)
    )
    assert torch.equal(few.losses, many.losses)
    assert not (many.correct & ~few.correct).any()
    assert many.correct.sum() < few.correct.sum()
    low, high = (
        nn.functional.cross_entropy(model(attack.images), labels, reduction="none")
        for attack in (few, many)
    )
    same = few.correct == many.correct
    assert (high[same] >= low[same] - 1e-6).all()


@pytest.mark.parametrize("norm, eps", [("linf", 0.05), ("l2", 0.25)])
def test_more_steps_do_not_help_the_defender(norm, eps):
    model, x = cnn(), uniform(64, 1, 8, 8, bound=0.8)
    labels = right_labels(model, x)
    survivors = []
    for count in (1, 8, 40):
        settings = {"attack_steps": count, "attack_step_size": eps / 10}
        attack = pgd(model, x, labels, norm, eps, generator=generator(), **settings)
        survivors.append(int(attack.correct.sum()))
    assert survivors[0] >= survivors[1] - 1 and survivors[1] >= survivors[2] - 1
    assert survivors[2] < survivors[0] < 64


def test_correct_is_what_the_model_says_of_the_kept_images():
    model, x = cnn(), uniform(64, 1, 8, 8, bound=0.8)
    labels = right_labels(model, x)
    settings = {"attack_steps": 5, "random_starts": 3}
    attack = pgd(model, x, labels, "linf", 0.05, generator=generator(), **settings)
    assert torch.equal(right_labels(model, attack.images) == labels, attack.correct)
    assert 0 < attack.correct.sum() < 64


@pytest.mark.parametrize("norm", NORMS)
def test_the_loss_rises_at_every_step_on_a_convex_loss(norm):
    model, x, eps = Linear(), uniform(8, 2, 3, 3, bound=0.3), 0.05
    labels = torch.arange(8) % 2
    settings = {"attack_steps": 20, "attack_step_size": eps / 40}
    attack = pgd(model, x, labels, norm, eps, generator=generator(), **settings)
    assert (attack.losses.diff() > 0).all()


@pytest.mark.parametrize("norm", NORMS)
def test_confidence_beyond_float_precision_does_not_stop_the_attack(norm):
    weight = uniform(1, 4, 4, seed=2)

    # a lead of 60: softmax - onehot is 0 in float32, and so is the square of exp(-60)
    def logits_of(x):
        score = 60 + 200 * (x * weight).flatten(1).sum(1)
        return torch.stack([score, torch.zeros_like(score)], 1)

    x, labels, eps = torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64), 0.1
    settings = {"attack_steps": 40, "attack_step_size": eps / 4}
    attack = pgd(logits_of, x, labels, norm, eps, generator=generator(), **settings)
    reach = 200 * 2 * eps * (weight.abs().sum() if norm == "linf" else weight.norm())
    assert reach > 60 and not attack.correct.any()
    scores = logits_of(attack.images)[:, 0]
    torch.testing.assert_close(scores, (60 - reach).expand(2), rtol=1e-3, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_a_zero_gradient_moves_nothing_and_makes_no_nan(norm):
    x = uniform(4, 1, 2, 2, bound=0.5)
    labels = torch.tensor([0, 0, 1, 1])

    def logits_of(x):
        return x.flatten(1)[:, :2] * 0

    attack = pgd(logits_of, x, labels, norm, 0.1, attack_steps=3, generator=generator())
    assert torch.equal(attack.correct, labels == 0)  # equal logits fall to the first class
    torch.testing.assert_close(attack.losses, torch.full((4,), math.log(2)))


def test_no_parameter_gets_a_gradient_and_every_flag_comes_back():
    network, x, labels = MixedNetwork(), uniform(5, 1, 2, 2), torch.arange(5) % 3
    before, x_before = network.state(), x.clone()

    def logits_of(images):
        return network(images)

    settings = {"attack_steps": 2, "draws": 2}
    named = pgd(logits_of, x, labels, "l2", 0.1, generator=generator(), module=network, **settings)
    found = [
        pgd(owner, x, labels, "l2", 0.1, generator=generator(), **settings)
        for owner in (network, network.forward)  # a Module is found by itself
    ]
    assert network.state() == before
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(x, x_before) and not x.requires_grad
    assert all(torch.equal(attack.images, named.images) for attack in found)
    assert not any(tensor.requires_grad for tensor in named)


def test_without_a_module_parameters_still_get_no_gradient():
    network, x = cnn(), uniform(3, 1, 8, 8).requires_grad_()
    labels, settings = torch.zeros(3, dtype=torch.int64), {"attack_steps": 2}
    attack = pgd(lambda x: network(x), x, labels, "linf", 0.1, generator=generator(), **settings)
    assert all(each.grad is None and each.requires_grad for each in network.parameters())
    assert x.grad is None and not any(tensor.requires_grad for tensor in attack)


def test_the_attack_works_under_no_grad_and_repeats_with_its_seed():
    model, x = cnn(), uniform(8, 1, 8, 8)
    labels, before = right_labels(model, x), torch.get_rng_state()
    with torch.no_grad():
        first = pgd(model, x, labels, "linf", 0.1, attack_steps=3, generator=generator(3))
    second, other = (
        pgd(model, x, labels, "linf", 0.1, attack_steps=3, generator=generator(seed))
        for seed in (3, 4)
    )
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert not torch.equal(first.images, other.images)
    assert torch.equal(before, torch.get_rng_state())


def test_several_draws_average_the_gradient():
    weights, calls, draws = uniform(60, 1, 2, 2, seed=7, dtype=torch.float64), [], 5

    def logits_of(x):  # draw number n has weight n
        score = (x * weights[len(calls)]).flatten(1).sum(1)
        calls.append(x.detach())
        return torch.stack([torch.zeros_like(score), score], 1)

    x, labels = uniform(3, 1, 2, 2, bound=0.5, dtype=torch.float64), torch.tensor([0, 1, 1])
    step_size = 0.02
    settings = {"attack_steps": 1, "attack_step_size": step_size, "draws": draws}
    attack = pgd(logits_of, x, labels, "l2", 5, generator=generator(), **settings)
    assert len(calls) == 3 * draws  # the clean images, the step, its end
    start, end, drawn = calls[draws], calls[-1], weights[draws : 2 * draws]
    # d softplus(a) / dx for a = -margin, per draw
    sign = (1 - 2 * labels).view(-1, 1, 1, 1)
    scores = torch.stack([(start * weight).sum((1, 2, 3), keepdim=True) for weight in drawn])
    gradient = (torch.sigmoid(sign * scores) * sign * drawn[:, None]).mean(0)
    expected = start + 2 * step_size * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(end, expected.clamp(-1, 1))
    assert attack.losses.shape == (2,)


def test_more_draws_make_a_stronger_attack_on_a_noisy_gradient():
    weight, x = torch.ones(1, 4, 4), torch.zeros(50, 1, 4, 4)
    labels, margins = torch.ones(50, dtype=torch.int64), []
    for draws in (1, 16):
        noise, seen = generator(2), []

        def logits_of(x, noise=noise, seen=seen):
            seen.append(x.detach())
            score = (x * (weight + 5 * torch.randn(x.shape, generator=noise))).flatten(1).sum(1)
            return torch.stack([-score, score], 1) / 2

        settings = {"attack_steps": 10, "draws": draws}
        pgd(logits_of, x, labels, "l2", 0.05, generator=generator(), **settings)
        margins.append((seen[-1] * weight).flatten(1).sum(1).mean())
    assert margins[1] < 1.5 * margins[0] < 0


@pytest.mark.parametrize("strong, decided", [((3.0, 0.0), 1), ((4.0, 1.5), 1), ((30.0, 0.0), 0)])
def test_the_mean_softmax_over_the_draws_decides(strong, decided):
    # The middle one of three draws is for class 0. Softmax of (0, 1) is (0.27, 0.73), so a vote of
    # the three would be for class 1 always, their mean logits for class 0 always, and the mean
    # softmax depends on how sure that draw is.
    draws, calls = torch.tensor([[0.0, 1.0], strong, [0.0, 1.0]]), []

    def logits_of(x):
        calls.append(None)
        return draws[(len(calls) - 1) % 3] + 0 * x.flatten(1)[:, :2]

    x, labels, settings = torch.zeros(2, 1, 1, 2), torch.tensor([0, 1]), {"attack_steps": 1}
    attack = pgd(logits_of, x, labels, "linf", 0.1, draws=3, generator=generator(), **settings)
    assert torch.equal(attack.correct, labels == decided)


def test_a_loss_that_stops_being_finite_is_named_with_its_step():
    def failing(call):
        calls = []

        def logits_of(x):
            calls.append(None)
            return x.flatten(1)[:, :2] * (math.nan if len(calls) > call else 1)

        return logits_of

    x, labels = torch.zeros(2, 1, 1, 2), torch.tensor([0, 1])
    cases = (
        (0, 1, "clean images"),
        (3, 1, "step 2 of 5 of random start 0"),
        (6, 1, "step 5 of 5 of random start 0"),
        (9, 2, "step 2 of 5 of random start 1"),
    )
    for call, starts, message in cases:
        settings = {"attack_steps": 5, "random_starts": starts, "generator": generator()}
        with pytest.raises(FloatingPointError, match=message):
            pgd(failing(call), x, labels, "linf", 0.1, **settings)


BAD_PIXELS = [torch.full((2, 1, 1, 2), value) for value in (1.1, math.nan)]


@pytest.mark.parametrize(
    "settings",
    [
        {"norm": "l1"},
        {"eps": -0.1},
        {"eps": math.nan},
        {"eps": math.inf},
        {"attack_steps": 0},
        {"attack_step_size": 0},
        {"attack_step_size": math.nan},
        {"random_starts": 0},
        {"draws": 0},
        *({"x": pixels} for pixels in BAD_PIXELS),
    ],
)
def test_an_attack_that_means_nothing_is_refused_by_name(settings):
    usable = {"x": torch.zeros(2, 1, 1, 2), "labels": torch.tensor([0, 1])}
    usable |= {"norm": "linf", "eps": 0.1, "attack_steps": 1}
    with pytest.raises(ValueError, match=next(iter(settings))):
        pgd(lambda x: x.flatten(1), **{**usable, **settings})


@pytest.mark.parametrize("attack", [pgd, single_step])
@pytest.mark.parametrize("labels", [torch.tensor([0]), torch.tensor([[0], [1]])])
def test_labels_that_are_not_one_an_image_are_refused(attack, labels):
    with pytest.raises(ValueError, match=r"labels must have shape \(2,\)"):
        attack(lambda x: x.flatten(1), torch.zeros(2, 1, 1, 2), labels, "linf", 0.1)


@pytest.mark.parametrize("attack", [pgd, single_step])
def test_images_without_a_gradient_are_refused_with_what_to_do(attack):
    x, labels = torch.zeros(2, 1, 1, 2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"x\.float\(\)"):
        attack(lambda x: x.flatten(1), x.long(), labels, "linf", 0.1)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"use torch\.no_grad"):
        attack(lambda x: x.flatten(1), x, labels, "linf", 0.1)


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 0.5)])
def test_an_attack_on_pixels_from_0_to_1_is_that_on_the_scaled_images(norm, eps):
    logits_of, _ = smooth_model()
    x = uniform(40, 1, 2, 2, dtype=torch.float64)
    labels, settings = right_labels(logits_of, x), {"attack_steps": 5, "random_starts": 2}
    scaled = pgd(logits_of, x, labels, norm, eps, generator=generator(), **settings)

    def logits_of_unit(x):
        return logits_of(2 * x - 1)

    settings |= {"pixel_range": (0, 1), "generator": generator()}
    unit = pgd(logits_of_unit, (x + 1) / 2, labels, norm, eps, **settings)
    torch.testing.assert_close(2 * unit.images - 1, scaled.images)
    torch.testing.assert_close(unit.losses, scaled.losses)
    assert torch.equal(unit.correct, scaled.correct) and 0 < scaled.correct.sum() < 40
    assert unit.images.min() == 0 and unit.images.max() == 1
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\]"):
        pgd(logits_of_unit, x, labels, norm, eps, **settings)


@pytest.mark.parametrize(
    "value, pixel_range, warned",
    [(0.5, (-1, 1), True), (-0.5, (-1, 1), False), (0.0, (-1, 1), False), (0.5, (0, 1), False)],
)
def test_images_that_may_be_scaled_to_0_to_1_are_warned_of(value, pixel_range, warned, recwarn):
    x, labels = torch.full((2, 1, 1, 2), value), torch.tensor([0, 1])
    settings = {"attack_steps": 1, "pixel_range": pixel_range}
    pgd(lambda x: x.flatten(1), x, labels, "linf", 0.1, **settings)
    found = ["give pixel_range=(0, 1)" in str(warning.message) for warning in recwarn]
    assert found == [True] * warned


@pytest.mark.parametrize(
    "settings", [{"step_size": 0}, {"noise_std": -1}, {"pixel_grad_clip": 0}, {"clamp": (1, -1)}]
)
def test_a_refinement_that_means_nothing_is_refused_by_name_when_it_is_built(settings):
    langevin = Langevin(0.1, 0.1)._replace(**settings)
    with pytest.raises(ValueError, match=next(iter(settings))):
        refined(lambda x: x.sum(1), lambda x: x, 1, langevin)


def test_a_refinement_by_fewer_than_no_steps_is_refused_when_it_is_built():
    with pytest.raises(ValueError, match="steps"):
        refined(lambda x: x.sum(1), lambda x: x, -1, Langevin(0.1, 0.1))


@pytest.mark.parametrize("norm", NORMS)
def test_a_single_step_does_harm_and_stays_in_the_ball_and_in_the_pixel_range(norm):
    weights = uniform(16, 3, seed=3)

    def logits_of(x):
        return x.flatten(1) @ weights

    x, labels = uniform(50, 1, 4, 4, seed=1) * 1.2, torch.arange(50) % 3
    inside = x.clamp(-1, 1)
    images = single_step(logits_of, x, labels, norm, 0.1, generator=generator())
    assert (images.abs() <= 1).all() and not images.requires_grad
    radius = (images - inside).flatten(1).norm(dim=1, p=math.inf if norm == "linf" else 2)
    assert (radius <= 0.2 + 1e-6).all() and radius.mean() > 0.15
    before, after = (
        nn.functional.cross_entropy(logits_of(at), labels, reduction="none")
        for at in (inside, images)
    )
    assert (after > before).all()
    assert torch.equal(single_step(logits_of, x, labels, norm, 0), inside)


def smooth_model(dtype=torch.float64):
    """Return logits_of and the energy of a small smooth network on (N, 1, 2, 2)."""
    weights = uniform(4, 6, seed=3, dtype=dtype), uniform(6, 3, seed=4, dtype=dtype) * 3

    def logits_of(x):
        return torch.tanh(x.flatten(1) @ weights[0]) @ weights[1]

    return logits_of, lambda x: marginal_energy(logits_of(x))


LANGEVIN = Langevin(0.3, 0.2, pixel_grad_clip=0.5, clamp=(-1, 1))


def test_refinement_by_zero_steps_is_the_classifier_itself():
    logits_of, energy = smooth_model()
    x = uniform(5, 1, 2, 2, dtype=torch.float64)
    classify = refined(energy, logits_of, 0, LANGEVIN)
    assert torch.equal(classify(x), logits_of(x))
    assert torch.equal(classify(x.requires_grad_()), logits_of(x))


@pytest.mark.parametrize("noise_std, noise_first", [(0, False), (0.2, False), (0.2, True)])
@pytest.mark.parametrize("differentiable", [False, True])
def test_refinement_is_a_run_of_chains_from_the_input_and_then_the_classifier(
    noise_std, noise_first, differentiable
):
    logits_of, energy = smooth_model()
    x = uniform(5, 1, 2, 2, dtype=torch.float64)
    langevin = LANGEVIN._replace(noise_std=noise_std, noise_first=noise_first)
    expected = logits_of(run_chains(energy, x, 3, langevin, generator=generator(1)))
    classify = refined(energy, logits_of, 3, langevin, generator(1))
    logits = classify(x.requires_grad_(differentiable))
    assert torch.equal(logits, expected)
    assert logits.requires_grad == differentiable
    assert not torch.allclose(logits, logits_of(x))


@pytest.mark.parametrize("langevin", [LANGEVIN, Langevin(0.3, 0.2)])
def test_the_gradient_through_refinement_is_that_of_finite_differences(langevin):
    logits_of, energy = smooth_model()
    x = uniform(4, 1, 2, 2, dtype=torch.float64).requires_grad_()

    def classify(x):
        return refined(energy, logits_of, 3, langevin, generator())(x)

    assert torch.autograd.gradcheck(classify, (x,))
    through = torch.autograd.grad(classify(x)[:, 0].sum(), x)[0]
    end = run_chains(energy, x, 3, langevin, generator=generator()).requires_grad_()
    straight = torch.autograd.grad(logits_of(end)[:, 0].sum(), end)[0]
    assert not torch.allclose(through, straight, rtol=0.05)  # so the steps do count


def test_refinement_builds_a_graph_across_steps_only_if_one_is_wanted():
    logits_of, energy = smooth_model()
    x, graphs = uniform(5, 1, 2, 2, dtype=torch.float64), []

    def watched(x):
        graphs.append(x.grad_fn is not None)
        return energy(x)

    classify = refined(watched, logits_of, 3, LANGEVIN, generator())
    assert classify(x).grad_fn is None
    with torch.no_grad():
        assert classify(x.requires_grad_()).grad_fn is None
    assert graphs == [False] * 6
    classify(x)
    assert graphs[6:] == [False, True, True]


@pytest.mark.parametrize("noise_first", [False, True])
def test_a_langevin_step_can_be_differentiated_through_although_it_clamps_in_place(noise_first):
    x = uniform(6, 2, dtype=torch.float64).requires_grad_()
    noise = torch.randn(6, 2, generator=generator(), dtype=torch.float64)
    langevin = Langevin(0.2, 0.3, noise_first, pixel_grad_clip=1.0, clamp=(-0.7, 0.7))

    def step(x):
        return langevin_step(lambda x: x.pow(4).sum(1), x, langevin, noise, create_graph=True)[1]

    assert torch.autograd.gradcheck(step, (x,))
    assert (step(x).abs() == 0.7).any() and (step(x).abs() < 0.7).any()


def test_the_attack_through_refinement_knows_what_refinement_undoes():
    def energy(x):  # one step of 0.1 takes the first pixel to 0 and leaves the second
        return 10 * x[:, 0, 0, 0].square() / 2

    def logits_of(x):
        score = (x * torch.tensor([10.0, 1.0])).flatten(1).sum(1)
        return torch.stack([-score, score], 1)

    x, labels = torch.tensor([[0.1, 0.15], [-0.1, -0.25]]).view(2, 1, 1, 2), torch.tensor([1, 0])
    settings = {"attack_steps": 40, "attack_step_size": 0.025, "generator": generator()}
    classify = refined(energy, logits_of, 1, Langevin(0.1, 0))
    naive = pgd(logits_of, x, labels, "l2", 0.1, **settings)
    assert not naive.correct.any()
    assert torch.equal(right_labels(classify, naive.images), labels)  # that attack is undone
    adaptive = pgd(classify, x, labels, "l2", 0.1, **settings)
    assert adaptive.correct.tolist() == [False, True]  # eps is 0.2 here: below 0.25, above 0.15
    assert torch.equal(right_labels(classify, adaptive.images) == labels, adaptive.correct)


def test_the_cross_entropy_is_that_of_torch():
    logits = uniform(50, 7, bound=10, dtype=torch.float64).requires_grad_()
    labels, tolerance = torch.arange(50) % 7, {"rtol": 1e-6, "atol": 1e-8}
    ours = attacks._cross_entropy(logits, labels)
    theirs = nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(ours, theirs, **tolerance)  # softplus is linear past 20
    gradients = (torch.autograd.grad(loss.sum(), logits)[0] for loss in (ours, theirs))
    torch.testing.assert_close(*gradients, **tolerance)
