"""White-box attacks on classifiers of images: PGD, attacks through refinement by SGLD, distal adversarials.

Images have pixels in [-1, 1], as everywhere in this project; eps and step_size are in pixels on [0, 1], as papers
state them, and are doubled here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

import sgld

NORMS = ("linf", "l2")


class Attack(NamedTuple):
    """What `pgd` found.

    images: (N, C, H, W) float in [-1, 1], the most harmful image found inside each ball.
    correct: (N,) bool, whether the label survived on the clean image and at the end of every restart.
    losses: (steps + 1,) float, mean cross-entropy over the images (nat) along the first restart, its start first.
    """

    images: torch.Tensor
    correct: torch.Tensor
    losses: torch.Tensor


def pgd(
    logits_of, x, labels, norm, eps, *, steps=40, step_size=None, restarts=1, samples=1, generator=None, module=None,
):  # fmt: skip
    """Attack images by projected gradient ascent on the cross-entropy, from random starts inside the ball.

    delta <- project(delta + step_size * g),  g = sign(dL/dx) for linf, (dL/dx) / ||dL/dx||_2 for l2,
    L = -log softmax(f(x + delta))[label]; first the ball, then the pixel range, and the result lies in both.

    logits_of: callable, x (N, C, H, W) -> logits (N, K) that must be differentiable and row by row; it may be random.
    x: (N, C, H, W) float, pixels in [-1, 1]. labels: (N,) int64 in 0..K-1.
    norm: "linf", or "l2" over all pixels and channels of an image.
    eps: >= 0, radius of the ball, in pixels on [0, 1]; 0 gives the clean images back.
    steps: >= 1. step_size: > 0, in pixels on [0, 1]; None: 2.5 * eps / steps.
    restarts: >= 1. With one seed the first restarts of many are the restarts of few, so more never look safer, as
        long as logits_of is deterministic or draws from the same generator.
    samples: >= 1, draws of a random logits_of over which the gradient of the loss is averaged (expectation over
        transformation) and whose mean softmax decides the class.
    generator: torch.Generator on x's device, for the random starts.
    module: the torch.nn.Module behind logits_of, held in eval mode with frozen parameters meanwhile (see
        `sgld.frozen`); a logits_of that is itself a Module is found without it.

    An image's candidates are the clean image and the end of each restart; kept is one that is misclassified if there
    is any, and of several the one of highest loss. So an image that is wrong without attack is never correct.

    Returns an Attack, detached. Raises ValueError for unusable settings and FloatingPointError, with the step, where
    the loss stops being finite.

    A linear classifier of images of one pixel, x >= 0 or not: an attack of 0.1 on [0, 1] flips what lies within 0.2 of 0.

    >>> x, labels = torch.tensor([0.1, 0.5]).view(2, 1, 1, 1), torch.tensor([1, 1])
    >>> pgd(lambda x: torch.cat([-x.flatten(1), x.flatten(1)], 1), x, labels, "linf", 0.1).correct
    tensor([False,  True])

    Sources: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks" (arXiv 1706.06083);
    Athalye et al., "Obfuscated Gradients Give a False Sense of Security" (arXiv 1802.00420), section 4.3.
    """
    _check(norm, eps, steps, step_size, restarts, samples)
    _check_pixels(x)
    radius = 2 * eps
    step_length = 2 * (2.5 * eps / steps if step_size is None else step_size)
    x = x.detach()
    first = None
    with sgld.frozen(_module_of(logits_of, module)):
        best, (wrong, loss) = x, _evaluate(logits_of, x, labels, samples)
        _check_finite(loss.mean()[None], "on the clean images")
        for restart in range(restarts):
            images, new_wrong, new_loss, losses = _ascend(
                logits_of, x, labels, norm, radius, step_length, steps, samples, generator
            )
            _check_finite(losses, f"of {steps} of restart {restart}")
            better = (new_wrong & ~wrong) | ((new_wrong == wrong) & (new_loss > loss))
            best = torch.where(better.view(-1, *[1] * (x.dim() - 1)), images, best)
            loss = torch.where(better, new_loss, loss)
            wrong = wrong | new_wrong
            first = losses if first is None else first
    return Attack(best, ~wrong, first)


def single_step(logits_of, x, labels, norm, eps, *, step_size=None, generator=None, module=None):
    """Attack images by one step from a random start inside the ball: the cheap attack of adversarial training.

    norm, eps, generator, module: as in `pgd`. x: (N, C, H, W) float; pixels beyond [-1, 1] are clamped first.
    labels: (N,) int64. step_size: > 0, in pixels on [0, 1]; None: 1.25 * eps.

    Returns images (N, C, H, W) in [-1, 1], detached: where the step leads, whether it does harm or not.
    Raises ValueError for unusable settings.
    Source: Wong et al., "Fast is better than free: Revisiting adversarial training" (arXiv 2001.03994), algorithm 3.
    """
    x = x.detach().clamp(-1, 1)
    _check(norm, eps, 1, step_size, 1, 1)
    radius, step_length = 2 * eps, 2 * (1.25 * eps if step_size is None else step_size)
    delta = _random_start(x, norm, radius, generator)
    with sgld.frozen(_module_of(logits_of, module)):
        _, gradient = _loss_and_gradient(logits_of, (x + delta).clamp_(-1, 1), labels, 1)
    return (x + _project(delta + step_length * _direction(gradient, norm), norm, radius)).clamp_(-1, 1)


def refined(
    energy_of, logits_of, *, steps, step_size, noise_std, noise_first=False, pixel_grad_clip=None, clamp=None, generator=None,
):  # fmt: skip
    """Return a classifier that takes some SGLD steps down the energy from its input before it classifies: JEM-K.

    x_0 = x, x_{k+1} = x_k - step_size * dE/dx_k + noise_std * eps_k, logits = f(x_K), K = steps.

    energy_of: callable, x (N, ...) -> (N,), twice differentiable in x for attacks. logits_of: x (N, ...) -> (N, K).
    steps: >= 0; 0 is logits_of itself. step_size, noise_std, noise_first, pixel_grad_clip, clamp, generator: as in
        `sgld.run_chains`, in pixels on [-1, 1].

    The callable differentiates through all the steps where x requires grad, so `pgd` on it is an adaptive attack
    (which takes second derivatives and steps times the memory); elsewhere each step's graph is freed at once. It
    leaves the network's modes alone: pass module= to `pgd`, or hold it in `sgld.frozen`.
    Raises ValueError for unusable settings. Source: arXiv 1912.03263, section 5.4, without its averaging over chains,
    for which see `samples` of `pgd`.
    """
    sgld.check_settings(steps, step_size, noise_std, pixel_grad_clip, clamp, None)  # here rather than at the first call
    settings = {"pixel_grad_clip": pixel_grad_clip, "clamp": clamp, "generator": generator}

    def refined_logits(x):
        if not (torch.is_grad_enabled() and x.requires_grad):
            chains = sgld.run_chains(energy_of, x, steps, step_size, noise_std, noise_first=noise_first, **settings)
            return logits_of(chains)
        for _ in range(steps):
            if noise_first:
                x = sgld.add_noise(x, noise_std, generator)
            gradient = torch.autograd.grad(energy_of(x).sum(), x, create_graph=True)[0]
            x = sgld.langevin_step(x, gradient, step_size, 0 if noise_first else noise_std, **settings)
        return logits_of(x)

    return refined_logits


def distal(logits_of, x, targets, *, steps, step_size, module=None):
    """Climb from noise to images that the classifier is sure of: distal adversarials.

    x <- clamp(x + step_size * g / ||g||_2),  g = d log p(target|x) / dx, the norm over the whole image.

    The normalised gradient, unlike its sign, leaves pixels alone that do not matter to the classifier.
    logits_of, module: as in `pgd`. x: (N, C, H, W) float, pixels in [-1, 1], the start. targets: (N,) int64 in 0..K-1.
    steps: >= 1. step_size: > 0, L2 length of a step, in pixels on [0, 1].

    Returns images (N, C, H, W), detached, and confidences (steps + 1, N) = softmax(f(x))[target] in [0, 1], the
    start's first. Raises ValueError for unusable settings and FloatingPointError, with the step, where the loss stops
    being finite.
    Sources: arXiv 1912.03263, section 5.4, after Schott et al. (arXiv 1805.09190); why networks are sure far from the
    data: Hein et al., "Why ReLU networks yield high-confidence predictions far away from the training data"
    (arXiv 1812.05720).
    """
    _check("l2", 0, steps, step_size, 1, 1)
    _check_pixels(x)
    x = x.detach()
    losses = []
    with sgld.frozen(_module_of(logits_of, module)):
        for _ in range(steps):
            loss, gradient = _loss_and_gradient(logits_of, x, targets, 1)
            losses.append(loss)
            x = (x - 2 * step_size * _direction(gradient, "l2")).clamp_(-1, 1)
        losses.append(_evaluate(logits_of, x, targets, 1)[1])
    losses = torch.stack(losses)
    _check_finite(losses.mean(1), f"of {steps}")
    return x, torch.exp(-losses)


def _module_of(logits_of, module):
    """Return the network to hold frozen: the one that is named, else logits_of where it is one, else None."""
    return logits_of if module is None and isinstance(logits_of, torch.nn.Module) else module


def _ascend(logits_of, x, labels, norm, radius, step_length, steps, samples, generator):
    """Run one restart of `pgd`: where it ends, whether that is misclassified, its loss, and the mean losses."""
    images = (x + _random_start(x, norm, radius, generator)).clamp_(-1, 1)
    means = []
    for _ in range(steps):
        loss, gradient = _loss_and_gradient(logits_of, images, labels, samples)
        means.append(loss.mean())
        delta = images - x + step_length * _direction(gradient, norm)
        # x is in the pixel range, so clamping to it only shrinks the perturbation: it stays in the ball
        images = (x + _project(delta, norm, radius)).clamp_(-1, 1)
    wrong, loss = _evaluate(logits_of, images, labels, samples)
    return images, wrong, loss, torch.stack([*means, loss.mean()])


def _cross_entropy(logits, labels):
    """Return -log softmax(logits)[label], (N,), as softplus(logsumexp of the other logits - logit of the label).

    Its gradient keeps full precision on confident images. The gradient softmax - onehot does not: in float32 it has
    lost the label's own logit once that leads by 17, which stops an attack and looks like robustness.
    """
    labels = labels[:, None]
    others = logits.scatter(1, labels, -torch.inf).logsumexp(1)
    return torch.nn.functional.softplus(others - logits.gather(1, labels).squeeze(1))


def _loss_and_gradient(logits_of, x, labels, samples):
    """Return the cross-entropy (N,) and its gradient with respect to x, both averaged over draws of logits_of."""
    losses, gradients = 0, 0
    for _ in range(samples):
        part = x.detach().requires_grad_()
        with torch.enable_grad():
            loss = _cross_entropy(logits_of(part), labels)
            gradients = gradients + torch.autograd.grad(loss.sum(), part)[0] / samples
        losses = losses + loss.detach() / samples
    return losses, gradients


@torch.no_grad()
def _evaluate(logits_of, x, labels, samples):
    """Return whether the mean softmax over draws misses the label, (N,) bool, and the mean cross-entropy, (N,)."""
    losses, probabilities = 0, 0
    for _ in range(samples):
        logits = logits_of(x)
        losses = losses + _cross_entropy(logits, labels) / samples
        # a lone draw is judged by its logits, for float32 probabilities tie where the logits do not
        probabilities = logits if samples == 1 else probabilities + logits.softmax(1)
    return probabilities.argmax(1) != labels, losses


def _norms(x):
    """Return the L2 norm of each image, (N, 1, ..., 1)."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())), keepdim=True)


