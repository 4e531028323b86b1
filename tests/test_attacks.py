"""Attacks: closed forms on linear classifiers, exact properties on small random networks."""

import math
import os

import pytest
import torch
from conftest import ROOT, generator
from torch import nn

from sgld_nrg.models import build_model, load_model, marginal_energy
from sgld_nrg.sgld import Langevin, langevin_step, run_chains
from sgld_nrg.support import attacks, data
from sgld_nrg.support import square as square_module
from sgld_nrg.support.attacks import LOSSES, THROUGH, apgd, refined, single_step, strongest
from sgld_nrg.support.ball import NORMS
from sgld_nrg.support.checkpoints import load_checkpoint
from sgld_nrg.support.errors import UserError
from sgld_nrg.support.report.study import FULL
from sgld_nrg.support.square import square

ATTACKS = [apgd, strongest, square]


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


def two_classes(score):
    """Return logits (N, 2) that are right for label 0 while score (N,) is above 0."""
    return torch.stack([score, torch.zeros_like(score)], 1)


def cnn(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model("small-cnn", num_classes=4, channels=1, image_size=8, width=4, depth=2)


def few(attack):
    """Return settings of the attack that make it quick."""
    return {"queries": 5} if attack is square else {"attack_steps": 3}


class MixedNetwork(nn.Module):
    """A network whose parts are in different modes, with one that differs in training: dropout."""

    def __init__(self):
        super().__init__()
        self.first, self.dropout, self.last = nn.Linear(16, 8), nn.Dropout(0.5), nn.Linear(8, 3)
        self.train()
        self.first.eval()
        self.last.bias.requires_grad_(False)

    def forward(self, x):
        assert not self.dropout.training and not self.last.weight.requires_grad
        return self.last(self.dropout(torch.tanh(self.first(x.flatten(1)))))

    def state(self):
        modes = [part.training for part in self.modules()]
        return modes, [parameter.requires_grad for parameter in self.parameters()]


# APGD


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("side", [0.999, 1.001])
def test_a_linear_classifier_flips_exactly_when_eps_passes_margin_over_dual_norm(norm, loss, side):
    model, x = Linear(), uniform(8, 2, 3, 3, bound=0.3)
    labels = right_labels(model, x)
    thresholds = model.margin(x, labels) / model.strength(norm) / 2  # of eps, on [0, 1]
    for image in thresholds.argsort()[[1, 4, 7]]:
        eps = float(thresholds[image]) * side
        correct = apgd(model, x, labels, norm, eps, loss=loss, generator=generator()).correct
        assert torch.equal(correct, thresholds > eps) and correct[image] == (side < 1)


@pytest.mark.parametrize("norm", NORMS)
def test_what_stands_is_left_at_the_closed_form_of_the_worst_image(norm):
    model, x, eps = Linear(bias=10), uniform(8, 2, 3, 3, bound=0.3), 0.05
    labels = torch.ones(8, dtype=torch.int64)
    attack = apgd(model, x, labels, norm, eps, generator=generator())
    lowered = model.margin(x, labels) - model.margin(attack.images, labels)
    torch.testing.assert_close(lowered, (2 * eps * model.strength(norm)).expand(8))
    assert attack.correct.all()


def test_the_linf_attack_is_optimal_when_the_pixel_range_binds():
    model, x, eps = Linear(bias=10), uniform(8, 2, 3, 3), 0.3
    attack = apgd(model, x, right_labels(model, x), "linf", eps, generator=generator())
    expected = (x - 2 * eps * model.weight.sign()).clamp(-1, 1)
    torch.testing.assert_close(attack.images, expected)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_every_image_that_is_tried_lies_in_the_ball_and_in_the_pixel_range(norm, attack):
    model, eps, seen = cnn(), 0.02, []
    x, order = uniform(16, 1, 8, 8).mul(1.5).clamp(-1, 1), math.inf if norm == "linf" else 2

    def logits_of(images):
        seen.append(images.detach())
        return model(images)

    labels = right_labels(model, x)
    result = attack(logits_of, x, labels, norm, eps, generator=generator(), **few(attack))
    for images in (*seen, result.images):
        assert images.abs().max() <= 1
        # what is broken is left out: each lies in the ball of its nearest clean image
        radii = torch.linalg.vector_norm((images[:, None] - x).flatten(2), order, dim=2)
        assert radii.amin(1).max() <= 2 * eps * (1 + 1e-4)
    assert not torch.equal(result.images, x)


@pytest.mark.parametrize("norm", NORMS)
def test_the_random_start_is_uniform_in_the_ball(norm):
    model, x, eps, images = Linear((1, 1, 2)), torch.zeros(20_000, 1, 1, 2), 0.2, 20_000
    labels = torch.zeros(images, dtype=torch.int64)
    apgd(model, x, labels, norm, eps, attack_steps=1, generator=generator())
    start = model.seen[1].flatten(1) / (2 * eps)  # the first call sees the clean images
    assert (start.mean(0).abs() < 5 * (1 / 3 / images) ** 0.5).all()
    if norm == "linf":
        assert (start.square().mean(0) - 1 / 3).abs().max() < 5 * (4 / 45 / images) ** 0.5
    else:  # the share of a disc's area within a radius is the radius squared: uniform on [0, 1]
        share = start.square().sum(1)
        assert abs(share.mean() - 1 / 2) < 5 * (1 / 12 / images) ** 0.5
        assert abs((share < 0.25).float().mean() - 0.25) < 5 * (0.25 * 0.75 / images) ** 0.5


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_eps_zero_leaves_the_images_clean_after_one_look(norm, attack):
    model, x, calls = cnn(), uniform(6, 1, 8, 8), []
    labels = right_labels(model, x)
    labels[:2] = (labels[:2] + 1) % 4

    def logits_of(images):
        calls.append(len(images))
        return model(images)

    result = attack(logits_of, x, labels, norm, 0, generator=generator(), **few(attack))
    assert torch.equal(result.images, x)
    assert result.correct.tolist() == [False] * 2 + [True] * 4
    assert calls[0] == 6 and calls[1:] in ([], [4])  # strongest is two attacks


def test_the_steps_are_halved_at_the_checkpoints_of_the_paper():
    expected = {22, 41, 57, 70, 80, 87, 93, 99}
    assert attacks._checkpoints(100) == expected
    assert attacks._checkpoints(50) == {11, 21, 29, 35, 40, 44, 47, 50}


def test_a_checkpoint_judges_the_steps_since_the_last_one(monkeypatch):
    halved, counts = attacks._halved, []
    monkeypatch.setattr(
        attacks, "_halved", lambda state, steps: halved(state, counts.append(steps) or steps)
    )
    x, labels = torch.zeros(2, 1, 1, 1), torch.zeros(2, dtype=torch.int64)
    apgd(lambda x: two_classes(5 + x.flatten()), x, labels, "linf", 0.1, attack_steps=101)
    assert counts == [23, 19, 16, 13, 10, 7, 6, 6]


def test_an_oscillating_step_is_halved_and_goes_on_from_the_best_point():
    # the loss is -|x|: a step of 2 * eps leaps over 0 again and again
    x, labels, seen = torch.zeros(20, 1, 1, 1), torch.zeros(20, dtype=torch.int64), []

    def logits_of(x):
        seen.append(x.flatten())
        return two_classes(1 + x.flatten().abs())

    result = apgd(logits_of, x, labels, "linf", 0.25, loss="dlr", generator=generator())
    assert result.images.abs().max() < 0.5 * 2**-6
    moves = torch.stack([image.detach() for image in seen[1:]]).diff(dim=0).abs()
    assert moves[-1].max() < 0.5 * 2**-4 < moves[:10].amax(0).min()


def fixed_length_pgd(logits_of, x, labels, eps, steps):
    """Return whether images survive the end of plain PGD for linf, of steps of 2.5 eps / steps."""
    images = x + uniform(*x.shape, bound=2 * eps)
    for _ in range(steps):
        images.requires_grad_()
        loss = nn.functional.cross_entropy(logits_of(images), labels, reduction="sum")
        step = 2 * 2.5 * eps / steps * torch.autograd.grad(loss, images)[0].sign()
        images = x + (images.detach() + step - x).clamp(-2 * eps, 2 * eps)
    return logits_of(images).argmax(1) == labels


def test_a_valley_that_steps_of_fixed_length_leap_over_is_found():
    eps = 0.1

    def logits_of(x):  # wrong only at the second pixel's edge, within 0.5 % of the first one's 0
        first, second = (x.flatten(1) / (2 * eps)).unbind(1)
        return two_classes(4 * first.abs() - 0.05 * second + 0.03)

    x, labels = torch.zeros(40, 1, 1, 2), torch.zeros(40, dtype=torch.int64)
    assert fixed_length_pgd(logits_of, x, labels, eps, 100).sum() > 20
    assert not apgd(logits_of, x, labels, "linf", eps, generator=generator()).correct.any()


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_is_spent_on_what_is_broken(attack):
    # ten images are wrong, ten lie at the border, ten stand
    x = uniform(30, 1, 4, 4, bound=0.1)
    x[:, 0, 0, 0] = torch.tensor([-0.9, 0.0, 0.9]).repeat_interleave(10)
    labels, calls = torch.zeros(30, dtype=torch.int64), []

    def logits_of(images):
        calls.append(len(images))
        return two_classes(10 * images[:, 0, 0, 0] + 0.01)

    settings = {"queries": 60} if attack is square else {"attack_steps": 20, "random_starts": 2}
    result = attack(logits_of, x, labels, "linf", 0.01, generator=generator(), **settings)
    assert result.correct.tolist() == [False] * 20 + [True] * 10
    assert calls[:2] == [30, 20]
    assert set(calls[len(calls) // 2 :]) == {10} and sum(calls) < 10 * len(calls) + 150


def test_one_unlucky_draw_breaks_nothing():
    def wrong_at(calls):
        looks = []

        def logits_of(x):
            looks.append(None)
            return two_classes(1 - 2.0 * (len(looks) in calls) + 0 * x.flatten(1).sum(1))

        x, labels = torch.zeros(2, 1, 1, 2), torch.zeros(2, dtype=torch.int64)
        return apgd(logits_of, x, labels, "linf", 0.1, attack_steps=5).correct

    assert wrong_at({4}).all()  # the second look at what is wrong is the fifth
    assert not wrong_at({4, 5}).any()


def decoy(x):
    """Four classes: the likeliest wrong one leads away from the second, which can be reached."""
    u = x.flatten(1)[:, 0] / 0.2
    zero = torch.zeros_like(u)
    return torch.stack([zero, -20 + 10 * u, 400 * (-0.95 - u), zero - 1000], 1)


def test_targets_find_what_the_cross_entropy_is_led_away_from():
    x, labels = torch.zeros(50, 1, 1, 1), torch.zeros(50, dtype=torch.int64)
    settings = {"attack_steps": 20, "generator": generator()}
    assert apgd(decoy, x, labels, "linf", 0.1, **settings).correct.sum() > 40
    one = apgd(decoy, x, labels, "linf", 0.1, loss="targeted", **settings)
    assert one.correct.sum() > 40  # the likeliest wrong class is the first target
    result = strongest(decoy, x, labels, "linf", 0.1, targets=2, **settings)
    assert not result.correct.any()
    assert (right_labels(decoy, result.images) != labels).all()


def test_the_losses_are_those_of_the_paper():
    logits = torch.tensor([[1.0, 5.0, 2.0, 4.0, 3.0]]).repeat(2, 1)
    labels, targets = torch.tensor([1, 3]), torch.tensor([2, 2])
    ratios = attacks._objective("dlr", logits, labels, targets)
    torch.testing.assert_close(ratios, torch.tensor([(4 - 5) / (5 - 3), (5 - 4) / (5 - 3)]))
    ratios = attacks._objective("targeted", logits, labels, targets)
    torch.testing.assert_close(ratios, torch.tensor([2.0 - 5, 2 - 4]) / (5 - 2.5))
    three = attacks._objective("targeted", logits[:, :3], torch.tensor([1, 0]), targets)
    torch.testing.assert_close(three, torch.tensor([2.0 - 5, 2 - 1]))


@pytest.mark.parametrize("norm, eps", [("linf", 0.05), ("l2", 0.25)])
@pytest.mark.parametrize("attack", ATTACKS)
def test_with_one_seed_a_longer_attack_only_ever_takes_images_from_the_defender(norm, eps, attack):
    model, x = cnn(), uniform(64, 1, 8, 8, bound=0.8)
    labels, short = right_labels(model, x), {"attack_steps": 1, "random_starts": 1}
    long = short | {"random_starts": 8}
    if attack is square:
        short, long = {"queries": 3}, {"queries": 100}
    if attack is strongest:
        short, long = ({"attack_steps": 1, "targets": n} for n in (1, 3))
    weak, strong = (
        attack(model, x, labels, norm, eps, generator=generator(1), **settings)
        for settings in (short, long)
    )
    if attack is not square:  # whose squares shrink by the share of all queries
        assert not (strong.correct & ~weak.correct).any()
    assert strong.correct.sum() <= weak.correct.sum() < 64


@pytest.mark.parametrize("norm, eps", [("linf", 0.05), ("l2", 0.25)])
def test_more_steps_do_not_help_the_defender(norm, eps):
    model, x = cnn(), uniform(64, 1, 8, 8, bound=0.8)
    labels = right_labels(model, x)
    survivors = [
        int(apgd(model, x, labels, norm, eps, attack_steps=n, generator=generator()).correct.sum())
        for n in (1, 8, 60)
    ]
    assert survivors[0] >= survivors[1] - 1 and survivors[1] >= survivors[2] - 1
    assert survivors[2] <= survivors[0] < 64


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("norm, eps", [("linf", 0.05), ("l2", 0.25)])
def test_correct_is_what_the_model_says_of_the_kept_images(attack, norm, eps):
    model, x = cnn(), uniform(64, 1, 8, 8, bound=0.8)
    labels = right_labels(model, x)
    labels[:5] = (labels[:5] + 1) % 4
    settings = {"queries": 50} if attack is square else {"attack_steps": 10}
    result = attack(model, x, labels, norm, eps, generator=generator(), **settings)
    assert torch.equal(right_labels(model, result.images) == labels, result.correct)
    assert 0 < result.correct.sum() < 59


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_confidence_beyond_float_precision_does_not_stop_the_attack(norm, loss):
    weight = uniform(1, 4, 4, seed=2)

    # a lead of 60: softmax - onehot is 0 in float32, and so is the square of exp(-60)
    def logits_of(x):
        return two_classes(60 + 200 * (x * weight).flatten(1).sum(1))

    x, labels = torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)
    threshold = 60 / 200 / 2 / float(weight.abs().sum() if norm == "linf" else weight.norm())
    for eps, stands in ((0.99 * threshold, True), (1.01 * threshold, False)):
        attack = apgd(logits_of, x, labels, norm, eps, loss=loss, generator=generator())
        assert attack.correct.tolist() == [stands] * 2
    attack = apgd(logits_of, x, labels, norm, threshold / 2, loss=loss, generator=generator())
    torch.testing.assert_close(logits_of(attack.images)[:, 0], torch.tensor([30.0, 30]))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_zero_gradient_moves_nothing_and_makes_no_nan(norm, loss):
    x = uniform(4, 1, 2, 2, bound=0.5)
    labels = torch.tensor([0, 0, 1, 1])

    def logits_of(x):
        return x.flatten(1) * 0

    attack = apgd(logits_of, x, labels, norm, 0.1, loss=loss, generator=generator())
    assert torch.equal(attack.correct, labels == 0)  # equal logits fall to the first class
    assert attack.images.isfinite().all()


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_parameter_gets_a_gradient_and_every_flag_comes_back(attack):
    network, x, labels = MixedNetwork(), uniform(5, 1, 4, 4), torch.arange(5) % 3
    before, x_before = network.state(), x.clone()

    def logits_of(images):
        return network(images)

    def attacked(logits_of, **named):
        return attack(
            logits_of, x, labels, "l2", 0.1, generator=generator(), **named, **few(attack)
        )

    named = attacked(logits_of, module=network)
    found = [attacked(owner) for owner in (network, network.forward)]  # a Module is found by itself
    assert network.state() == before
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(x, x_before) and not x.requires_grad
    assert all(torch.equal(each.images, named.images) for each in found)
    assert not any(tensor.requires_grad for tensor in named)


@pytest.mark.parametrize("attack", ATTACKS)
def test_without_a_module_parameters_still_get_no_gradient(attack):
    network, x = cnn(), uniform(3, 1, 8, 8).requires_grad_()
    labels = torch.zeros(3, dtype=torch.int64)
    result = attack(lambda x: network(x), x, labels, "linf", 0.1, **few(attack))
    assert all(each.grad is None and each.requires_grad for each in network.parameters())
    assert x.grad is None and not any(tensor.requires_grad for tensor in result)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("norm", NORMS)
def test_the_attack_works_under_no_grad_and_repeats_with_its_seed(attack, norm):
    model, x = cnn(), uniform(8, 1, 8, 8)
    labels, before = right_labels(model, x), torch.get_rng_state()

    def attacked(seed):
        return attack(model, x, labels, norm, 0.02, generator=generator(seed), **few(attack))

    with torch.no_grad():
        first = attacked(3)
    second, other = attacked(3), attacked(4)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert not torch.equal(first.images, other.images)
    assert torch.equal(before, torch.get_rng_state())


def test_several_draws_average_the_loss_and_its_gradient():
    weights, calls, draws = uniform(5, 1, 2, 2, seed=7, dtype=torch.float64), [], 5

    def logits_of(x):  # draw number n has weight n
        score = (x * weights[len(calls) % draws]).flatten(1).sum(1)
        calls.append(None)
        return torch.stack([torch.zeros_like(score), score], 1)

    x, labels = uniform(3, 1, 2, 2, bound=0.5, dtype=torch.float64), torch.tensor([0, 1, 1])
    losses, gradient, wrong = attacks._look(logits_of, "ce", draws, x, labels, labels)
    sign = 1 - 2 * labels
    scores = torch.stack([(x * weight).flatten(1).sum(1) for weight in weights])
    torch.testing.assert_close(losses, nn.functional.softplus(sign * scores).mean(0))
    # d softplus(a) / dx for a = -margin, per draw
    slopes = (torch.sigmoid(sign * scores) * sign).view(draws, 3, 1, 1, 1)
    torch.testing.assert_close(gradient, (slopes * weights[:, None]).mean(0))
    assert torch.equal(wrong, torch.sigmoid(sign * scores).mean(0) > 0.5)


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
    attack = apgd(logits_of, x, labels, "linf", 0.1, draws=3, generator=generator(), **settings)
    assert torch.equal(attack.correct, labels == decided)


def test_a_lone_draw_is_decided_by_its_logits_where_the_probabilities_tie():
    def logits_of(x):
        return torch.tensor([0.0, 1e-9]) + 0 * x.flatten(1)

    x = torch.zeros(1, 1, 1, 1)
    assert apgd(logits_of, x, torch.tensor([1]), "linf", 0.1, attack_steps=1).correct.all()


def test_a_loss_that_stops_being_finite_is_named_with_its_step():
    def failing(call):
        calls = []

        def logits_of(x):
            calls.append(None)
            score = torch.full_like(x.flatten(1)[:, 0], math.nan if len(calls) > call else 1)
            return two_classes(score + 0 * x.flatten(1)[:, 0])

        return logits_of

    x, labels = torch.zeros(2, 1, 1, 2), torch.zeros(2, dtype=torch.int64)
    cases = (
        (0, 1, "clean images"),
        (3, 1, "step 2 of 5 of random start 0"),
        (6, 1, "step 5 of 5 of random start 0"),
        (9, 2, "step 2 of 5 of random start 1"),
    )
    for call, starts, message in cases:
        settings = {"attack_steps": 5, "random_starts": starts, "generator": generator()}
        with pytest.raises(FloatingPointError, match=message):
            apgd(failing(call), x, labels, "linf", 0.1, **settings)
    with pytest.raises(FloatingPointError, match="query 3 of 9"):
        square(failing(4), x, labels, "linf", 0.1, queries=9, generator=generator())


BAD = [{"norm": "l1"}, {"eps": -0.1}, {"eps": math.nan}, {"eps": math.inf}]
BAD += [{"x": torch.full((2, 1, 1, 2), value)} for value in (1.1, math.nan)]
OF_APGD = [{"attack_steps": 0}, {"random_starts": 0}, {"draws": 0}, {"loss": "hinge"}]


@pytest.mark.parametrize(
    "attack, settings",
    [(apgd, each) for each in BAD + OF_APGD]
    + [(square, each) for each in [*BAD, {"queries": 0}]]
    + [(strongest, each) for each in [*BAD, *OF_APGD[:3], {"targets": 0}]],
)
def test_an_attack_that_means_nothing_is_refused_by_name(attack, settings):
    usable = {"x": torch.zeros(2, 1, 1, 2), "labels": torch.tensor([0, 1])}
    usable |= {"norm": "linf", "eps": 0.1}
    with pytest.raises(ValueError, match=next(iter(settings))):
        attack(lambda x: x.flatten(1), **{**usable, **settings})


@pytest.mark.parametrize("attack", [*ATTACKS, single_step])
@pytest.mark.parametrize("labels", [torch.tensor([0]), torch.tensor([[0], [1]])])
def test_labels_that_are_not_one_an_image_are_refused(attack, labels):
    with pytest.raises(ValueError, match=r"labels must have shape \(2,\)"):
        attack(lambda x: x.flatten(1), torch.zeros(2, 1, 1, 2), labels, "linf", 0.1)


@pytest.mark.parametrize("attack", [apgd, strongest, single_step])
def test_images_without_a_gradient_are_refused_with_what_to_do(attack):
    x, labels = torch.zeros(2, 1, 1, 2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"x\.float\(\)"):
        attack(lambda x: x.flatten(1), x.long(), labels, "linf", 0.1)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"use torch\.no_grad"):
        attack(lambda x: x.flatten(1), x, labels, "linf", 0.1)


@pytest.mark.parametrize("norm, eps", [("linf", 0.02), ("l2", 0.1)])
@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_on_pixels_from_0_to_1_is_that_on_the_scaled_images(norm, eps, attack):
    logits_of, _ = smooth_model(side=8)
    x = uniform(40, 1, 8, 8, dtype=torch.float64)
    labels = right_labels(logits_of, x)
    labels[:5] = (labels[:5] + 1) % 3

    def logits_of_unit(x):
        return logits_of(2 * x - 1)

    scaled = attack(logits_of, x, labels, norm, eps, generator=generator(), **few(attack))
    settings = {"pixel_range": (0, 1), "generator": generator(), **few(attack)}
    unit = attack(logits_of_unit, (x + 1) / 2, labels, norm, eps, **settings)
    torch.testing.assert_close(2 * unit.images - 1, scaled.images)
    assert torch.equal(unit.correct, scaled.correct) and 0 < scaled.correct.sum() < 40
    assert unit.images.min() >= 0 and unit.images.max() <= 1
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\]"):
        attack(logits_of_unit, x, labels, norm, eps, **settings)


