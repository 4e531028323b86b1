"""Where chains start: restart distributions, uniform or fitted to each class's training images."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sgld_nrg.support.data import Dataset

GOLDEN_RATIO = (1 + 5**0.5) / 2
LARGE = 1024  # coordinates up to which a Gaussian's covariance is decomposed exactly
COMPONENTS = 30  # principal components of a class that its clusters are found by
CLUSTER_SIZE = 50  # images, on average, at least


class UniformRestart:
    """The paper's restart distribution: every coordinate uniform on [-1, 1], classes by turns."""

    kind = "uniform"

    def __init__(self, shape: Sequence[int], num_classes: int):
        self.shape, self.num_classes = tuple(shape), num_classes

    def labels(self, numbers: Tensor) -> Tensor:
        """Return the classes (N,) int64 of the chains of these numbers, (N,) int64: by turns."""
        return numbers % self.num_classes

    def draw(
        self, labels: Tensor, generator: torch.Generator | None = None, wanted: Tensor | None = None
    ) -> Tensor:
        """Draw one start for each of labels (N,): (N, *shape) float; wanted changes nothing."""
        size = (len(labels), *self.shape)
        return torch.rand(size, device=labels.device, generator=generator).mul_(2).sub_(1)

    def state_dict(self) -> dict[str, Any]:
        """Return what `restart_from_state` needs, as plain types."""
        return {"kind": self.kind, "shape": list(self.shape), "num_classes": self.num_classes}


class GaussianRestart:
    """Restart distribution of one or several Gaussians for each class.

    x = mean_y + factor_y z, z ~ N(0, I): the class mean and the leading principal directions of the
    class's training images, each scaled by its standard deviation. With rank below the number of
    coordinates this is the Gaussian of full covariance without its smallest directions.
    Source: Yang and Ji, "JEM++: Improved Techniques for Training JEM" (ICCV 2021), section 4.3,
    which keeps the full covariance and has one Gaussian for each class.

    mean: (K C, D), the C Gaussians of a class one after the other. factor: (K C, D, rank).
    shape: of one chain, D = product of shape. weights: (K, C), how often each of the Gaussians is
    drawn, of any sum, or None for all alike and C = 1. clamp: (low, high) that starts are clamped
    to.

    >>> images, labels = torch.rand(100, 1, 4, 4) * 2 - 1, torch.arange(100) % 2
    >>> restart = GaussianRestart.fit(images, labels, num_classes=2, rank=3)
    >>> restart.draw(torch.tensor([0, 1, 1])).shape
    torch.Size([3, 1, 4, 4])
    """

    kind = "gaussian"

    def __init__(
        self,
        mean: Tensor,
        factor: Tensor,
        shape: Sequence[int],
        weights: Tensor | None = None,
        clamp: tuple[float, float] = (-1, 1),
    ):
        self.mean, self.factor, self.shape = mean, factor, tuple(shape)
        alike = torch.ones(len(mean), 1, device=mean.device)
        self.weights, self.clamp = alike if weights is None else weights, clamp
        self.num_classes = len(self.weights)

    @classmethod
    def fit(
        cls,
        images: Tensor,
        labels: Tensor,
        num_classes: int,
        rank: int = 64,
        parts: Tensor | None = None,
    ) -> GaussianRestart:
        """Fit to images (N, ...) float, labels (N,) in 0..K-1, two images a class.

        Starts are clamped to [-1, 1], or to the images' range if that is another.
        parts: (N,) int64 in 0..C-1, which of its class's Gaussians an image belongs to; None: one
        a class. A part of one image keeps its mean alone; an empty one is never drawn.
        Raises ValueError if a class has fewer than two images.
        """
        half = images.dtype in (torch.float16, torch.bfloat16)  # too coarse to decompose
        flat = images.flatten(1).float() if half else images.flatten(1)
        parts = torch.zeros_like(labels) if parts is None else parts
        count = int(parts.max()) + 1 if len(parts) else 1
        means, factors, weights = [], [], []
        rank = min(rank, flat.shape[1])
        for label in range(num_classes):
            of_class, its_parts = flat[labels == label], parts[labels == label]
            if (size := len(of_class)) < 2:
                raise ValueError(
                    f"class {label} has {size} training images; a Gaussian needs at least 2"
                )
            for part in range(count):
                members = of_class[its_parts == part]
                weights.append(len(members) / len(labels))
                means.append(members.mean(0) if len(members) else torch.zeros_like(flat[0]))
                factors.append(
                    _principal_factor(members - means[-1], rank)
                    if len(members) > 1
                    else flat.new_zeros(flat.shape[1], rank)
                )
        low, high = float(images.min()), float(images.max())
        clamp = (-1.0, 1.0) if -1 <= low <= high <= 1 else (low, high)
        drawn = torch.tensor(weights, device=flat.device).view(num_classes, count)
        mean, factor = (torch.stack(each).to(images.dtype) for each in (means, factors))
        return cls(mean, factor, images.shape[1:], drawn, clamp)

    def labels(self, numbers: Tensor) -> Tensor:
        """Return the classes (N,) of the chains of these numbers, as frequent as in training.

        Multiples of the golden ratio modulo 1 spread evenly over [0, 1], so any run of numbers has
        nearly those frequencies.
        """
        edges = self.weights.sum(1).cpu().double().cumsum(0)  # mps has no float64
        places = (numbers.cpu().double() + 0.5) * GOLDEN_RATIO % 1
        return torch.searchsorted(edges[:-1] / edges[-1], places, right=True).to(numbers.device)

    def draw(
        self, labels: Tensor, generator: torch.Generator | None = None, wanted: Tensor | None = None
    ) -> Tensor:
        """Draw one start for each of labels (N,): (N, *shape), clamped, on the labels' device.

        wanted: (N,) bool, the rows that are needed, or None for all; the others may hold anything,
        and what is drawn for the wanted ones does not depend on it.
        """
        size = (len(labels), self.factor.shape[2])
        kind = self.mean.dtype
        z = torch.randn(size, dtype=kind, device=labels.device, generator=generator)
        which = labels
        if self.weights.shape[1] > 1:
            # as torch.multinomial draws, without its checks, which cost more than the draw
            weights = self.weights[labels]
            waits = torch.empty_like(weights).exponential_(generator=generator)
            which = labels * weights.shape[1] + (weights / waits).argmax(1)
        on_cpu = labels.device.type == "cpu"
        x = self._one_by_one(z, which, wanted) if on_cpu else self._at_once(z, which)
        return x.clamp_(*self.clamp).view(-1, *self.shape)

    def _one_by_one(self, z: Tensor, which: Tensor, wanted: Tensor | None) -> Tensor:
        """Return mean + factor z of the Gaussians `which`, (N, D), in turn: the least work."""
        x = self.mean.new_zeros(len(which), self.mean.shape[1])
        for index in which.unique() if wanted is None else which[wanted].unique():
            rows = which == index
            x[rows] = self.mean[index] + z[rows] @ self.factor[index].T
        return x

    def _at_once(self, z: Tensor, which: Tensor) -> Tensor:
        """Return the same without the host having to know `which`: avoids a GPU sync."""
        return self.mean[which] + torch.bmm(self.factor[which], z.unsqueeze(2)).squeeze(2)

    def state_dict(self) -> dict[str, Any]:
        """Return what `restart_from_state` needs: plain types and tensors."""
        tensors = {"mean": self.mean, "factor": self.factor, "weights": self.weights}
        rest = {"kind": self.kind, "shape": list(self.shape), "clamp": list(self.clamp)}
        return {**rest, **tensors}


