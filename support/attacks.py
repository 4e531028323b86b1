"""White-box attacks on classifiers of images: PGD, and attacks through refinement by SGLD.

Images have pixels in [-1, 1], as everywhere in this project; eps and attack_step_size are in pixels
on [0, 1], as papers state them, and are doubled here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sgld_nrg.sgld import (
    Energy,
    Langevin,
    check_start,
    frozen,
    langevin_step,
    module_of,
    run_chains,
)

NORMS = ("linf", "l2")

Logits = Callable[[Tensor], Tensor]


class Attack(NamedTuple):
    """What `pgd` found.

    images: (N, C, H, W) float in [-1, 1], the most harmful image found inside each ball.
    correct: (N,) bool, whether the label survived on the clean image and at the end of every start.
    losses: (attack_steps + 1,) float, mean cross-entropy over the images (nat) along the attack
        from the first random start, that start first.
    """

    images: Tensor
    correct: Tensor
    losses: Tensor


def pgd(
    logits_of: Logits,
    x: Tensor,
    labels: Tensor,
    norm: str,
    eps: float,
    *,
    attack_steps: int = 40,
    attack_step_size: float | None = None,
    random_starts: int = 1,
    draws: int = 1,
    generator: torch.Generator | None = None,
    module: nn.Module | None = None,
    pixel_range: tuple[float, float] = (-1, 1),
) -> Attack:
    """Attack images by projected gradient ascent on the cross-entropy, from random starts.

    delta <- project(delta + attack_step_size * g),
    g = sign(dL/dx) for linf, (dL/dx) / ||dL/dx||_2 for l2, L = -log softmax(f(x + delta))[label];
    first the ball, then the pixel range, and the result lies in both.

    logits_of: x (N, C, H, W) -> logits (N, K), differentiable and row by row; it may be random.
    x: (N, C, H, W) float, pixels in pixel_range. labels: (N,) int64 in 0..K-1.
    norm: "linf", or "l2" over all pixels and channels of an image.
    eps: >= 0, radius of the ball, in pixels on [0, 1]; 0 gives the clean images back.
    attack_steps: >= 1. attack_step_size: > 0, in pixels on [0, 1]; None: 2.5 * eps / attack_steps.
    random_starts: >= 1. With one seed the first starts of many are the starts of few, so more
        never look safer, if logits_of is deterministic or draws from the same generator.
    draws: >= 1, of a random logits_of, over which the gradient of the loss is averaged (expectation
        over transformation) and whose mean softmax decides the class.
    generator: torch.Generator on x's device, for the random starts.
    pixel_range: (low, high) of the pixels, which the attack stays in: (0, 1) for a network that
        takes such images. A warning says so if none of the images has a pixel below 0.
    module: the network behind logits_of, held in eval mode with frozen parameters meanwhile (see
        `sgld.frozen`); found without being named if logits_of is a Module or a method of one.

    An image's candidates are the clean image and the end of each start; kept is one that is
    misclassified if there is any, and of several the one of highest loss. So an image that is wrong
    without attack is never correct.

    Returns an Attack, detached. Raises ValueError for unusable settings and FloatingPointError,
    with the step, if the loss stops being finite.

    A linear classifier of one pixel, x >= 0 or not: an attack of 0.1 on [0, 1] flips what lies
    within 0.2 of 0.

    >>> x, labels = torch.tensor([0.1, -0.5]).view(2, 1, 1, 1), torch.tensor([1, 0])
    >>> pgd(lambda x: torch.cat([-x.flatten(1), x.flatten(1)], 1), x, labels, "linf", 0.1).correct
    tensor([False,  True])

    Sources: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks" (arXiv
    1706.06083); Athalye et al., "Obfuscated Gradients Give a False Sense of Security" (arXiv
    1802.00420), section 4.3.
    """
    _check(norm, eps, attack_step_size)
    counts = {"attack_steps": attack_steps, "random_starts": random_starts, "draws": draws}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, not {value}")
    low, high = pixel_range
    _check_images(x, labels, low, high)
    radius = (high - low) * eps
    attack_step_size = 2.5 * eps / attack_steps if attack_step_size is None else attack_step_size
    length, x = (high - low) * attack_step_size, x.detach()
    first = None
    with frozen(module or module_of(logits_of)):
        best, (wrong, loss) = x, _evaluate(logits_of, x, labels, draws)
        _check_finite(loss.mean()[None], "on the clean images")
        for start in range(random_starts):
            images = (x + _random_start(x, norm, radius, generator)).clamp_(low, high)
            means = []
            for _ in range(attack_steps):
                now, gradient = _loss_and_gradient(logits_of, images, labels, draws)
                means.append(now.mean())
                delta = _project(images - x + length * _direction(gradient, norm), norm, radius)
                # x is in the pixel range: clamping only shrinks delta, which stays in the ball
                images = (x + delta).clamp_(low, high)
            now_wrong, now = _evaluate(logits_of, images, labels, draws)
            losses = torch.stack([*means, now.mean()])
            _check_finite(losses, f"of {attack_steps} of random start {start}")
            better = (now_wrong & ~wrong) | ((now_wrong == wrong) & (now > loss))
            best = torch.where(better.view(-1, *[1] * (x.dim() - 1)), images, best)
            loss, wrong = torch.where(better, now, loss), wrong | now_wrong
            first = losses if first is None else first
    assert first is not None
    return Attack(best, ~wrong, first)


def single_step(
    logits_of: Logits,
    x: Tensor,
    labels: Tensor,
    norm: str,
    eps: float,
    *,
    attack_step_size: float | None = None,
    generator: torch.Generator | None = None,
    module: nn.Module | None = None,
) -> Tensor:
    """Attack images by one step from a random start: the cheap attack of adversarial training.

    norm, eps, generator, module: as in `pgd`. x: (N, C, H, W) float; pixels beyond [-1, 1] are
    clamped first. attack_step_size: > 0, in pixels on [0, 1]; None: 1.25 * eps.

    Returns images (N, C, H, W) in [-1, 1], detached: where the step leads, harmful or not.
    Raises ValueError for unusable settings.
    Source: Wong et al., "Fast is better than free: Revisiting adversarial training" (arXiv
    2001.03994), algorithm 3.
    """
    _check(norm, eps, attack_step_size)
    x = x.detach().clamp(-1, 1)
    _check_labels(x, labels)
    radius, length = 2 * eps, 2 * (1.25 * eps if attack_step_size is None else attack_step_size)
    delta = _random_start(x, norm, radius, generator)
    with frozen(module or module_of(logits_of)):
        _, gradient = _loss_and_gradient(logits_of, (x + delta).clamp_(-1, 1), labels, 1)
    moved = _project(delta + length * _direction(gradient, norm), norm, radius)
    return (x + moved).clamp_(-1, 1)


def refined(
    energy: Energy,
    logits_of: Logits,
    steps: int,
    langevin: Langevin,
    generator: torch.Generator | None = None,
) -> Logits:
    """Return a classifier behind some Langevin steps down the energy from its input: JEM-K.

    x_0 = x, x_{k+1} = x_k - step_size * dE/dx_k + noise_std * eps_k, logits = f(x_K), K = steps.

    energy: x (N, ...) -> (N,), twice differentiable in x for attacks. logits_of: x -> (N, K).
    steps: >= 0; 0 is logits_of itself. langevin, generator: as in `sgld.run_chains`.

    The callable differentiates through all the steps if x requires grad, so `pgd` on it is an
    adaptive attack (with second derivatives, and steps times the memory); otherwise each step's
    graph is freed at once. It leaves the network's modes alone: pass module= to `pgd`, or hold it
    in `sgld.frozen`. Raises ValueError for unusable settings.
    Source: arXiv 1912.03263, section 5.4, without its averaging over chains (see draws of `pgd`).
    """
    langevin.check()  # here rather than at the first call
    if steps < 0:
        raise ValueError(f"steps must be 0 or more, not {steps}")

    def refined_logits(x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return logits_of(run_chains(energy, x, steps, langevin, generator=generator))
        for _ in range(steps):
            noise = langevin.draw_noise(x, generator)
            _, x = langevin_step(energy, x, langevin, noise, create_graph=True)
        return logits_of(x)

    return refined_logits


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log softmax(logits)[label], (N,): softplus(logsumexp of the others - label's logit).

    Its gradient keeps full precision on confident images. The gradient softmax - onehot does not:
    in float32 it has lost the label's own logit once that leads by 17, which stops an attack and
    looks like robustness.
    """
    labels = labels[:, None]
    others = logits.scatter(1, labels, -torch.inf).logsumexp(1)
    return nn.functional.softplus(others - logits.gather(1, labels).squeeze(1))