@pytest.mark.parametrize(
    "value, images, pixel_range, warned",
    [
        (0.5, 8, (-1, 1), True),
        (0.5, 7, (-1, 1), False),  # too few to tell
        (-0.5, 8, (-1, 1), False),
        (0.0, 8, (-1, 1), False),
        (0.5, 8, (0, 1), False),
    ],
)
def test_images_that_may_be_scaled_to_0_to_1_are_warned_of(
    value, images, pixel_range, warned, recwarn
):
    x, labels = torch.full((images, 1, 1, 2), value), torch.zeros(images, dtype=torch.int64)
    settings = {"attack_steps": 1, "pixel_range": pixel_range}
    apgd(lambda x: x.flatten(1), x, labels, "linf", 0.1, **settings)
    found = ["give pixel_range=(0, 1)" in str(warning.message) for warning in recwarn]
    assert found == [True] * warned


# Square


def masked(x):
    """Two classes with the linear decision of the sum, in steps too small to see: no gradient."""
    return two_classes(0.4 + (x.flatten(1).sum(1) * 1e4).round() / 1e4)


@pytest.mark.parametrize("norm, eps", [("linf", 0.01), ("l2", 0.05)])
def test_square_finds_what_masked_gradients_hide(norm, eps):
    x, labels = torch.zeros(20, 1, 8, 8), torch.zeros(20, dtype=torch.int64)
    assert strongest(masked, x, labels, norm, eps, generator=generator()).correct.sum() > 15
    assert square(masked, x, labels, norm, eps, generator=generator()).correct.sum() < 5


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("channels, height, width", [(1, 8, 8), (3, 9, 6), (1, 2, 3)])
def test_squares_use_the_whole_ball_and_come_near_the_worst_image(norm, channels, height, width):
    model, eps = Linear((channels, height, width), bias=100), 0.02
    x, labels = torch.zeros(6, channels, height, width), torch.ones(6, dtype=torch.int64)
    result = square(model, x, labels, norm, eps, queries=800, generator=generator())
    for images in model.seen[1:]:
        if norm == "linf":
            torch.testing.assert_close(images.abs(), torch.full_like(images, 2 * eps))
        else:
            torch.testing.assert_close(images.flatten(1).norm(dim=1), torch.full((6,), 2 * eps))
    lowered = model.margin(x, labels) - model.margin(result.images, labels)
    assert (lowered > 0.45 * 2 * eps * model.strength(norm)).all()


