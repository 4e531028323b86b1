"""What a trained model says of new pictures, and whether they look like those it was trained on.

A p-value here is a promise. Held-out images that nothing was fitted to are scored once; the p-value
of a new picture is the share of them, itself counted in, that look at least as strange. Of new
images of the same distribution at most a share alpha has a p-value of alpha or less, whatever the
network and whatever the score (split conformal prediction: Vovk, Gammerman and Shafer 2005,
"Algorithmic learning in a random world"; for outliers Bates et al. 2023, arXiv 2104.08279). The
share is a mean over draws of the held-out images; for n of them, one detector's own varies about it
by sqrt(alpha (1 - alpha) / n).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from sgld_nrg.models import marginal_energy, predict
from sgld_nrg.support.data import Dataset
from sgld_nrg.support.errors import UserError
from sgld_nrg.support.metrics import fit_temperature

LEVELS = (5, 9, 17, 33)  # of grey that pictures may be rounded to, the fewest first
SAME_CLASS = 0.99  # share of images whose class must outlive the rounding
ROUNDED = 1000  # images that say so
PATTERN_LEVELS = LEVELS[0]  # of the picture whose entropy is taken
MOST_LOGITS = 16  # of so many classes every logit is a quantity, of more the two largest
MOST_REFERENCE = 6000  # images that the mixture is fitted to
MOST_KEPT = 1000  # of the held-out scores, so that a detector has some kilobytes
RIDGE = 1e-3  # added to variances that are about 1
BATCH_SIZE = 500
SEED = 0  # of the halves and of the reference images: a detector does not change with --seed


def rounded(images: Tensor, levels: int) -> Tensor:
    """Round pixels in [-1, 1] to so many evenly spaced levels; 0: leave them as they are.

    Faint noise, JPEG and the like fall away, and do not make a familiar picture strange.

    >>> rounded(torch.tensor([-1.0, -0.9, 0.3, 1.2]), 5)
    tensor([-1.0000, -1.0000,  0.5000,  1.0000])
    """
    if not levels:
        return images
    return ((images.clamp(-1, 1) + 1) / 2 * (levels - 1)).round() * (2 / (levels - 1)) - 1


def pattern_entropy(images: Tensor) -> Tensor:
    """Return how little a pixel's neighbour tells of it, in nat: 0 if everything.

    The entropy of a pixel's level given the one to its left, and given the one above, from the
    picture's own counts; the mean of both and of the channels. A measure of complexity, as the size
    of a compressed file is, but the same on every machine. Source: Shannon 1948, "A mathematical
    theory of communication", section 7.
    images: (N, C, H, W) float, pixels in [-1, 1]. Returns (N,) float64.
    """
    levels = PATTERN_LEVELS
    grey = ((images.clamp(-1, 1) + 1) / 2 * (levels - 1)).round().long()

    def entropy(values: Tensor, count: int) -> Tensor:
        flat = values.flatten(2)
        counts = torch.zeros(*flat.shape[:2], count, dtype=torch.float64, device=flat.device)
        counts.scatter_add_(2, flat, torch.ones_like(flat, dtype=torch.float64))
        return torch.special.entr(counts / flat.shape[2]).sum(2)

    across = (grey[..., :-1], grey[..., 1:])
    down = (grey[..., :-1, :], grey[..., 1:, :])
    given = [
        entropy(levels * first + second, levels**2) - entropy(first, levels)
        for first, second in (across, down)
        if first.numel()
    ]
    if not given:  # a picture of one pixel
        return torch.zeros(len(images), dtype=torch.float64, device=images.device)
    return torch.stack(given).mean((0, 2)).clamp_min(0)


def quantities(model: nn.Module, images: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Return what is judged of pictures, (N, D) float64, and the classes that are read, (N,) int64.

    All of it is of the pictures rounded to `levels`: the logits f(x) (of more than MOST_LOGITS
    classes the two largest), the energy E(x), and the pattern entropy, last. All on the CPU.
    images: (N, C, H, W) float, pixels in [-1, 1]. Raises ValueError for others.
    """
    if images.dim() != 4 or not torch.isfinite(images).all():
        raise ValueError(f"images must be finite and (N, C, H, W); got {tuple(images.shape)}")
    coarse = rounded(images, levels)
    logits = predict(model, coarse, BATCH_SIZE).cpu().double()
    said = logits if logits.shape[1] <= MOST_LOGITS else logits.topk(2).values
    columns = [said, marginal_energy(logits)[:, None], pattern_entropy(coarse).cpu()[:, None]]
    return torch.cat(columns, dim=1), logits.argmax(1)


