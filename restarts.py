"""Where chains start: restart distributions, uniform or fitted to the training images of each class."""

from __future__ import annotations

import torch

GOLDEN_RATIO = (1 + 5**0.5) / 2
LARGE = 1024  # coordinates up to which a Gaussian's covariance is decomposed exactly
COMPONENTS = 30  # principal components of a class that its clusters are found by
CLUSTER_SIZE = 50  # images, on average, at least


def from_flags(args, dataset, device):
    """Fit the restart distribution that --restart names."""
    if args.restart == "uniform":
        return UniformRestart(dataset.shape, dataset.num_classes)
    images, labels = dataset.train
    parts = clusters(images, labels, args.restart_parts, args.seed).to(device) if args.restart_parts > 1 else None
    return GaussianRestart.fit(images.to(device), labels.to(device), dataset.num_classes, args.restart_rank, parts)


def clusters(images, labels, count, seed):
    """Cut each class into `count` clusters by k-means on its leading principal components; returns (N,) int64 in 0..count-1.

    images: (N, C, H, W) float; labels: (N,) int64. A class has a cluster for each CLUSTER_SIZE of its images at most, so that
    no start is a training image.
    """
    from sklearn.cluster import KMeans

    parts = torch.zeros_like(labels)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        flat = images[members].flatten(1)
        centred = flat - flat.mean(0)
        leading = centred @ _leading_directions(centred, COMPONENTS)[0]
        most = max(len(members) // CLUSTER_SIZE, 1)
        found = KMeans(min(count, most), n_init=1, random_state=seed).fit_predict(leading.numpy())
        parts[members] = torch.from_numpy(found).long()
    return parts


class UniformRestart:
    """Restart distribution of the paper: every coordinate uniform on [-1, 1], labels uniform over the classes.

    shape: of one chain, such as (C, H, W).
    """

    kind = "uniform"

    def __init__(self, shape, num_classes):
        self.shape, self.num_classes = tuple(shape), num_classes

    def labels(self, numbers):
        """Return the classes (N,) int64 of the chains of these numbers, (N,) int64: by turns."""
        return numbers % self.num_classes

    def draw(self, labels, generator=None, wanted=None):
        """Draw one start for each of labels (N,): (N, *shape) float in [-1, 1] on the labels' device; wanted: any."""
        x = torch.rand((len(labels), *self.shape), device=labels.device, generator=generator)
        return x.mul_(2).sub_(1)

    def state_dict(self):
        """Return what `restart_from_state` needs, as plain types."""
        return {"kind": self.kind, "shape": list(self.shape), "num_classes": self.num_classes}


class GaussianRestart:
    """Restart distribution of one or several Gaussians for each class, as in the informative initialisation of JEM++.

    x = mean_y + factor_y z, z ~ N(0, I): the class mean and the leading principal directions of the class's
    training images, each scaled by its standard deviation. With rank below the number of coordinates this is the
    Gaussian of full covariance without its smallest directions; at full rank it is that Gaussian.
    Source: Yang and Ji, "JEM++: Improved Techniques for Training JEM" (ICCV 2021), section 4.3, which keeps the
    full covariance and has one Gaussian for each class.

    mean: (K C, D), the C Gaussians of a class one after the other. factor: (K C, D, rank). shape: of one chain, D = product
    of shape. weights: (K, C), how often each of the Gaussians is drawn, of any sum, or None for all alike and C = 1.

    >>> images, labels = torch.rand(100, 1, 4, 4) * 2 - 1, torch.arange(100) % 2
    >>> GaussianRestart.fit(images, labels, num_classes=2, rank=3).draw(torch.tensor([0, 1, 1])).shape
    torch.Size([3, 1, 4, 4])
    """

    kind = "gaussian"

    def __init__(self, mean, factor, shape, weights=None):
        self.mean, self.factor, self.shape = mean, factor, tuple(shape)
        self.weights = torch.ones(len(mean), 1, device=mean.device) if weights is None else weights
        self.num_classes = len(self.weights)

    @classmethod
    def fit(cls, images, labels, num_classes, rank=64, parts=None):
        """Fit to images (N, ...) float in [-1, 1] with labels (N,) in 0..K-1; every class needs two images.

        parts: (N,) int64 in 0..C-1, which of its class's Gaussians an image belongs to; None: C = 1. A part with fewer than
        two images keeps its mean alone, and an empty one is never drawn.
        """
        flat = images.flatten(1)
        parts = torch.zeros_like(labels) if parts is None else parts
        count = int(parts.max()) + 1
        means, factors, weights = [], [], []
        rank = min(rank, flat.shape[1])
        for label in range(num_classes):
            of_class, its_parts = flat[labels == label], parts[labels == label]
            if (size := len(of_class)) < 2:
                raise ValueError(f"class {label} has {size} training images; a Gaussian needs at least 2")
            for part in range(count):
                members = of_class[its_parts == part]
                weights.append(len(members) / len(labels))
                means.append(members.mean(0) if len(members) else torch.zeros_like(flat[0]))
                enough = len(members) > 1
                factors.append(_principal_factor(members - means[-1], rank) if enough else flat.new_zeros(flat.shape[1], rank))
        weights = torch.tensor(weights, device=flat.device).view(num_classes, count)
        return cls(torch.stack(means), torch.stack(factors), images.shape[1:], weights)

    def labels(self, numbers):
        """Return the classes (N,) int64 of the chains of these numbers, (N,) int64: as frequent as in the training images.

        Multiples of the golden ratio modulo 1 spread evenly over [0, 1], so any run of numbers has nearly those frequencies.
        """
        edges = self.weights.sum(1).cpu().double().cumsum(0)  # mps has no float64
        places = (numbers.cpu().double() + 0.5) * GOLDEN_RATIO % 1
        return torch.searchsorted(edges[:-1] / edges[-1], places, right=True).to(numbers.device)

    def draw(self, labels, generator=None, wanted=None):
        """Draw one start for each of labels (N,) from its class: (N, *shape) float, clamped to [-1, 1].

        wanted: (N,) bool, the rows that are needed, or None for all; the others may hold anything, and what is drawn for
        the wanted ones does not depend on it.
        """
        z = torch.randn((len(labels), self.factor.shape[2]), device=labels.device, generator=generator)
        which = labels
        if self.weights.shape[1] > 1:
            weights = self.weights[labels]  # drawn as torch.multinomial does, without its checks, which cost more than the draw
            parts = (weights / torch.empty_like(weights).exponential_(generator=generator)).argmax(1)
            which = labels * weights.shape[1] + parts
        x = self._one_by_one(z, which, wanted) if labels.device.type == "cpu" else self._at_once(z, which)
        return x.clamp_(-1, 1).view(-1, *self.shape)

    def _one_by_one(self, z, which, wanted):
        """Return mean + factor z of the Gaussians `which`, (N, D), one Gaussian after the other: the least work."""
        x = torch.zeros((len(which), self.mean.shape[1]))
        for index in which.unique() if wanted is None else which[wanted].unique():
            rows = which == index
            x[rows] = self.mean[index] + z[rows] @ self.factor[index].T
        return x

    def _at_once(self, z, which):
        """Return the same without the host having to know `which`: for a GPU that shall not be waited for."""
        return self.mean[which] + torch.bmm(self.factor[which], z.unsqueeze(2)).squeeze(2)

    def state_dict(self):
        """Return what `restart_from_state` needs: plain types and tensors."""
        tensors = {"mean": self.mean, "factor": self.factor, "weights": self.weights}
        return {"kind": self.kind, "shape": list(self.shape), **tensors}


def _principal_factor(centred, rank):
    """Return F (D, rank) with F F^T the covariance of centred (n, D) but for its smallest directions.

    Beyond LARGE coordinates the covariance is never formed: a randomised decomposition finds the leading directions.
    """
    count, size = centred.shape
    if count < size and count <= LARGE:  # the images' inner products have the same spectrum, and are fewer
        directions = torch.linalg.eigh((centred @ centred.T).double())[1][:, -rank:].to(centred.dtype)
        leading = centred.T @ directions / (count - 1) ** 0.5
    elif size <= LARGE:
        variances, directions = torch.linalg.eigh((centred.T @ centred / (count - 1)).double())
        leading = (directions[:, -rank:] * variances[-rank:].clamp_min(0).sqrt()).to(centred.dtype)
    else:
        directions, singular = _leading_directions(centred, rank)
        leading = directions * singular / (count - 1) ** 0.5
    return torch.nn.functional.pad(leading, (0, rank - leading.shape[1]))  # nothing where images are fewer than rank


def _leading_directions(centred, rank):
    """Return the leading right singular vectors of centred (n, D), (D, rank) or fewer, and their singular values.

    Randomised, always by the same draws.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, singular, directions = torch.pca_lowrank(centred, q=min(rank, *centred.shape), center=False, niter=4)
    return directions, singular


def restart_from_state(state, device="cpu"):
    """Rebuild a restart distribution from its state_dict on a device."""
    if state["kind"] == UniformRestart.kind:
        return UniformRestart(state["shape"], state["num_classes"])
    weights = state["weights"].to(device) if "weights" in state else None
    return GaussianRestart(state["mean"].to(device), state["factor"].to(device), state["shape"], weights)