Restart = UniformRestart | GaussianRestart


def restart_from_flags(args: Namespace, dataset: Dataset, device: torch.device) -> Restart:
    """Fit the restart distribution that --restart names."""
    if args.restart == "uniform":
        return UniformRestart(dataset.shape, dataset.num_classes)
    images, labels = dataset.train
    parts = None
    if args.restart_parts > 1:
        parts = clusters(images, labels, args.restart_parts, args.seed).to(device)
    images, labels = images.to(device), labels.to(device)
    return GaussianRestart.fit(images, labels, dataset.num_classes, args.restart_rank, parts)


def restart_from_state(state: dict[str, Any], device: torch.device | str = "cpu") -> Restart:
    """Rebuild a restart distribution from its state_dict on a device."""
    if state["kind"] == UniformRestart.kind:
        return UniformRestart(state["shape"], state["num_classes"])
    weights = state["weights"].to(device) if "weights" in state else None
    state = _expanded(state) if "basis" in state else state
    mean, factor = state["mean"].to(device), state["factor"].to(device)
    clamp = tuple(state.get("clamp", (-1, 1)))  # checkpoints of 0.1.0 have none
    return GaussianRestart(mean, factor, state["shape"], weights, clamp)


def compact(restart: GaussianRestart, directions: int, rank: int) -> dict[str, Any]:
    """Return a state_dict of a fortieth of the size, from which `restart_from_state` makes nearly
    the same distribution: all Gaussians in one common basis, in numbers of four and eight bits.

    directions: of the basis, the leading ones of means and factors together, weighted as they are
    drawn. rank: directions of each Gaussian, those of largest variance.
    """
    mean, factor = restart.mean.cpu().double(), restart.factor.cpu().double()
    strongest = factor.square().sum(1).argsort(dim=1, descending=True)[:, :rank]
    factor = factor.gather(2, strongest[:, None].expand(-1, factor.shape[1], -1))
    weights = restart.weights.cpu().double().flatten()
    parts = torch.cat([mean[:, :, None], factor], dim=2) * weights.sqrt()[:, None, None]
    joined = parts.transpose(0, 1).flatten(1)
    basis = torch.linalg.eigh(joined @ joined.T)[1][:, -directions:]  # (D, directions)
    inside = {"mean": basis.T @ mean[:, :, None], "factor": basis.T @ factor}
    state = restart.state_dict()
    for name, values, largest in (
        ("basis", basis[None], 127),
        ("mean", inside["mean"], 127),  # (K C, directions, 1)
        ("factor", inside["factor"], 7),  # (K C, directions, rank)
    ):
        scale = values.abs().amax(1, keepdim=True).clamp_min(1e-9) / largest
        state |= {name: (values / scale).round().to(torch.int8), f"{name}_scale": scale.half()}
    state["factor"] = _packed(state["factor"])
    return state