class Mixture:
    """A mixture of Gaussians, one for each class, over the quantities of familiar images.

    centre, spread: (D,) of each quantity; log_weights: (K,); means: (K, D) and factors: (K, D, D)
    lower triangular, of the quantities after centring and scaling. Compare Lee et al. 2018, arXiv
    1807.03888, who take features, one covariance for all classes, and the nearest class alone.
    """

    PARTS = ("centre", "spread", "log_weights", "means", "factors")

    def __init__(self, state: dict[str, Tensor]):
        self.state = {name: state[name].cpu().double() for name in self.PARTS}

    @classmethod
    def fit(cls, values: Tensor, classes: Tensor, num_classes: int) -> Mixture:
        """Fit the mixture to quantities (N, D) of images that the network puts in classes (N,).

        Covariances are drawn towards the mean one of all classes, as by D more images of each.
        Raises FloatingPointError if a quantity is not finite.
        """
        if not torch.isfinite(values).all():
            raise FloatingPointError("the quantities of the detector are not finite")
        count = values.shape[1]
        centre, spread = values.mean(0), values.std(0, correction=0).clamp_min(1e-6)
        scaled = (values - centre) / spread
        member = one_hot(classes, num_classes).double()
        sizes = member.sum(0)
        means = member.t() @ scaled / sizes.clamp_min(1)[:, None]
        away = scaled - means[classes]
        scatter = torch.einsum("nk,nd,ne->kde", member, away, away)
        pooled = scatter.sum(0) / len(values)
        covariance = (scatter + count * pooled) / (sizes + count)[:, None, None]
        ridge = RIDGE * torch.eye(count, dtype=values.dtype, device=values.device)
        state = {
            "centre": centre,
            "spread": spread,
            "log_weights": (sizes / len(values)).log(),
            "means": means,
            "factors": torch.linalg.cholesky(covariance + ridge),
        }
        return cls({name: value.float() for name, value in state.items()})

    def strangeness(self, values: Tensor) -> Tensor:
        """Return -log p of quantities (N, D) under the mixture, (N,) float64; inf if not finite."""
        centre, spread, log_weights, means, factors = (self.state[name] for name in self.PARTS)
        away = ((values - centre) / spread)[:, None] - means  # (N, K, D)
        white = torch.linalg.solve_triangular(factors, away.permute(1, 2, 0), upper=False)
        volumes = factors.diagonal(dim1=1, dim2=2).log().sum(1)
        log_p = log_weights - volumes - white.square().sum(1).t() / 2
        constant = math.log(2 * math.pi) * values.shape[1] / 2
        return (constant - log_p.logsumexp(1)).nan_to_num(nan=math.inf, posinf=math.inf)


class Ranks:
    """Scores of held-out images, kept to give new scores their p-value.

    kept: (m,) half precision, every `every`-th of the `count` scores from the highest down.
    """

    def __init__(self, kept: Tensor, every: int, count: int):
        self.kept, self.every, self.count = kept.cpu().half(), every, count

    @classmethod
    def of(cls, scores: Tensor) -> Ranks:
        """Keep scores (N,), each if there are at most MOST_KEPT; of no score every p-value is 1."""
        every = max(math.ceil(len(scores) / MOST_KEPT), 1)
        highest_first = scores.double().half().cpu().sort(descending=True).values
        return cls(highest_first[every - 1 :: every].clone(), every, len(scores))

    @property
    def smallest(self) -> float:
        """The smallest p-value there is."""
        return min(self.every / (self.count + 1), 1.0)

    def p_values(self, scores: Tensor) -> Tensor:
        """Return p = (1 + #{held-out score >= score}) / (n + 1) of scores of any shape, float64.

        Scores are compared in half precision, in which they are kept, and ties count as at least as
        strange. If only every r-th is kept, p is rounded up to the next multiple of r / (n + 1).
        Neither can make p smaller, so the promise holds.

        >>> Ranks.of(torch.tensor([1.0, 2.0, 3.0, 4.0])).p_values(torch.tensor([2.5, 9.0]))
        tensor([0.6000, 0.2000], dtype=torch.float64)
        """
        lowest_first = self.kept.float().flip(0).contiguous()
        coarse = scores.double().half().float().cpu().contiguous()
        higher = len(self.kept) - torch.searchsorted(lowest_first, coarse)
        return ((1 + higher).double() * self.every / (self.count + 1)).clamp(max=1)

    def state_dict(self) -> dict[str, Any]:
        """Return what `Ranks` takes."""
        return {"kept": self.kept, "every": self.every, "count": self.count}