@pytest.mark.parametrize("norm, name", [("linf", "_squares"), ("l2", "_pyramids")])
def test_squares_shrink_by_the_share_of_the_queries_that_are_spent(norm, name, monkeypatch):
    shares = []
    monkeypatch.setattr(square_module, name, lambda delta, share, *_: shares.append(share) or delta)
    x, labels = torch.zeros(2, 1, 5, 5), torch.ones(2, dtype=torch.int64)
    square(Linear((1, 5, 5), bias=100), x, labels, norm, 0.1, queries=100)
    firsts = [shares.index(share) for share in sorted(set(shares), reverse=True)]
    assert firsts == [0, 1, 2, 5, 10, 20, 40, 60, 80]  # at 1 the first two are due
    assert shares[0] == 0.8 and shares[1] == 0.2 and shares[-1] == 0.8 / 2**9


def test_each_image_gets_its_own_square_and_all_places_have_their_turn():
    changed = torch.zeros(6, 5)
    for seed in range(40):
        delta = torch.zeros(8, 1, 6, 5)
        moved = square_module._squares(delta, 0.13, 1.0, generator(seed))[:, 0] != 0
        assert (moved.flatten(1).sum(1) == 4).all()
        assert len({tuple(each.flatten().tolist()) for each in moved}) > 1
        changed += moved.sum(0)
    assert (changed > 0).all()


