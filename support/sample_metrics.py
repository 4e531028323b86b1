"""Scores of drawn images and of chains: pure functions, with the checks of metrics.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sgld_nrg.support.metrics import Values, finite, labels_of


def _two_feature_sets(first: Values, second: Values, least: int) -> tuple[Tensor, Tensor]:
    """Return two (N, D) tensors as float64 about their pooled mean, which spares digits."""
    first, second = (finite(features, "features", 2).double() for features in (first, second))
    if first.shape[1] != second.shape[1] or min(len(first), len(second)) < least:
        shapes = f"{tuple(first.shape)}, {tuple(second.shape)}"
        raise ValueError(f"features need one width and {least} or more rows: {shapes}")
    centre = torch.cat([first, second]).mean(0)
    return first - centre, second - centre


def frechet_distance(features_a: Values, features_b: Values) -> float:
    """Return the Fréchet distance of Gaussians fitted to two sets of features, in squared units.

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), S over N - 1; >= 0, what rounding puts below
    is 0. Comparable for one feature network and N only, being biased upwards at small N.
    features_a: (N, D), features_b: (M, D) float, N and M >= 2. Raises ValueError for others.
    Source: Heusel et al. 2017, arXiv 1706.08500.

    >>> features = torch.randn(100, 3)
    >>> round(frechet_distance(features, features + 2), 3)  # 2 in each of three directions
    12.0
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    first, second = (part.cpu() for part in _two_feature_sets(features_a, features_b, least=2))
    network: Any = nn.Identity()
    network.num_features = first.shape[1]  # else torchmetrics sends a random image to see the width
    distance: Any = FrechetInceptionDistance(feature=network, sync_on_compute=False)
    distance.set_dtype(torch.float64)
    distance.update(first, real=True)
    distance.update(second, real=False)
    return max(distance.compute().item(), 0.0)