def _expanded(state: dict[str, Any]) -> dict[str, Any]:
    """Return the means and factors of what `compact` made."""
    state = {**state, "factor": _unpacked(state["factor"])[..., : state["factor_scale"].shape[2]]}
    basis, mean, factor = (
        state[name].float() * state[f"{name}_scale"].float() for name in ("basis", "mean", "factor")
    )
    return {**state, "mean": (basis @ mean).squeeze(2), "factor": basis @ factor}


def _packed(values: Tensor) -> Tensor:
    """Return integers (..., n) in -8..7 two to a byte, (..., ceil(n / 2)) uint8."""
    even = torch.nn.functional.pad(values, (0, values.shape[-1] % 2)) + 8
    return (even[..., ::2] * 16 + even[..., 1::2]).to(torch.uint8)


def _unpacked(pairs: Tensor) -> Tensor:
    """Return the integers that `_packed` was given, and a 0 more if they were odd."""
    return torch.stack([pairs // 16, pairs % 16], dim=-1).flatten(-2).to(torch.int8) - 8


def clusters(images: Tensor, labels: Tensor, count: int, seed: int) -> Tensor:
    """Cut each class into `count` clusters by k-means on its leading principal components.

    images: (N, C, H, W) float; labels: (N,) int64. A class has a cluster for each CLUSTER_SIZE of
    its images at most, so that no start is a training image. Returns (N,) int64 in 0..count-1.
    """
    from sklearn.cluster import KMeans

    parts = torch.zeros_like(labels)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        flat = images[members].flatten(1)
        centred = flat - flat.mean(0)
        leading = centred @ _leading_directions(centred, COMPONENTS)[0]
        most = max(len(members) // CLUSTER_SIZE, 1)
        means = KMeans(min(count, most), n_init=1, random_state=seed)
        parts[members] = torch.from_numpy(means.fit_predict(leading.numpy())).long()
    return parts


def _principal_factor(centred: Tensor, rank: int) -> Tensor:
    """Return F (D, rank), F F^T the covariance of centred (n, D) but for its smallest directions.

    Beyond LARGE coordinates the covariance is never formed: a randomised decomposition finds the
    leading directions.
    """
    count, size = centred.shape
    if count < size and count <= LARGE:  # the inner products have the same spectrum, and are fewer
        directions = torch.linalg.eigh((centred @ centred.T).double())[1][:, -rank:]
        leading = centred.T @ directions.to(centred.dtype) / (count - 1) ** 0.5
    elif size <= LARGE:
        covariance = (centred.T @ centred / (count - 1)).double()
        variances, directions = torch.linalg.eigh(covariance)
        scaled = directions[:, -rank:] * variances[-rank:].clamp_min(0).sqrt()
        leading = scaled.to(centred.dtype)
    else:
        directions, singular = _leading_directions(centred, rank)
        leading = directions * singular / (count - 1) ** 0.5
    missing = rank - leading.shape[1]  # directions, if images are fewer than rank
    return torch.nn.functional.pad(leading, (0, missing))


def _leading_directions(centred: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the leading right singular vectors of centred (n, D), (D, rank) or fewer, and values.

    Randomised, always by the same draws.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        few = min(rank, *centred.shape)
        _, singular, directions = torch.pca_lowrank(centred, q=few, center=False, niter=4)
    return directions, singular
