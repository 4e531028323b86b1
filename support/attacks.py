"""Attacks on classifiers of images: APGD, Square, and attacks through refinement by SGLD.

Images have pixels in [-1, 1], as everywhere in this project; eps and attack_step_size are in pixels
on [0, 1], as papers state them, and are scaled here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
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
LOSSES = ("ce", "dlr", "targeted")
THROUGH = ("around", "straight", "steps")  # of a gradient behind refinement, the cheapest first

# Of APGD: the share of a move that is the step, and of steps that must rise not to be halved.
SHARE, RISING = 0.75, 0.75
# Of Square: the share of the pixels that a square first has, and the queries of 10,000 after which
# it is halved.
FIRST_SHARE = 0.8
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)

Logits = Callable[[Tensor], Tensor]


class Attack(NamedTuple):
    """What an attack found.

    images: (N, C, H, W) float in the pixel range, the most harmful image found inside each ball.
    correct: (N,) bool, whether the label survived on the clean image and on all that were tried.
    """

    images: Tensor
    correct: Tensor


class Ball(NamedTuple):
    """The images that an attack may make of a clean one, with radius in the pixels of the range."""

    norm: str
    radius: float
    low: float
    high: float

    def inside(self, x: Tensor, delta: Tensor) -> Tensor:
        """Return x + delta, first projected onto the ball and then clamped; it lies in both."""
        # x is in the pixel range: clamping only shrinks delta, which stays in the ball
        return (x + _project(delta, self.norm, self.radius)).clamp_(self.low, self.high)


def apgd(
    logits_of: Logits,
    x: Tensor,
    labels: Tensor,
    norm: str,
    eps: float,
    *,
    loss: str = "ce",
    attack_steps: int = 100,
    random_starts: int = 1,
    draws: int = 1,
    generator: torch.Generator | None = None,
    module: nn.Module | None = None,
    pixel_range: tuple[float, float] = (-1, 1),
) -> Attack:
    """Attack images by Auto-PGD: projected gradient ascent that finds its step size by itself.

    z = P(x_k + s_k * g(x_k)),  x_{k+1} = P(x_k + 0.75 * (z - x_k) + 0.25 * (x_k - x_{k-1})),
    g = sign(dL/dx) for linf, (dL/dx) / ||dL/dx||_2 for l2; P projects onto the ball, then onto the
    pixel range. s_0 = 2 * eps is halved, image by image, at checkpoints at which the loss rose in
    too few of the steps or found no new height; that image then goes on from its best point.

    logits_of: x (N, C, H, W) -> logits (N, K), differentiable and row by row; it may be random.
    x: (N, C, H, W) float, pixels in pixel_range. labels: (N,) int64 in 0..K-1.
    norm: "linf", or "l2" over all pixels and channels of an image.
    eps: >= 0, radius of the ball, in pixels on [0, 1]; 0 gives the clean images back.
    loss: "ce", the cross-entropy; "dlr", the difference of logits ratio
        (max_{k != y} f_k - f_y) / (f_(1) - f_(3)), f_(n) the n-th largest, which no rescaling of
        the logits changes; "targeted", (f_t - f_y) / (f_(1) - (f_(3) + f_(4)) / 2) with another
        target t in each random start, the likeliest wrong class of the clean image first. With
        fewer than four classes the last two leave the division out.
    attack_steps, random_starts: >= 1. With one seed the first starts of many are the starts of few,
        so more never look safer, if logits_of is deterministic.
    draws: >= 1, of a random logits_of, over which the gradient of the loss is averaged (expectation
        over transformation) and whose mean softmax decides the class.
    generator: torch.Generator on x's device, for the random starts.
    pixel_range: (low, high) of the pixels, which the attack stays in: (0, 1) for a network that
        takes such images. A warning says so if none of many images has a pixel below 0.
    module: the network behind logits_of, held in eval mode with frozen parameters meanwhile (see
        `sgld.frozen`); found without being named if logits_of is a Module or a method of one.

    An image is broken once it is misclassified, at any step, and at a second look too, which a
    random logits_of takes with fresh draws. Nothing more is spent on it, nor on an image that is
    wrong without attack. Of one that stands, the point of highest loss is kept.

    Returns an Attack, detached. Raises ValueError for unusable settings and FloatingPointError,
    with the step, if the loss stops being finite.

    A linear classifier of one pixel, x >= 0 or not: an attack of 0.1 on [0, 1] flips what lies
    within 0.2 of 0.

    >>> x, labels = torch.tensor([0.1, -0.5]).view(2, 1, 1, 1), torch.tensor([1, 0])
    >>> apgd(lambda x: torch.cat([-x.flatten(1), x.flatten(1)], 1), x, labels, "linf", 0.1).correct
    tensor([False,  True])

    Sources: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of
    diverse parameter-free attacks" (arXiv 2003.01690), algorithm 1 and equations 6 and 7; Athalye
    et al., "Obfuscated Gradients Give a False Sense of Security" (arXiv 1802.00420), section 4.3.
    """
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}; choose from {', '.join(LOSSES)}")
    _check_counts(attack_steps=attack_steps, random_starts=random_starts, draws=draws)
    ball = _ball(x, labels, norm, eps, pixel_range)
    look, x = partial(_look, logits_of, loss, draws), x.detach()
    with frozen(module or module_of(logits_of)):
        answers = _answers(logits_of, x, draws)
        _check_finite(answers, "the logits are", "on the clean images")
        images, correct = x.clone(), answers.argmax(1) == labels
        likeliest = answers.scatter(1, labels[:, None], -torch.inf).argsort(1, descending=True)
        highest = torch.full_like(answers[:, 0], -torch.inf)
        for start in range(random_starts if eps else 0):
            rows = correct.nonzero().squeeze(1)
            if not len(rows):
                break
            clean = x[rows]
            # the last of the columns is the label
            targets = likeliest[rows, start % (answers.shape[1] - 1)]
            begin = ball.inside(clean, _random_start(clean, norm, ball.radius, generator))
            where = f"of {attack_steps} of random start {start}"
            found, broken, heights = _climb(
                look, clean, labels[rows], targets, begin, ball, attack_steps, where
            )
            better = broken | (heights > highest[rows])
            images[rows[better]], correct[rows] = found[better], ~broken
            highest[rows] = heights.maximum(highest[rows])
    return Attack(images, correct)


def strongest(
    logits_of: Logits,
    x: Tensor,
    labels: Tensor,
    norm: str,
    eps: float,
    *,
    random_starts: int = 1,
    targets: int = 9,
    **settings: Any,
) -> Attack:
    """Attack images by `apgd` on the cross-entropy, then what still stands class by class.

    random_starts: >= 1, on the cross-entropy. targets: >= 1, the likeliest wrong classes of an
    image, each a random start of the loss "targeted". The rest, what is returned and what is
    raised: as in `apgd`. This is AutoAttack without its two slower parts (arXiv 2003.01690).
    """
    _check_counts(targets=targets)
    images, correct = apgd(logits_of, x, labels, norm, eps, random_starts=random_starts, **settings)
    settings |= {"loss": "targeted", "random_starts": targets}
    rows = correct.nonzero().squeeze(1)
    if len(rows):
        found = apgd(logits_of, x[rows], labels[rows], norm, eps, **settings)
        images[rows], correct[rows] = found
    return Attack(images, correct)


@torch.no_grad()
def square(
    logits_of: Logits,
    x: Tensor,
    labels: Tensor,
    norm: str,
    eps: float,
    *,
    queries: int = 1000,
    generator: torch.Generator | None = None,
    module: nn.Module | None = None,
    pixel_range: tuple[float, float] = (-1, 1),
) -> Attack:
    """Attack images by random search with squares: a check of attacks that need a gradient.

    Each query changes a square at a random place of each image and keeps what lowers the margin
    f_y - max_{k != y} f_k. For linf the square gets +-eps, one sign a channel; for l2 it gets two
    pyramids of opposite sign, and with them the length that another square loses. Squares shrink.

    queries: >= 1, the calls of logits_of after one on the clean images. generator: torch.Generator
    on x's device, for everything random. The rest, and what is returned and raised: as in `apgd`.
    A robust network stands more of this than of `apgd`; one that stands less hides its gradients.
    Source: Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack
    via random search" (arXiv 1912.00049), algorithms 1 to 3.
    """
    _check_counts(queries=queries)
    ball = _ball(x, labels, norm, eps, pixel_range)
    propose, begin = (_squares, _stripes) if norm == "linf" else (_pyramids, _tiles)
    with frozen(module or module_of(logits_of)):
        images, correct = x.clone(), logits_of(x).argmax(1) == labels
        rows = correct.nonzero().squeeze(1)
        x, labels = x[rows], labels[rows]
        candidates = best = ball.inside(x, begin(x, ball.radius, generator))
        lowest = torch.full_like(x.flatten(1)[:, 0], torch.inf)
        for query in range(queries if eps else 0):
            if not len(rows):
                break
            logits = logits_of(candidates)
            margins = -_margin(logits, labels)
            _check_finite(margins, "the margin is", f"at query {query} of {queries}")
            best = torch.where(_like(margins < lowest, x), candidates, best)
            lowest = margins.minimum(lowest)
            broken = logits.argmax(1) != labels
            if broken.any():
                images[rows[broken]], correct[rows[broken]] = candidates[broken], False
                parts = (rows, x, labels, best, lowest)
                rows, x, labels, best, lowest = (part[~broken] for part in parts)
            halvings = sum(query * 10_000 >= after * queries for after in HALVED_AFTER)
            delta = propose(best - x, FIRST_SHARE / 2**halvings, ball.radius, generator)
            candidates = ball.inside(x, delta)
        images[rows] = best
    return Attack(images, correct)


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

    norm, eps, generator, module: as in `apgd`. x: (N, C, H, W) float; pixels beyond [-1, 1] are
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
        begin = (x + delta).clamp_(-1, 1)
        _, gradient, _ = _loss_and_gradient(logits_of, "ce", 1, begin, labels, labels)
    moved = _project(delta + length * _direction(gradient, norm), norm, radius)
    return (x + moved).clamp_(-1, 1)


def refined(
    energy: Energy,
    logits_of: Logits,
    steps: int,
    langevin: Langevin,
    generator: torch.Generator | None = None,
    *,
    through: str = "steps",
) -> Logits:
    """Return a classifier behind some Langevin steps down the energy from its input: JEM-K.

    x_0 = x, x_{k+1} = x_k - step_size * dE/dx_k + noise_std * eps_k, logits = f(x_K), K = steps.

    energy: x (N, ...) -> (N,), for through="steps" twice differentiable in x. logits_of: x ->
    (N, K). steps: >= 0; 0 is logits_of itself. langevin, generator: as in `sgld.run_chains`.
    through: the way of the gradient in x, if x requires grad; the logits are the same.
        "steps": through all the steps, with second derivatives and steps times the memory.
        "straight": of f at x_K, as if the steps were the identity: the one for steps whose own
            derivatives are chaotic (BPDA).
        "around": of f at x, as if there were no steps: a transfer from the plain network.

    A defence stands what stands all three. The callable leaves the network's modes alone: pass
    module= to `apgd`, or hold it in `sgld.frozen`. Raises ValueError for unusable settings.
    Sources: arXiv 1912.03263, section 5.4, without its averaging over chains (see draws of `apgd`);
    Athalye et al. (arXiv 1802.00420), section 4.1.
    """
    langevin.check()  # here rather than at the first call
    if steps < 0:
        raise ValueError(f"steps must be 0 or more, not {steps}")
    if through not in THROUGH:
        raise ValueError(f"unknown through {through!r}; choose from {', '.join(THROUGH)}")

    def refined_logits(x: Tensor) -> Tensor:
        if through == "steps" and torch.is_grad_enabled() and x.requires_grad:
            for _ in range(steps):
                noise = langevin.draw_noise(x, generator)
                _, x = langevin_step(energy, x, langevin, noise, create_graph=True)
            return logits_of(x)
        end = run_chains(energy, x, steps, langevin, generator=generator)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return logits_of(end)
        if through == "straight":
            return logits_of(end + (x - x.detach()))  # adds 0, exactly
        plain = logits_of(x)
        return logits_of(end).detach() + (plain - plain.detach())

    return refined_logits


class _Climb(NamedTuple):
    """What APGD knows of n images that still stand: a row each in (n, C, H, W) or (n,)."""

    rows: Tensor  # their places among all
    clean: Tensor
    labels: Tensor
    targets: Tensor
    now: Tensor
    before: Tensor
    gradient: Tensor  # now
    loss: Tensor  # now
    best: Tensor
    best_gradient: Tensor
    highest: Tensor  # loss, at best
    size: Tensor  # of the step
    rises: Tensor  # of the loss, since the last checkpoint
    highest_then: Tensor  # at the last checkpoint, as is halved_then
    halved_then: Tensor


def _climb(
    look: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    clean: Tensor,
    labels: Tensor,
    targets: Tensor,
    begin: Tensor,
    ball: Ball,
    attack_steps: int,
    where: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what APGD makes of one start, whether that is broken, and its loss, (N,)."""
    images, heights = begin.clone(), torch.full_like(begin.flatten(1)[:, 0], -torch.inf)
    rows, none = torch.arange(len(begin), device=begin.device), torch.zeros_like(labels)
    broken, sizes = none > 0, torch.full_like(heights, 2 * ball.radius)
    state = _Climb(
        *(rows, clean, labels, targets, begin, begin, begin, -heights, begin, begin, heights),
        *(sizes, none, heights, broken),
    )
    checkpoints, last = _checkpoints(attack_steps), 0
    for step in range(attack_steps + 1):
        loss, gradient, wrong = look(state.now, state.labels, state.targets)
        _check_finite(loss, "the loss is", f"at step {step} {where}")
        higher = _like(loss > state.highest, begin)
        state = state._replace(
            gradient=gradient,
            rises=state.rises + (loss > state.loss),
            loss=loss,
            best=torch.where(higher, state.now, state.best),
            best_gradient=torch.where(higher, gradient, state.best_gradient),
            highest=loss.maximum(state.highest),
        )
        if wrong.any():
            fallen = state.rows[wrong]
            images[fallen], heights[fallen] = state.now[wrong], loss[wrong]
            broken = broken.index_fill(0, fallen, True)
            state = _Climb(*(part[~wrong] for part in state))
        if step == attack_steps or not len(state.rows):
            break
        if step in checkpoints:
            state, last = _halved(state, step - last), step
        share = SHARE if step else 1
        move = _like(state.size, begin) * _direction(state.gradient, ball.norm)
        ahead = ball.inside(state.clean, state.now - state.clean + move)
        # x_k + share * (z - x_k) + (1 - share) * (x_k - x_{k-1})
        new = torch.lerp(2 * state.now - state.before, ahead, share)
        new = ball.inside(state.clean, new - state.clean)
        state = state._replace(now=new, before=state.now)
    images[state.rows], heights[state.rows] = state.best, state.highest
    return images, broken, heights


