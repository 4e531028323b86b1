"""Square, an attack on classifiers of images by random search, which needs no gradient.

Images have pixels in [-1, 1], as everywhere in this project; eps is in pixels on [0, 1], as papers
state it, and is scaled here. `apgd`, which it checks, is in support/attacks.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sgld_nrg.sgld import frozen, module_of
from sgld_nrg.support.ball import (
    Attack,
    Logits,
    ball_of,
    check_all_finite,
    check_counts,
    l2_norms,
    lead_of_wrong,
    per_image,
)

FIRST_SHARE = 0.8  # of the pixels, in a square; it is halved after so many queries of 10,000
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


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
    check_counts(queries=queries)
    ball = ball_of(x, labels, norm, eps, pixel_range)
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
            margins = -lead_of_wrong(logits, labels)
            check_all_finite(margins, "the margin is", f"at query {query} of {queries}")
            best = torch.where(per_image(margins < lowest, x), candidates, best)
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
    return radius * delta / l2_norms(delta)


def _pyramids(
    delta: Tensor, share: float, radius: float, generator: torch.Generator | None
) -> Tensor:
    """Return delta, (n, C, H, W), with the length of one square moved to another, then radius."""
    height, width = delta.shape[2:]
    side = max(round((share * height * width) ** 0.5), 3)
    side = min(side + (side + 1) % 2, height, width)  # odd, if it fits
    unused = (radius**2 - l2_norms(delta).square()).clamp_min(0)
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
    return radius * delta.movedim(3, 1) / l2_norms(delta).clamp_min(torch.finfo(delta.dtype).tiny)


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
