"""Scores of a classifier and of an out-of-distribution score, and their intervals.

Pure functions: each takes tensors, arrays or lists, computes in float64 and returns what json can
write. What is empty or misshapen is refused with a ValueError that names it, what is not finite
with a FloatingPointError: a NaN among scores would sort somewhere and give a believable AUROC.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

Values = Tensor | ArrayLike
MEASURES = ("auroc", "average_precision", "fpr95")  # of `detection`


def finite(values: Values, name: str, dimensions: int | None = None) -> Tensor:
    """Return values as a detached tensor of so many dimensions (None: any), or an error."""
    values = torch.as_tensor(values).detach()
    if values.numel() == 0 or values.dim() != (dimensions or values.dim()):
        raise ValueError(
            f"{name}: shape {tuple(values.shape)} is empty or has not "
            f"{dimensions or 'the right'} dimensions"
        )
    wrong = values.numel() - int(torch.isfinite(values).sum())
    if wrong:
        raise FloatingPointError(
            f"{name}: {wrong} of {values.numel()} values are not finite; find where they arise"
        )
    return values


def labels_of(labels: Values, num_classes: int) -> Tensor:
    """Return labels as an int64 tensor (N,) on the CPU; ValueError unless in 0..num_classes-1."""
    labels = finite(labels, "labels", 1).cpu()
    outside = labels.min() < 0 or labels.max() >= num_classes
    if num_classes < 2 or labels.is_floating_point() or outside:
        raise ValueError(f"labels must be integers in 0..{num_classes - 1}, of 2 or more classes")
    return labels.long()


def _logits_and_labels(logits: Values, labels: Values) -> tuple[Tensor, Tensor]:
    """Return float64 logits (N, K), K >= 2, and int64 labels (N,) on the CPU, or ValueError."""
    logits = finite(logits, "logits", 2).cpu().double()
    labels = labels_of(labels, logits.shape[1])
    if len(labels) != len(logits):
        shapes = f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"logits must be (N, K) and labels (N,); got {shapes}")
    return logits, labels


def classification(logits: Values, labels: Values) -> dict[str, Any]:
    """Score predictions: accuracy, negative log-likelihood, Brier score and confusion matrix.

    nll = mean -log p_y, in nat; brier = mean of sum_k (p_k - [k = y])^2, in 0..2 (Brier 1950);
    p = softmax(logits). logits: (N, K) float; labels: (N,) int in 0..K-1.
    Raises ValueError for others.
    Returns {"accuracy": 0..1, "nll", "brier", "confusion": K lists of K counts, row = true class}.
    """
    from sklearn.metrics import confusion_matrix

    logits, labels = _logits_and_labels(logits, labels)
    one_hot, predictions = nn.functional.one_hot(labels, logits.shape[1]), logits.argmax(1)
    return {
        "accuracy": (predictions == labels).double().mean().item(),
        "nll": nn.functional.cross_entropy(logits, labels).item(),
        "brier": (logits.softmax(1) - one_hot).square().sum(1).mean().item(),
        "confusion": confusion_matrix(labels, predictions, labels=range(logits.shape[1])).tolist(),
    }


def _reliability(confidence: Tensor, correct: Tensor, bins: int) -> list[dict[str, Any]]:
    """Return the equal-width bins of a reliability diagram; of an empty bin the means are None."""
    edges = torch.linspace(0, 1, bins + 1)
    # in float32, as torchmetrics bins
    indices = torch.bucketize(confidence.float(), edges, right=True) - 1
    rows = []
    for index in range(bins):
        inside = indices == index
        count = int(inside.sum())
        row: dict[str, Any] = {"low": index / bins, "high": (index + 1) / bins, "count": count}
        for name, values in (("confidence", confidence), ("accuracy", correct)):
            row[name] = values[inside].mean().item() if count else None
        rows.append(row)
    return rows


def _adaptive_ece(confidence: Tensor, correct: Tensor, bins: int) -> float:
    """Return the calibration error over bins of equal mass, whatever the order of ties."""
    unique = np.unique(confidence.numpy(), return_inverse=True, return_counts=True)
    sure, ties, counts = unique
    # a bin's edge may fall among ties: each then counts as their mean accuracy, as in random order
    accuracy = np.bincount(ties, weights=correct.numpy()) / counts
    gaps = np.repeat(accuracy - sure, counts)
    return float(sum(abs(part.sum()) for part in np.array_split(gaps, bins)) / len(gaps))


def calibration(logits: Values, labels: Values, bins: int = 15) -> dict[str, Any]:
    """Compare the confidence in the predicted class, max_k p_k, with how often it is right.

    ece = sum_b n_b / N |accuracy_b - confidence_b| over bins of equal width (Guo et al. 2017, arXiv
    1706.04599); mce = max_b of the same gap; adaptive_ece = ece over bins of equal mass, whose
    sizes differ by one at most (Nguyen and O'Connor 2015, arXiv 1508.05154; Nixon et al. 2019,
    arXiv 1904.01685). All in 0..1.
    logits: (N, K) float; labels: (N,) int in 0..K-1; bins: >= 1. Raises ValueError for others.
    Returns {"ece", "adaptive_ece", "mce", "bins", "reliability"}; reliability lists the bins of
    equal width, closed below, as {"low", "high", "count", "confidence", "accuracy"}, the last two
    None if the count is 0.

    Nine times in ten sure, and right every time:

    >>> logits = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
    >>> round(calibration(logits, torch.tensor([0, 1]))["ece"], 4)
    0.1
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    logits, labels = _logits_and_labels(logits, labels)
    # torchmetrics gives a float32 confidence of 1 a bin of its own; the one below is in the last
    probabilities = logits.softmax(1).clamp_max(1 - 2**-24)
    confidence, predictions = probabilities.max(1)
    correct = (predictions == labels).double()
    classes = logits.shape[1]
    ece, mce = (
        multiclass_calibration_error(probabilities, labels, classes, n_bins=bins, norm=norm).item()
        for norm in ("l1", "max")
    )
    return {
        "ece": ece,
        "adaptive_ece": _adaptive_ece(confidence, correct, bins),
        "mce": mce,
        "bins": bins,
        "reliability": _reliability(confidence, correct, bins),
    }