# The cheap attack of training


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


# Refinement


def smooth_model(side=2):
    """Return logits_of and the energy of a small smooth network on (N, 1, side, side)."""
    weights = uniform(side**2, 6, seed=3).double(), uniform(6, 3, seed=4).double() * 3

    def logits_of(x):
        return torch.tanh(x.flatten(1) @ weights[0]) @ weights[1]

    return logits_of, lambda x: marginal_energy(logits_of(x))


LANGEVIN = Langevin(0.3, 0.2, pixel_grad_clip=0.5, clamp=(-1, 1))


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
    with pytest.raises(ValueError, match="through"):
        refined(lambda x: x.sum(1), lambda x: x, 1, Langevin(0.1, 0.1), through="walls")


def test_refinement_by_zero_steps_is_the_classifier_itself():
    logits_of, energy = smooth_model()
    x = uniform(5, 1, 2, 2, dtype=torch.float64)
    classify = refined(energy, logits_of, 0, LANGEVIN)
    assert torch.equal(classify(x), logits_of(x))
    assert torch.equal(classify(x.requires_grad_()), logits_of(x))


@pytest.mark.parametrize("noise_std, noise_first", [(0, False), (0.2, False), (0.2, True)])
@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("through", THROUGH)
def test_refinement_is_a_run_of_chains_from_the_input_and_then_the_classifier(
    noise_std, noise_first, differentiable, through
):
    logits_of, energy = smooth_model()
    x = uniform(5, 1, 2, 2, dtype=torch.float64)
    langevin = LANGEVIN._replace(noise_std=noise_std, noise_first=noise_first)
    expected = logits_of(run_chains(energy, x, 3, langevin, generator=generator(1)))
    classify = refined(energy, logits_of, 3, langevin, generator(1), through=through)
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