def _direction(gradient, norm):
    """Return the unit step of steepest ascent; a zero gradient gives zero."""
    if norm == "linf":
        return gradient.sign()
    tiny = torch.finfo(gradient.dtype).tiny
    # scaled to 1 first: the square of a gradient of 1e-25, as confident images have it, is 0 in float32
    gradient = gradient / gradient.abs().amax(tuple(range(1, gradient.dim())), keepdim=True).clamp_min(tiny)
    return gradient / _norms(gradient).clamp_min(tiny)


def _project(delta, norm, radius):
    """Return the point of the ball that is nearest to delta."""
    if norm == "linf":
        return delta.clamp(-radius, radius)
    return delta * (radius / _norms(delta).clamp_min(torch.finfo(delta.dtype).tiny)).clamp_max(1)


def _random_start(x, norm, radius, generator):
    """Draw a perturbation uniformly from the ball: for l2 a random direction at a radius of U^(1/D) of the ball's."""
    settings = {"dtype": x.dtype, "device": x.device, "generator": generator}
    if norm == "linf":
        return (2 * torch.rand(x.shape, **settings) - 1) * radius
    direction = _direction(torch.randn(x.shape, **settings), norm)
    share = torch.rand((len(x), *[1] * (x.dim() - 1)), **settings)
    return direction * radius * share ** (1 / x[0].numel())


def _check(norm, eps, steps, step_size, restarts, samples):
    """Refuse settings that cannot mean anything."""
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; choose from {', '.join(NORMS)}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be 0 or a positive number, not {eps}")
    if step_size is not None and not 0 < step_size < float("inf"):
        raise ValueError(f"step_size must be a positive number, not {step_size}")
    for name, value in (("steps", steps), ("restarts", restarts), ("samples", samples)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, not {value}")


def _check_pixels(x):
    """Refuse images that are not scaled."""
    if not (x.abs() <= 1).all():
        raise ValueError("x must have pixels in [-1, 1]: scale the images first")


def _check_finite(losses, where):
    """Raise FloatingPointError for the first of the mean losses, one a step, that is not finite."""
    finite = torch.isfinite(losses)
    if not finite.all():
        step = int((~finite).nonzero()[0])
        raise FloatingPointError(f"the loss is {float(losses[step])} at step {step} {where}")
