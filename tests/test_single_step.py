"""The one attack step of adversarial training: where it starts and how far it goes."""

import pytest
import torch
from conftest import generator
from torch.nn.functional import cross_entropy, linear, normalize

from sgld_nrg.support.attacks import single_step
from sgld_nrg.support.ball import NORMS

EPS = 0.05
RADIUS = 2 * EPS  # in pixels on [-1, 1]; eps is in pixels on [0, 1]


def attack_at_grey(norm):
    """Attack grey images; returns where the gradient was taken, it, and where the step led."""
    x, labels = torch.zeros(500, 1, 4, 4), torch.arange(500) % 3
    weights, seen = torch.randn(3, 16, generator=generator(1)), []

    def logits_of(x):
        seen.append(x)
        return linear(x.flatten(1), weights)

    images = single_step(logits_of, x, labels, norm, EPS, generator=generator())
    start = seen[0].detach().requires_grad_()
    loss = cross_entropy(linear(start.flatten(1), weights), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, start)
    return start.detach().flatten(1), gradient.flatten(1), images.flatten(1)


@pytest.mark.parametrize("norm", NORMS)
def test_a_single_step_starts_uniformly_in_the_ball(norm):
    start, _, _ = attack_at_grey(norm)
    if norm == "linf":
        values, edges = start.flatten() / RADIUS, (-1, 1)
    else:  # the volume within a radius r goes with r^16
        values, edges = (start.norm(dim=1) / RADIUS) ** 16, (0, 1)
    counts = torch.histc(values, 5, *edges)
    assert counts.sum() == len(values)
    share = len(values) / 5
    assert ((counts - share).abs() < 5 * share**0.5).all()


@pytest.mark.parametrize("norm", NORMS)
def test_a_single_step_goes_a_quarter_farther_than_the_radius_and_back_into_the_ball(norm):
    start, gradient, images = attack_at_grey(norm)
    if norm == "linf":
        wanted = (start + 1.25 * RADIUS * gradient.sign()).clamp(-RADIUS, RADIUS)
    else:
        moved = start + 1.25 * RADIUS * normalize(gradient)
        wanted = moved * (RADIUS / moved.norm(dim=1, keepdim=True)).clamp_max(1)
    torch.testing.assert_close(images, wanted)