def _loss_and_gradient(
    logits_of: Logits, x: Tensor, labels: Tensor, draws: int
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy (N,) and its gradient in x, averaged over draws of logits_of."""
    losses: Any = 0
    gradients: Any = 0
    for _ in range(draws):
        part = x.detach().requires_grad_()
        with torch.enable_grad():
            loss = _cross_entropy(logits_of(part), labels)
            gradients = gradients + torch.autograd.grad(loss.sum(), part)[0] / draws
        losses = losses + loss.detach() / draws
    return losses, gradients


@torch.no_grad()
def _evaluate(logits_of: Logits, x: Tensor, labels: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Return whether the mean softmax misses the label, (N,) bool, and the mean loss, (N,)."""
    losses: Any = 0
    probabilities: Any = 0
    for _ in range(draws):
        logits = logits_of(x)
        losses = losses + _cross_entropy(logits, labels) / draws
        # a lone draw is judged by its logits: float32 probabilities tie when the logits do not
        probabilities = logits if draws == 1 else probabilities + logits.softmax(1)
    return probabilities.argmax(1) != labels, losses


def _norms(x: Tensor) -> Tensor:
    """Return the L2 norm of each image, (N, 1, ..., 1)."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())), keepdim=True)


def _direction(gradient: Tensor, norm: str) -> Tensor:
    """Return the unit step of steepest ascent; a zero gradient gives zero."""
    if norm == "linf":
        return gradient.sign()
    tiny = torch.finfo(gradient.dtype).tiny
    # scaled to 1 first: the square of a confident image's gradient of 1e-25 is 0 in float32
    largest = gradient.abs().amax(tuple(range(1, gradient.dim())), keepdim=True)
    gradient = gradient / largest.clamp_min(tiny)
    return gradient / _norms(gradient).clamp_min(tiny)


def _project(delta: Tensor, norm: str, radius: float) -> Tensor:
    """Return the point of the ball that is nearest to delta."""
    if norm == "linf":
        return delta.clamp(-radius, radius)
    tiny = torch.finfo(delta.dtype).tiny
    return delta * (radius / _norms(delta).clamp_min(tiny)).clamp_max(1)


def _random_start(x: Tensor, norm: str, radius: float, generator: torch.Generator | None) -> Tensor:
    """Draw uniformly from the ball; for l2 a random direction, at a share U^(1/D) of the radius."""
    settings: dict[str, Any] = {"dtype": x.dtype, "device": x.device, "generator": generator}
    if norm == "linf":
        return (2 * torch.rand(x.shape, **settings) - 1) * radius
    direction = _direction(torch.randn(x.shape, **settings), norm)
    share = torch.rand((len(x), *[1] * (x.dim() - 1)), **settings)
    return direction * radius * share ** (1 / x[0].numel())


def _check(norm: str, eps: float, attack_step_size: float | None) -> None:
    """Refuse settings that cannot mean anything."""
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; choose from {', '.join(NORMS)}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be 0 or a positive number, not {eps}")
    if attack_step_size is not None and not 0 < attack_step_size < float("inf"):
        raise ValueError(f"attack_step_size must be a positive number, not {attack_step_size}")


def _check_labels(x: Tensor, labels: Tensor) -> None:
    """Refuse images without a gradient, and labels that are not one an image."""
    check_start(x)
    if labels.shape != (len(x),):
        raise ValueError(f"labels must have shape ({len(x)},), one an image: {tuple(labels.shape)}")


def _check_images(x: Tensor, labels: Tensor, low: float, high: float) -> None:
    """Refuse images that are not scaled, and warn of some that may be scaled otherwise."""
    _check_labels(x, labels)
    if not ((x >= low) & (x <= high)).all():
        raise ValueError(f"x must have pixels in [{low}, {high}]: scale the images first")
    if low < 0 and x.numel() and x.min() >= 0 and x.max() > 0:
        warnings.warn(
            "no image has a pixel below 0: if they are scaled to [0, 1], give pixel_range=(0, 1)",
            stacklevel=3,
        )


def _check_finite(losses: Tensor, where: str) -> None:
    """Raise FloatingPointError for the first of the mean losses, one a step, that is not finite."""
    finite = torch.isfinite(losses)
    if not finite.all():
        step = int((~finite).nonzero()[0])
        raise FloatingPointError(f"the loss is {float(losses[step])} at step {step} {where}")