class Verdicts(NamedTuple):
    """What a detector says of N pictures, on the CPU.

    probabilities: (N, K) float64, softmax(f(x) / T), T fitted to held-out images. label_p_values:
    (N, K), of each class; see `Detector.label_sets`. energy: (N,) float, E(x), of the picture as it
    is. scores: (N,) float64, high = strange. p_values: (N,) float64.
    """

    probabilities: Tensor
    label_p_values: Tensor
    energy: Tensor
    scores: Tensor
    p_values: Tensor


class Detector:
    """Tells unfamiliar pictures from those like the data, with p-values that keep their promise.

    The score is how untypical the network's whole answer is, not the sign of one number: minus the
    log density, under a `Mixture` fitted to familiar images, of the logits, the energy and the
    pattern entropy of the picture, rounded to a few levels. Both an energy that is too high and one
    that is too low are strange. benchmarks/detector_ablation.py compares the quantities.

    The promise needs held-out images that neither the weights nor the mixture were fitted to, and
    enough of them: from n images no p-value is below 1 / (n + 1), so with n = 15 and alpha = 0.05
    nothing can be called unfamiliar (`smallest`).

    >>> from sgld_nrg.models import build_model
    >>> held_out = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    >>> model = build_model("small-cnn", 10, 1, 8, width=4, depth=1)
    >>> detector = Detector.fit(model, held_out)
    >>> p = detector.p_values(torch.zeros(1, 1, 8, 8))  # a grey picture, among noise
    >>> bool(p < 0.05)
    True
    """

    def __init__(
        self,
        model: nn.Module,
        mixture: Mixture,
        levels: int,
        temperature: float,
        familiar: Ranks,
        labelled: Ranks,
    ):
        self.model, self.mixture, self.levels = model, mixture, levels
        self.temperature, self.familiar, self.labelled = temperature, familiar, labelled

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        images: Tensor,
        labels: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> Detector:
        """Fit a detector to a network and held-out images.

        images: (N, C, H, W) float, pixels in [-1, 1], that the weights were not fitted to; they
        calibrate the p-values. labels: (N,) int64, their classes, which calibrate label sets and
        the temperature; without them no class is ever ruled out and the temperature is 1.
        reference: images of the same kind, the training images say, that the mixture is fitted to;
        without them a random half of `images`, which then calibrates nothing.
        The temperature may see the images that calibrate, because no promise depends on it.
        Raises ValueError for no images, and FloatingPointError if the network's answers are not
        finite.
        """
        if len(images) < (2 if reference is None else 1):
            raise ValueError(f"too few held-out images to fit a detector: {len(images)}")
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"{len(images)} images and {len(labels)} labels")
        if reference is None:
            first, second = torch.randperm(len(images), generator=_generator()).tensor_split(2)
            reference, images = images[first], images[second]
            labels = None if labels is None else labels[second]
        levels = _fewest_levels(model, reference[:ROUNDED])
        values, classes = quantities(model, reference, levels)
        logits = predict(model, images, BATCH_SIZE).double().cpu()
        mixture = Mixture.fit(values, classes, logits.shape[1])
        familiar = Ranks.of(mixture.strangeness(quantities(model, images, levels)[0]))
        temperature, own = 1.0, logits.new_empty(0)
        if labels is not None:
            labels = labels.cpu()
            found = fit_temperature(logits, labels)
            temperature = found if 0.01 < found < 100 else 1.0  # else the images cannot tell
            own = -logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
        return cls(model, mixture, levels, temperature, familiar, Ranks.of(own))

    @property
    def smallest(self) -> float:
        """The smallest p-value that a picture can get; at an alpha not above it none is flagged."""
        return self.familiar.smallest

    def scores(self, images: Tensor) -> Tensor:
        """Return how strange images (N, C, H, W), pixels in [-1, 1], look: (N,) float64."""
        return self.mixture.strangeness(quantities(self.model, images, self.levels)[0])

    def p_values(self, images: Tensor) -> Tensor:
        """Return the p-values (N,) float64, in (0, 1], of images (N, C, H, W) in [-1, 1].

        p = (1 + #{held-out score >= score}) / (n + 1), so that P(p <= alpha) <= alpha for new
        images of the held-out ones' distribution. Source: Bates et al. 2023, arXiv 2104.08279,
        section 2.1; for how p is rounded up see `Ranks.p_values`.
        """
        return self.familiar.p_values(self.scores(images))

    def verdicts(self, images: Tensor) -> Verdicts:
        """Return all that is said of images (N, C, H, W), pixels in [-1, 1]."""
        logits = predict(self.model, images, BATCH_SIZE).cpu()
        exact, scores = logits.double(), self.scores(images)
        return Verdicts(
            (exact / self.temperature).softmax(1),
            self.labelled.p_values(-exact.log_softmax(1)),
            marginal_energy(logits),
            scores,
            self.familiar.p_values(scores),
        )

    def label_sets(self, verdicts: Verdicts, alpha: float) -> Tensor:
        """Return which classes are not ruled out at level alpha: (N, K) bool.

        Those of p-value alpha or more, and always the likeliest one, so that no set is empty. Of
        new images of the held-out ones' distribution, a share 1 - alpha at least has its true class
        in its set; a set says nothing of a picture that is of none. The score of class y is
        -log p(y|x), whose sets are the smallest on average. Source: Sadinle, Lei and Wasserman
        2019, "Least ambiguous set-valued classifiers with bounded error levels", arXiv 1609.00451.
        Raises ValueError unless 0 < alpha < 1.
        """
        if not 0 < alpha < 1:
            raise ValueError(f"alpha must be between 0 and 1, not {alpha}")
        likeliest = one_hot(verdicts.probabilities.argmax(1), verdicts.probabilities.shape[1])
        return (verdicts.label_p_values >= alpha) | likeliest.bool()

    def state_dict(self) -> dict[str, Any]:
        """Return plain types and tensors, some kilobytes, from which `from_state` makes it again.

        The network is not among them: a checkpoint holds it already.
        """
        return {
            "levels": self.levels,
            "temperature": self.temperature,
            "mixture": {name: value.float() for name, value in self.mixture.state.items()},
            "familiar": self.familiar.state_dict(),
            "labelled": self.labelled.state_dict(),
        }

    @classmethod
    def from_state(cls, model: nn.Module, state: dict[str, Any]) -> Detector:
        """Make a detector for a network from what `state_dict` returned for the same network.

        Raises UserError if the state is not whole.
        """
        try:
            return cls(
                model,
                Mixture(state["mixture"]),
                state["levels"],
                state["temperature"],
                Ranks(**state["familiar"]),
                Ranks(**state["labelled"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                "the checkpoint's detector is not whole: train it again, or name another"
            ) from error


def detector_for(model: nn.Module, dataset: Dataset) -> Detector:
    """Fit the detector of a network that was trained on a data set.

    The mixture is fitted to training images, MOST_REFERENCE at most. Temperature, label sets and
    p-values come from the validation split, to which no weight is fitted. What a JEM's training
    takes from that split is which epoch's classifier it starts from; the temperature is of no
    consequence for p-values and label sets. A training that chooses its last weights by the split,
    as train_classifier.py does, breaks the promise by a little.
    """
    train, (images, labels) = dataset.train.images, dataset.val
    rows = torch.randperm(len(train), generator=_generator())[:MOST_REFERENCE]
    return Detector.fit(model, images, labels, train[rows])


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def _fewest_levels(model: nn.Module, images: Tensor) -> int:
    """Return the fewest levels at which the network reads the same in pictures, 0 if none do."""
    classes = predict(model, images, BATCH_SIZE).argmax(1)
    for levels in LEVELS:
        coarse = predict(model, rounded(images, levels), BATCH_SIZE).argmax(1)
        if (coarse == classes).float().mean() >= SAME_CLASS:
            return levels
    return 0
