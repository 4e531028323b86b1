"""Attacks on classifiers of images: APGD, a single step, attacks through refinement by SGLD.

Images have pixels in [-1, 1], as everywhere in this project; eps and attack_step_size are in pixels
on [0, 1], as papers state them, and are scaled here. Square is in support/square.py, what the
attacks share in support/ball.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sgld_nrg.sgld import Energy, Langevin, frozen, langevin_step, module_of, run_chains
from sgld_nrg.support.ball import (
    Attack,
    Ball,
    Logits,
    ball_of,
    check_all_finite,
    check_counts,
    check_labels,
    check_settings,
    direction_of,
    lead_of_wrong,
    per_image,
    project,
    random_start,
)

LOSSES = ("ce", "dlr", "targeted")
THROUGH = ("around", "straight", "steps")  # of a gradient behind refinement, the cheapest first

# Of APGD: the share of a move that is the step, and of steps that must rise not to be halved.
SHARE, RISING = 0.75, 0.75


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
    check_counts(attack_steps=attack_steps, random_starts=random_starts, draws=draws)
    ball = ball_of(x, labels, norm, eps, pixel_range)
    look, x = partial(_look, logits_of, loss, draws), x.detach()
    with frozen(module or module_of(logits_of)):
        answers = _answers(logits_of, x, draws)
        check_all_finite(answers, "the logits are", "on the clean images")
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
            begin = ball.inside(clean, random_start(clean, norm, ball.radius, generator))
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
    check_counts(targets=targets)
    images, correct = apgd(logits_of, x, labels, norm, eps, random_starts=random_starts, **settings)
    settings |= {"loss": "targeted", "random_starts": targets}
    rows = correct.nonzero().squeeze(1)
    if len(rows):
        found = apgd(logits_of, x[rows], labels[rows], norm, eps, **settings)
        images[rows], correct[rows] = found
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
    check_settings(norm, eps, attack_step_size)
    x = x.detach().clamp(-1, 1)
    check_labels(x, labels)
    radius, length = 2 * eps, 2 * (1.25 * eps if attack_step_size is None else attack_step_size)
    delta = random_start(x, norm, radius, generator)
    with frozen(module or module_of(logits_of)):
        begin = (x + delta).clamp_(-1, 1)
        _, gradient, _ = _loss_and_gradient(logits_of, "ce", 1, begin, labels, labels)
    moved = project(delta + length * direction_of(gradient, norm), norm, radius)
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
        check_all_finite(loss, "the loss is", f"at step {step} {where}")
        higher = per_image(loss > state.highest, begin)
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
        move = per_image(state.size, begin) * direction_of(state.gradient, ball.norm)
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
    back = per_image(halved, state.now)
    return state._replace(
        now=torch.where(back, state.best, state.now),
        gradient=torch.where(back, state.best_gradient, state.gradient),
        loss=torch.where(halved, state.highest, state.loss),
        size=torch.where(halved, state.size / 2, state.size),
        rises=torch.zeros_like(state.rises),
        highest_then=state.highest,
        halved_then=halved,
    )


def _objective(loss: str, logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Return what APGD climbs, (N,); equations 6 and 7 of arXiv 2003.01690 for the ratios."""
    if loss == "ce":
        return _cross_entropy(logits, labels)
    if loss == "targeted":
        logits_at = (logits.gather(1, index[:, None]).squeeze(1) for index in (targets, labels))
        margin = torch.sub(*logits_at)
    else:
        margin = lead_of_wrong(logits, labels)
    if logits.shape[1] < 4:
        return margin
    first, _, third, fourth = logits.topk(4).values.unbind(1)
    last = (third + fourth) / 2 if loss == "targeted" else third
    return margin / (first - last + 1e-12)  # as the authors do for logits that are all alike


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