def _checkpoints(attack_steps: int) -> set[int]:
    """Return the steps w_j = ceil(p_j N), p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)."""
    steps, percent, gap = set(), 22, 22
    while percent <= 100:
        steps.add(-(-percent * attack_steps // 100))
        gap = max(gap - 3, 6)
        percent += gap
    return steps


def _halved(state: _Climb, steps: int) -> _Climb:
    """Halve the step of what did not rise enough in the last steps, and go back to its best."""
    level = ~state.halved_then & (state.highest <= state.highest_then)
    halved = (state.rises < RISING * steps) | level
    back = _like(halved, state.now)
    return state._replace(
        now=torch.where(back, state.best, state.now),
        gradient=torch.where(back, state.best_gradient, state.gradient),
        loss=torch.where(halved, state.highest, state.loss),
        size=torch.where(halved, state.size / 2, state.size),
        rises=torch.zeros_like(state.rises),
        highest_then=state.highest,
        halved_then=halved,
    )


def _stripes(x: Tensor, radius: float, generator: torch.Generator | None) -> Tensor:
    """Draw vertical stripes of +-radius, of each channel by itself."""
    return radius * _signs((*x.shape[:2], 1, x.shape[3]), x, generator).expand_as(x)


def _squares(
    delta: Tensor, share: float, radius: float, generator: torch.Generator | None
) -> Tensor:
    """Return delta, (n, C, H, W), with +-radius in a square of each image."""
    height, width = delta.shape[2:]
    side = min(max(round((share * height * width) ** 0.5), 1), height, width)
    delta = delta.movedim(1, 3).clone()  # (n, H, W, C): a square is then indexed by rows, columns
    signs = _signs((len(delta), 1, 1, delta.shape[3]), delta, generator)
    delta[_window(delta, side, generator)] = radius * signs.expand(-1, side, side, -1)
    return delta.movedim(3, 1)


def _tiles(x: Tensor, radius: float, generator: torch.Generator | None) -> Tensor:
    """Draw a grid of five by five pairs of pyramids with random signs, of length radius."""
    height, width = x.shape[2:]
    side = max(min(height, width) // 5, 1)
    counts = -(-height // side), -(-width // side)
    signs = _signs((*x.shape[:2], *counts), x, generator)
    signs = signs.repeat_interleave(side, 2).repeat_interleave(side, 3)
    delta = (signs * _pair(side, x).repeat(counts))[..., :height, :width]
    return radius * delta / _norms(delta)


def _pyramids(
    delta: Tensor, share: float, radius: float, generator: torch.Generator | None
) -> Tensor:
    """Return delta, (n, C, H, W), with the length of one square moved to another, then radius."""
    height, width = delta.shape[2:]
    side = max(round((share * height * width) ** 0.5), 3)
    side = min(side + (side + 1) % 2, height, width)  # odd, if it fits
    unused = (radius**2 - _norms(delta).square()).clamp_min(0)
    delta = delta.movedim(1, 3).clone()
    total = delta.square().sum((1, 2), keepdim=True)  # of each channel
    target, source = (_window(delta, side, generator) for _ in range(2))
    old = delta[target]
    delta[source], delta[target] = 0, 0
    freed = total - delta.square().sum((1, 2), keepdim=True)
    turned = _signs((len(delta), 1, 1, 1), delta, generator) > 0
    pair = _pair(side, delta)[..., None]
    signs = _signs((len(delta), 1, 1, delta.shape[3]), delta, generator)
    new = torch.where(turned, pair, pair.transpose(0, 1)) * signs + _unit(old)
    delta[target] = _unit(new) * (unused / delta.shape[3] + freed.clamp_min(0)).sqrt()
    return radius * delta.movedim(3, 1) / _norms(delta).clamp_min(torch.finfo(delta.dtype).tiny)


def _pair(side: int, like: Tensor) -> Tensor:
    """Return two pyramids of opposite sign, one above the other: (side, side) of length 1."""
    steps = 1 / torch.arange(1, side + 2, dtype=like.dtype, device=like.device).square()
    heights, half, parts = steps.flip(0).cumsum(0).flip(0), side // 2, []
    across = (torch.arange(side, device=like.device) - half).abs()
    for rows, sign in ((half, 1), (side - half, -1)):
        along = (torch.arange(rows, device=like.device) - rows // 2).abs()
        # a pyramid's height at a distance d from its middle is the sum of 1 / k^2 over k > d
        peak = max(half, rows // 2) + 1
        parts.append(sign * (heights - heights[peak])[torch.maximum(along[:, None], across)])
    pair = torch.cat(parts)
    return pair / pair.norm()


def _window(delta: Tensor, side: int, generator: torch.Generator | None) -> tuple[Tensor, ...]:
    """Draw a square of each image: what indexes delta, (n, H, W, C), to give (n, side, side, C)."""
    count, device = len(delta), delta.device
    settings: dict[str, Any] = {"generator": generator, "device": device}
    top, left = (torch.randint(n - side + 1, (count, 1, 1), **settings) for n in delta.shape[1:3])
    along = torch.arange(side, device=device)
    return torch.arange(count, device=device)[:, None, None], top + along[:, None], left + along


def _unit(windows: Tensor) -> Tensor:
    """Return windows, (n, side, side, C), each channel divided by its length; zeros stay zeros."""
    length = torch.linalg.vector_norm(windows, dim=(1, 2), keepdim=True)
    return windows / length.clamp_min(torch.finfo(windows.dtype).tiny)


def _signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw -1 or 1, as likely."""
    drawn = torch.randint(2, shape, device=like.device, generator=generator)
    return 2 * drawn.to(like.dtype) - 1


def _objective(loss: str, logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Return what APGD climbs, (N,); equations 6 and 7 of arXiv 2003.01690 for the ratios."""
    if loss == "ce":
        return _cross_entropy(logits, labels)
    if loss == "targeted":
        logits_at = (logits.gather(1, index[:, None]).squeeze(1) for index in (targets, labels))
        margin = torch.sub(*logits_at)
    else:
        margin = _margin(logits, labels)
    if logits.shape[1] < 4:
        return margin
    first, _, third, fourth = logits.topk(4).values.unbind(1)
    last = (third + fourth) / 2 if loss == "targeted" else third
    return margin / (first - last + 1e-12)  # as the authors do for logits that are all alike


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the largest logit but the label's, less the label's, (N,)."""
    labels = labels[:, None]
    others = logits.scatter(1, labels, -torch.inf).amax(1)
    return others - logits.gather(1, labels).squeeze(1)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log softmax(logits)[label], (N,): softplus(logsumexp of the others - label's logit).

    Its gradient keeps full precision on confident images. The gradient softmax - onehot does not:
    in float32 it has lost the label's own logit once that leads by 17, which stops an attack and
    looks like robustness.
    """
    labels = labels[:, None]
    others = logits.scatter(1, labels, -torch.inf).logsumexp(1)
    return nn.functional.softplus(others - logits.gather(1, labels).squeeze(1))


def _look(
    logits_of: Logits, loss: str, draws: int, x: Tensor, labels: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss (N,), its gradient in x, and whether x is broken, (N,) bool."""
    losses, gradient, answers = _loss_and_gradient(logits_of, loss, draws, x, labels, targets)
    wrong = answers.argmax(1) != labels
    if wrong.any():  # the answer of a random logits_of may have been bad luck
        again = _answers(logits_of, x[wrong], draws).argmax(1) != labels[wrong]
        wrong = wrong.masked_scatter(wrong, again)
    return losses, gradient, wrong


def _loss_and_gradient(
    logits_of: Logits, loss: str, draws: int, x: Tensor, labels: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss (N,) and its gradient in x, averaged over draws, and the answers (N, K)."""
    losses: Any = 0
    gradients: Any = 0
    answers: Any = 0
    for _ in range(draws):
        part = x.detach().requires_grad_()
        with torch.enable_grad():
            logits = logits_of(part)
            value = _objective(loss, logits, labels, targets)
            gradients = gradients + torch.autograd.grad(value.sum(), part)[0] / draws
        losses = losses + value.detach() / draws
        answers = answers + _answer(logits.detach(), draws)
    return losses, gradients, answers


@torch.no_grad()
def _answers(logits_of: Logits, x: Tensor, draws: int) -> Tensor:
    """Return what ranks the classes, (N, K): the softmax, summed over draws of logits_of."""
    return sum((_answer(logits_of(x), draws) for _ in range(draws)), torch.zeros(()).to(x))


def _answer(logits: Tensor, draws: int) -> Tensor:
    """Return one draw's part of the answers."""
    # a lone one gives its logits: float32 probabilities tie when they do not
    return logits if draws == 1 else logits.softmax(1)


def _like(values: Tensor, x: Tensor) -> Tensor:
    """Return values (n,) as (n, 1, ..., 1), with the dimensions of x."""
    return values.view(-1, *[1] * (x.dim() - 1))


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


def _ball(
    x: Tensor, labels: Tensor, norm: str, eps: float, pixel_range: tuple[float, float]
) -> Ball:
    """Return the ball of an attack, or refuse what cannot mean anything."""
    _check(norm, eps)
    low, high = pixel_range
    _check_labels(x, labels)
    if not ((x >= low) & (x <= high)).all():
        raise ValueError(f"x must have pixels in [{low}, {high}]: scale the images first")
    # a bright image alone may have none
    if low < 0 and len(x) >= 8 and x.min() >= 0 and x.max() > 0:
        warnings.warn(
            "no image has a pixel below 0: if they are scaled to [0, 1], give pixel_range=(0, 1)",
            stacklevel=3,
        )
    return Ball(norm, (high - low) * eps, low, high)


def _check(norm: str, eps: float, attack_step_size: float | None = None) -> None:
    """Refuse settings that cannot mean anything."""
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; choose from {', '.join(NORMS)}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be 0 or a positive number, not {eps}")
    if attack_step_size is not None and not 0 < attack_step_size < float("inf"):
        raise ValueError(f"attack_step_size must be a positive number, not {attack_step_size}")


def _check_counts(**counts: int) -> None:
    """Refuse counts below one by name."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, not {value}")


def _check_labels(x: Tensor, labels: Tensor) -> None:
    """Refuse images without a gradient, and labels that are not one an image."""
    check_start(x)
    if labels.shape != (len(x),):
        raise ValueError(f"labels must have shape ({len(x)},), one an image: {tuple(labels.shape)}")


def _check_finite(values: Tensor, what: str, where: str) -> None:
    """Raise FloatingPointError for values that are not finite."""
    finite = torch.isfinite(values)
    if not finite.all():
        raise FloatingPointError(f"{what} {float(values[~finite][0])} {where}")