def inception_distances(
    reference: Tensor, kinds: dict[str, Tensor], network: int | nn.Module = 2048, chunk: int = 100
) -> dict[str, float]:
    """Return the FID of each kind of images: the Fréchet distance over Inception's features.

    reference, and each of kinds: (N, C, H, W) float, pixels in [-1, 1], C 1 or 3, on one device;
    each N >= 2. network: the width of torchmetrics' Inception layer, or a module with num_features.
    Raises ImportError without torch-fidelity, OSError if the weights cannot be downloaded.
    Source: Heusel et al. 2017, arXiv 1706.08500.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    settings: dict[str, Any] = {"reset_real_features": False, "sync_on_compute": False}
    distance: Any = FrechetInceptionDistance(network, **settings)  # of this process alone
    distance.to(reference.device)

    def see(images: Tensor, real: bool) -> None:
        for part in images.split(chunk):
            pixels = part.clamp(-1, 1).add(1).mul(127.5).round().byte()  # as in a picture file
            distance.update(pixels.expand(-1, 3, -1, -1), real=real)

    see(reference, real=True)
    found = {}
    for kind, images in kinds.items():
        see(images, real=False)
        found[kind] = distance.compute().item()
        distance.reset()
    return found


def precision_recall(
    features_real: Values, features_fake: Values, k: int = 3, chunk: int = 1000
) -> dict[str, float]:
    """Return the share of fakes on the manifold of the real, precision, and the reverse, recall.

    A point is on a set's manifold if it is as near to some member as that member's k-th nearest
    other member: precision = mean over fakes of [exists r: |fake - r| <= radius_k(r)].
    features_real: (N, D), features_fake: (M, D) float, N and M > k >= 1. chunk: rows of distances
    held at once. Returns {"precision": 0..1, "recall": 0..1}. Raises ValueError for other features
    or k. Source: Kynkäänniemi et al. 2019, arXiv 1904.06991.
    """
    if k < 1:
        raise ValueError(f"k must be 1 or more; got {k}")
    real, fake = _two_feature_sets(features_real, features_fake, least=k + 1)
    slack = 1e-6 * torch.cat([real, fake]).norm(dim=1).max()  # the matmul in cdist leaves 1e-7

    def share(points: Tensor, members: Tensor) -> float:
        near = [
            torch.cdist(part, members).topk(k + 1, largest=False).values
            for part in members.split(chunk)
        ]
        radii = torch.cat(near)[:, -1] + slack  # the nearest of the k + 1 is the member itself
        covered = [(torch.cdist(part, members) <= radii).any(1) for part in points.split(chunk)]
        return torch.cat(covered).double().mean().item()

    return {"precision": share(fake, real), "recall": share(real, fake)}


def class_histogram(labels: Values, num_classes: int) -> dict[str, Any]:
    """Count the classes of samples, with the entropy H / ln K: 0 for one class, 1 for all alike.

    labels: (N,) int in 0..K-1; num_classes: K >= 2. Raises ValueError for others.
    Returns {"counts": K ints, "entropy": 0..1}.
    """
    counts = torch.bincount(labels_of(labels, num_classes), minlength=num_classes)
    entropy = torch.special.entr(counts.double() / counts.sum()).sum() / np.log(num_classes)
    return {"counts": counts.tolist(), "entropy": min(entropy.item(), 1.0)}


def nearest(images: Values, pool: Values, chunk: int = 500) -> tuple[list[float], list[int]]:
    """Find each image's nearest pool image: its L2 distance, in units of the pixels, and its index.

    In each block of the pool a float64 distance by matmul proposes four candidates and their exact
    distances decide, so a copy is at distance 0. Among equals any may be named.
    images: (N, ...), pool: (M, ...), each image of one shape. chunk: images in a block; the pool's
    are ten times that. Returns N distances >= 0 and N indices in 0..M-1. Raises ValueError for
    other shapes.
    """
    images, pool = finite(images, "images"), finite(pool, "pool")
    if images.dim() < 2 or images.shape[1:] != pool.shape[1:]:
        shapes = f"{tuple(images.shape)}, {tuple(pool.shape)}"
        raise ValueError(f"images and pool must hold images of one shape; got {shapes}")
    distances: list[float] = []
    indices: list[int] = []
    for part in images.flatten(1).split(chunk):
        part, found = part.double(), []
        for number, block in enumerate(pool.flatten(1).split(10 * chunk)):
            block = block.to(part)
            near = torch.cdist(part, block).topk(min(4, len(block)), largest=False).indices
            exact, which = (part[:, None] - block[near]).norm(dim=2).min(1)  # (rows, 4) to (rows,)
            place = near.gather(1, which[:, None]).squeeze(1) + number * 10 * chunk
            found.append((exact, place))
        exact, places = (torch.stack(column) for column in zip(*found, strict=True))
        closest, best = exact.min(0)  # (blocks, rows) to (rows,)
        distances += closest.tolist()
        indices += places.gather(0, best[None]).squeeze(0).tolist()
    return distances, indices


def split_rhat(series: Values) -> float:
    """Return split R-hat: near 1 if the halves of all chains agree in their mean, else above.

    sqrt((n - 1) / n + (B / n) / W) over the halves, of n draws each; W: mean of their variances,
    B / n: variance of their means, both over N - 1. The middle one of an odd number of draws is
    left out. series: (chains, draws) float, 4 or more draws. Raises ValueError for others and if no
    chain moves. Source: Gelman et al., "Bayesian Data Analysis", 3rd ed., section 11.4; Vehtari et
    al. 2021, arXiv 1903.08008, without rank normalisation.
    """
    series = finite(series, "series", 2).cpu().double()
    half = series.shape[1] // 2
    halves = torch.cat([series[:, :half], series[:, -half:]])
    if half < 2 or (halves == halves[:, :1]).all():
        raise ValueError(
            "series: split R-hat needs 4 or more draws and a chain that moves; "
            f"got {tuple(series.shape)}"
        )
    within, between = halves.var(1).mean(), halves.mean(1).var()
    return ((half - 1) / half + between / within).sqrt().item()


def autocorrelation(series: Values, max_lag: int) -> list[float]:
    """Return the autocorrelation at lags 0..max_lag, each chain about its mean, over the chains.

    rho_k = sum_t (x_t - m)(x_{t+k} - m) / sum_t (x_t - m)^2, in -1..1; rho_0 = 1. As usual not
    corrected for the k missing terms or for m being estimated, which lower it by about
    max(k, correlation time) / draws.
    series: (chains, draws) float; max_lag: 0..draws-1. Raises ValueError for others and if a chain
    never moves.
    """
    series = finite(series, "series", 2).cpu().double()
    draws = series.shape[1]
    if not 0 <= max_lag < draws or (series == series[:, :1]).all(1).any():
        raise ValueError(
            f"series: needs chains that move and a max_lag in 0..{draws - 1}; got max_lag {max_lag}"
        )
    centred = series - series.mean(1, keepdim=True)
    lags = range(max_lag + 1)
    products = [(centred[:, : draws - lag] * centred[:, lag:]).sum(1) for lag in lags]
    return [(product / products[0]).mean().item() for product in products]