def calibration_errors(confidence: Values, correct: Values, bins: int = 15) -> list[float]:
    """Return [ece, adaptive_ece, mce] as `calibration` has them, a hundred times as fast.

    confidence: (N,) float in 0..1, of the predicted class; correct: (N,) bool or 0 and 1. For the
    bootstrap, whose resamples need no torchmetrics each.
    """
    sure = np.minimum(np.asarray(confidence, dtype=np.float64), 1 - 2**-24)
    right = np.asarray(correct, dtype=np.float64)
    edges = torch.linspace(0, 1, bins + 1).numpy()
    places = np.digitize(sure.astype(np.float32), edges) - 1
    counts = np.bincount(places, minlength=bins)
    gaps = np.abs(np.bincount(places, weights=right - sure, minlength=bins))
    adaptive = _adaptive_ece(torch.from_numpy(sure), torch.from_numpy(right), bins)
    return [gaps.sum() / len(sure), adaptive, (gaps / np.maximum(counts, 1)).max()]


def fit_temperature(logits: Values, labels: Values) -> float:
    """Fit the T > 0 that minimises the negative log-likelihood of logits / T, by LBFGS on log T.

    The NLL is convex in 1/T, so its slopes at T = 0.01 and 100 tell whether the best T lies
    between. If not (all images right: T -> 0; no better than chance: T -> inf) that end is
    returned.
    logits: (N, K) float of held-out images; labels: (N,) int in 0..K-1. Raises ValueError for
    others. Source: Guo et al. 2017, arXiv 1706.04599.
    """
    logits, labels = _logits_and_labels(logits, labels)
    # about the true class, whose term of the slope is then 0
    logits = logits - logits.gather(1, labels[:, None])
    slopes = [
        ((logits / t).softmax(1) * logits).sum(1).mean() for t in (0.01, 100)
    ]  # dNLL / d(1/T)
    slope_low, slope_high = slopes
    if slope_low <= 0 or slope_high > 0:  # 0 if every image is right and the rest underflows
        return 0.01 if slope_low <= 0 else 100.0
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    settings: dict[str, Any] = {"max_iter": 200, "tolerance_grad": 1e-12, "tolerance_change": 1e-14}
    optimiser = torch.optim.LBFGS([log_t], line_search_fn="strong_wolfe", **settings)

    def closure() -> Tensor:
        nll = nn.functional.cross_entropy(logits / log_t.exp(), labels)
        (log_t.grad,) = torch.autograd.grad(nll, log_t)
        return nll

    optimiser.step(closure)
    return log_t.exp().item()