def test_each_way_through_refinement_has_its_gradient_on_a_quadratic_energy():
    def energy(x):  # a step of 0.1 leaves 0.7 of x
        return 3 * x.flatten(1).square().sum(1) / 2

    def logits_of(x):  # the gradient of the first logit tells where it is taken
        return two_classes(x.flatten(1).square().sum(1) / 2)

    x = uniform(4, 1, 2, 2, dtype=torch.float64).requires_grad_()
    for through, factor in (("steps", 0.7**4), ("straight", 0.7**2), ("around", 1)):
        classify = refined(energy, logits_of, 2, Langevin(0.1, 0), through=through)
        gradient = torch.autograd.grad(classify(x)[:, 0].sum(), x)[0]
        torch.testing.assert_close(gradient, factor * x)


def undone(x):
    """An energy of which a step of 0.1 takes the first of two pixels to 0 and leaves the second."""
    return 10 * x[:, 0, 0, 0].square() / 2


def first_pixel(x):
    """Two classes that look at the first pixel above all."""
    score = (x * torch.tensor([10.0, 1.0])).flatten(1).sum(1)
    return torch.stack([-score, score], 1)


def test_the_attack_through_refinement_knows_what_refinement_undoes():
    x, labels = torch.tensor([[0.1, 0.15], [-0.1, -0.25]]).view(2, 1, 1, 2), torch.tensor([1, 0])
    survived = {}
    for through in THROUGH:
        classify = refined(undone, first_pixel, 1, Langevin(0.1, 0), through=through)
        attack = apgd(classify, x, labels, "l2", 0.1, generator=generator())
        assert torch.equal(right_labels(classify, attack.images) == labels, attack.correct)
        survived[through] = attack.correct.tolist()
    naive = apgd(first_pixel, x, labels, "l2", 0.1, generator=generator())
    assert not naive.correct.any()
    assert torch.equal(right_labels(classify, naive.images), labels)  # that attack is undone
    # eps is 0.2 here: below 0.25, above 0.15
    assert survived["steps"] == [False, True]
    assert survived["straight"] == survived["around"] == [True, True]


