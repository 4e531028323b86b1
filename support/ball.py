"""What attacks share: the ball that they stay in, moves and starts in it, checks of what they get.

eps and attack_step_size are in pixels on [0, 1], as papers state them; a radius is in the pixels of
the images, which are in [-1, 1] unless an attack is told otherwise.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgld_nrg.sgld import check_start

NORMS = ("linf", "l2")

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
        return (x + project(delta, self.norm, self.radius)).clamp_(self.low, self.high)


def project(delta: Tensor, norm: str, radius: float) -> Tensor:
    """Return the point of the ball that is nearest to delta, (N, C, H, W) like delta."""
    if norm == "linf":
        return delta.clamp(-radius, radius)
    tiny = torch.finfo(delta.dtype).tiny
    return delta * (radius / l2_norms(delta).clamp_min(tiny)).clamp_max(1)


def direction_of(gradient: Tensor, norm: str) -> Tensor:
    """Return the unit step of steepest ascent, (N, C, H, W); a zero gradient gives zero."""
    if norm == "linf":
        return gradient.sign()
    tiny = torch.finfo(gradient.dtype).tiny
    # scaled to 1 first: the square of a confident image's gradient of 1e-25 is 0 in float32
    largest = gradient.abs().amax(tuple(range(1, gradient.dim())), keepdim=True)
    gradient = gradient / largest.clamp_min(tiny)
    return gradient / l2_norms(gradient).clamp_min(tiny)


def random_start(x: Tensor, norm: str, radius: float, generator: torch.Generator | None) -> Tensor:
    """Draw uniformly from the ball, (N, C, H, W) like x.

    For l2 that is a random direction, at a share U^(1/D) of the radius.
    """
    settings: dict[str, Any] = {"dtype": x.dtype, "device": x.device, "generator": generator}
    if norm == "linf":
        return (2 * torch.rand(x.shape, **settings) - 1) * radius
    direction = direction_of(torch.randn(x.shape, **settings), norm)
    share = torch.rand((len(x), *[1] * (x.dim() - 1)), **settings)
    return direction * radius * share ** (1 / x[0].numel())


def l2_norms(x: Tensor) -> Tensor:
    """Return the L2 norm of each image, (N, 1, ..., 1)."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())), keepdim=True)


def per_image(values: Tensor, x: Tensor) -> Tensor:
    """Return values (n,) as (n, 1, ..., 1), with the dimensions of x."""
    return values.view(-1, *[1] * (x.dim() - 1))


def lead_of_wrong(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the largest logit but the label's, less the label's, (N,); logits are (N, K)."""
    labels = labels[:, None]
    others = logits.scatter(1, labels, -torch.inf).amax(1)
    return others - logits.gather(1, labels).squeeze(1)


def ball_of(
    x: Tensor, labels: Tensor, norm: str, eps: float, pixel_range: tuple[float, float]
) -> Ball:
    """Return the ball of an attack, or refuse what cannot mean anything.

    Its arguments are those of `apgd`. Raises ValueError; warns of pixels that seem to be in [0, 1].
    """
    check_settings(norm, eps)
    low, high = pixel_range
    check_labels(x, labels)
    if not ((x >= low) & (x <= high)).all():
        raise ValueError(f"x must have pixels in [{low}, {high}]: scale the images first")
    # a bright image alone may have none
    if low < 0 and len(x) >= 8 and x.min() >= 0 and x.max() > 0:
        warnings.warn(
            "no image has a pixel below 0: if they are scaled to [0, 1], give pixel_range=(0, 1)",
            stacklevel=3,
        )
    return Ball(norm, (high - low) * eps, low, high)


def check_settings(norm: str, eps: float, attack_step_size: float | None = None) -> None:
    """Raise ValueError for settings that cannot mean anything."""
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; choose from {', '.join(NORMS)}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be 0 or a positive number, not {eps}")
    if attack_step_size is not None and not 0 < attack_step_size < float("inf"):
        raise ValueError(f"attack_step_size must be a positive number, not {attack_step_size}")


def check_counts(**counts: int) -> None:
    """Raise ValueError for counts below one, by name."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, not {value}")


def check_labels(x: Tensor, labels: Tensor) -> None:
    """Raise ValueError for images without a gradient, and for labels that are not one an image."""
    check_start(x)
    if labels.shape != (len(x),):
        raise ValueError(f"labels must have shape ({len(x)},), one an image: {tuple(labels.shape)}")


def check_all_finite(values: Tensor, what: str, where: str) -> None:
    """Raise FloatingPointError, with what and where, for values that are not finite."""
    finite = torch.isfinite(values)
    if not finite.all():
        raise FloatingPointError(f"{what} {float(values[~finite][0])} {where}")