def detection(scores_in: Values, scores_out: Values, name: str = "score") -> dict[str, Any]:
    """Score how well an OOD score ranks: out-of-distribution images are positive, high means OOD.

    auroc = P(in < out) + P(in = out) / 2; average_precision (a useless score has the share of OOD
    images); fpr95 = share of in-distribution images flagged at the highest threshold that flags
    95 % of the OOD images (papers that call in-distribution positive keep 95 % of those instead).
    All in 0..1. Source: Hendrycks and Gimpel 2017, arXiv 1610.02136; for fpr95 Liang et al. 2018,
    arXiv 1706.02690.
    scores_in: (N,), scores_out: (M,) float, unbounded. name: of the score, for the error if one is
    not finite. Returns {"auroc", "average_precision", "fpr95", "n_in": N, "n_out": M}.

    >>> detection([1.0, 2.0, 3.0, 4.0], [3.5, 8.0])["auroc"]
    0.875
    """
    return _detection(*_ranked(scores_in, scores_out, name))


def detection_intervals(
    scores_in: Values, scores_out: Values, resamples: int
) -> dict[str, list[float]]:
    """Return the bootstrap 95 % interval of each measure of `detection`; see `bootstrap`.

    Scores are sorted once, not for each resample.
    """
    inside, outside = _ranked(scores_in, scores_out)
    size = int(max(inside.max(), outside.max())) + 1

    def again(inside: np.ndarray, outside: np.ndarray) -> list[float]:
        found = _detection(inside, outside, size)
        return [found[measure] for measure in MEASURES]

    intervals = bootstrap(again, inside, outside, resamples=resamples, paired=False)
    return dict(zip(MEASURES, intervals, strict=True))


def _ranked(
    scores_in: Values, scores_out: Values, name: str = "score"
) -> tuple[np.ndarray, np.ndarray]:
    """Return the place of each score among the different ones of both, the lowest 0."""
    inside = finite(scores_in, f"{name} in distribution", 1).cpu().double().numpy()
    outside = finite(scores_out, f"{name} out of distribution", 1).cpu().double().numpy()
    _, places = np.unique(np.concatenate([inside, outside]), return_inverse=True)
    first, second = np.split(places, [len(inside)])
    return first, second


def _detection(inside: np.ndarray, outside: np.ndarray, size: int = 0) -> dict[str, Any]:
    """Return `detection` of places of scores; size: of which there are so many at least."""
    size = max(size, int(inside.max()) + 1, int(outside.max()) + 1)
    # at each threshold, the highest first
    false, true = (np.bincount(part, minlength=size)[::-1] for part in (inside, outside))
    flagged_in, flagged_out = np.cumsum(false), np.cumsum(true)
    flagged = np.maximum(flagged_in + flagged_out, 1)  # no resample holds the highest score
    below = (true * (len(inside) - flagged_in + false / 2)).sum()
    precision = (true / len(outside) * flagged_out / flagged).sum()
    at_95 = np.argmax(flagged_out / len(outside) >= 0.95)
    return {
        "auroc": float(below / (len(inside) * len(outside))),
        "average_precision": float(precision),
        "fpr95": float(flagged_in[at_95] / len(inside)),
        "n_in": len(inside),
        "n_out": len(outside),
    }


def bootstrap(
    statistic: Callable[..., Any],
    *arrays: Values,
    resamples: int = 200,
    seed: int = 0,
    paired: bool = True,
) -> list[Any]:
    """Return the 95 % percentile bootstrap interval of a statistic, or one for each of several.

    statistic: called with numpy arrays, returns a float or an array (S,) of S statistics, for which
    the result is a list of S intervals [low, high]. arrays: (N, ...) each, rows drawn with
    replacement. paired: the same rows of each (logits and labels of an image); else each is drawn
    by itself and may have its own length (scores in and out of distribution). resamples: >= 2.
    seed: same seed, same interval.
    Raises FloatingPointError if an array or a value of the statistic is not finite, ValueError if
    paired lengths differ.
    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3.
    """
    named = ((x, f"array {i} of the bootstrap") for i, x in enumerate(arrays))
    checked = [finite(x, name).cpu().numpy() for x, name in named]
    lengths = [len(array) for array in checked]
    if resamples < 2 or not lengths or (paired and len(set(lengths)) > 1):
        raise ValueError(
            "need 2 or more resamples and, paired, arrays of one length; "
            f"got {resamples}, lengths {lengths}"
        )
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        sizes = lengths[:1] if paired else lengths
        rows = [generator.integers(length, size=length) for length in sizes]
        if paired:
            rows = rows * len(checked)
        values.append(statistic(*(array[i] for array, i in zip(checked, rows, strict=True))))
    found = finite(np.array(values), "the bootstrapped statistic").numpy()
    return np.quantile(found, [0.025, 0.975], axis=0).T.tolist()