def test_a_gradient_straight_through_finds_what_chaotic_steps_hide():
    def energy(x):  # its gradient of up to 0.01 turns so fast that steps of 1 seem to reverse x
        return (1e-4 * (300 * x).cos()).flatten(1).sum(1)

    weight = uniform(1, 3, 3, seed=2)

    def logits_of(x):
        return two_classes(0.5 + (x * weight).flatten(1).sum(1))

    x, labels = uniform(40, 1, 3, 3, bound=0.2), torch.zeros(40, dtype=torch.int64)
    correct = {}
    for through in THROUGH:
        classify = refined(energy, logits_of, 3, Langevin(1, 0), through=through)
        settings = {"attack_steps": 20, "generator": generator()}
        correct[through] = int(apgd(classify, x, labels, "linf", 0.08, **settings).correct.sum())
    assert correct["straight"] < correct["steps"] - 5


def test_the_cross_entropy_is_that_of_torch():
    logits = uniform(50, 7, bound=10, dtype=torch.float64).requires_grad_()
    labels, tolerance = torch.arange(50) % 7, {"rtol": 1e-6, "atol": 1e-8}
    ours = attacks._cross_entropy(logits, labels)
    theirs = nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(ours, theirs, **tolerance)  # softplus is linear past 20
    gradients = (torch.autograd.grad(loss.sum(), logits)[0] for loss in (ours, theirs))
    torch.testing.assert_close(*gradients, **tolerance)


# The report's attack beside a stronger one


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_the_report_is_within_two_points_of_a_far_stronger_attack(norm):
    try:
        dataset = data.load("mnist", os.environ["SGLD_NRG_DATA"])
    except (KeyError, UserError):
        pytest.skip("needs MNIST in SGLD_NRG_DATA")
    x, labels = (part[:200] for part in dataset.val)  # tests do not look at the test set
    checkpoint = load_checkpoint(ROOT / "results" / "mnist.pt", "jem")
    model, eps = load_model(checkpoint).eval(), FULL["epsilons"]["grey"][norm][0]
    counts = {name: FULL[name] for name in ("attack_steps", "random_starts", "targets")}
    ours = strongest(model, x, labels, norm, eps, generator=generator(), **counts)
    rows = ours.correct.nonzero().squeeze(1)
    settings = {"generator": generator(1), "attack_steps": 150, "random_starts": 3, "targets": 6}
    further = strongest(model, x[rows], labels[rows], norm, eps, **settings)
    assert (~further.correct).sum() <= 0.02 * 200
