"""Scores of a classifier, of an out-of-distribution score, of drawn images and of chains: pure functions.

Each takes tensors, arrays or lists, computes in float64 and returns what json can write. What is empty or misshapen is
refused with a ValueError that names it, what is not finite with a FloatingPointError: a NaN among scores would sort
somewhere and give a believable AUROC. scikit-learn ranks, because torchmetrics' AUROC squashes scores outside [0, 1] by
a sigmoid, which ties energies.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.metrics import average_precision_score, confusion_matrix, roc_auc_score, roc_curve
from torch import nn
from torchmetrics.functional.classification import multiclass_calibration_error
from torchmetrics.image.fid import FrechetInceptionDistance


def _finite(values, name, dimensions=None):
    """Return values as a detached tensor with so many dimensions (None: any), or raise an error that names them."""
    values = torch.as_tensor(values).detach()
    if values.numel() == 0 or values.dim() != (dimensions or values.dim()):
        raise ValueError(f"{name}: shape {tuple(values.shape)} is empty or has not {dimensions or 'the right'} dimensions")
    wrong = values.numel() - int(torch.isfinite(values).sum())
    if wrong:
        raise FloatingPointError(f"{name}: {wrong} of {values.numel()} values are not finite; find where they arise")
    return values


def _labels(labels, num_classes):
    """Return labels as an int64 tensor (N,) on the CPU, or raise ValueError for others than 0..num_classes-1."""
    labels = _finite(labels, "labels", 1).cpu()
    if num_classes < 2 or labels.is_floating_point() or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels must be integers in 0..{num_classes - 1}, of 2 or more classes")
    return labels.long()


def _logits_and_labels(logits, labels):
    """Return float64 logits (N, K), K >= 2, and int64 labels (N,) on the CPU, or raise ValueError."""
    logits = _finite(logits, "logits", 2).cpu().double()
    labels = _labels(labels, logits.shape[1])
    if len(labels) != len(logits):
        raise ValueError(f"logits must be (N, K) and labels (N,); got {tuple(logits.shape)} and {tuple(labels.shape)}")
    return logits, labels


def _two_feature_sets(first, second, least):
    """Return two (N, D) tensors as float64 about their pooled mean, which moves no distance but spares digits."""
    first, second = (_finite(features, "features", 2).double() for features in (first, second))
    if first.shape[1] != second.shape[1] or min(len(first), len(second)) < least:
        raise ValueError(f"features need one width and {least} or more rows: {tuple(first.shape)}, {tuple(second.shape)}")
    centre = torch.cat([first, second]).mean(0)
    return first - centre, second - centre


def classification(logits, labels):
    """Score predictions: accuracy, negative log-likelihood, Brier score and confusion matrix.

    nll = mean -log p_y, in nat; brier = mean of sum_k (p_k - [k = y])^2, in 0..2 (Brier 1950); p = softmax(logits).
    logits: (N, K) float; labels: (N,) int in 0..K-1. Raises ValueError for others.
    Returns {"accuracy": 0..1, "nll", "brier", "confusion": K lists of K counts, row = true class}.
    """
    logits, labels = _logits_and_labels(logits, labels)
    one_hot, predictions = nn.functional.one_hot(labels, logits.shape[1]), logits.argmax(1)
    return {
        "accuracy": (predictions == labels).double().mean().item(),
        "nll": nn.functional.cross_entropy(logits, labels).item(),
        "brier": (logits.softmax(1) - one_hot).square().sum(1).mean().item(),
        "confusion": confusion_matrix(labels, predictions, labels=range(logits.shape[1])).tolist(),
    }


def _reliability(confidence, correct, bins):
    """Return the equal-width bins of a reliability diagram; an empty bin's confidence and accuracy are None."""
    edges = torch.linspace(0, 1, bins + 1)
    indices = torch.bucketize(confidence.float(), edges, right=True) - 1  # in float32, as torchmetrics bins
    rows = []
    for index in range(bins):
        inside = indices == index
        count = int(inside.sum())
        p, right = (values[inside].mean().item() if count else None for values in (confidence, correct))
        rows.append({"low": index / bins, "high": (index + 1) / bins, "count": count, "confidence": p, "accuracy": right})
    return rows


def _adaptive_ece(confidence, correct, bins):
    """Return the calibration error over bins of equal mass, whatever the order of equally confident images."""
    confidence, ties, counts = np.unique(confidence.numpy(), return_inverse=True, return_counts=True)
    # a bin's edge may fall among ties: each then counts as their mean accuracy, as in random order
    accuracy = np.bincount(ties, weights=correct.numpy()) / counts
    gaps = np.repeat(accuracy - confidence, counts)
    return float(sum(abs(part.sum()) for part in np.array_split(gaps, bins)) / len(gaps))


def calibration(logits, labels, bins=15):
    """Compare the confidence in the predicted class, max_k p_k, with how often it is right.

    ece = sum_b n_b / N |accuracy_b - confidence_b| over bins of equal width (Guo et al. 2017, arXiv 1706.04599);
    mce = max_b of the same gap; adaptive_ece = ece over bins of equal mass, whose sizes differ by one at most (Nguyen
    and O'Connor 2015, arXiv 1508.05154; Nixon et al. 2019, arXiv 1904.01685). All in 0..1.
    logits: (N, K) float; labels: (N,) int in 0..K-1; bins: >= 1. Raises ValueError for others.
    Returns {"ece", "adaptive_ece", "mce", "bins", "reliability"}; reliability lists the bins of equal width, closed
    below, as {"low", "high", "count", "confidence", "accuracy"}, the last two None where the count is 0.

    Nine times in ten sure, and right every time:

    >>> logits = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
    >>> round(calibration(logits, torch.tensor([0, 1]))["ece"], 4)
    0.1
    """
    logits, labels = _logits_and_labels(logits, labels)
    # torchmetrics gives a confidence of 1 in float32 a bin of its own; the largest float32 below 1 is in the last bin
    probabilities = logits.softmax(1).clamp_max(1 - 2**-24)
    confidence, predictions = probabilities.max(1)
    correct = (predictions == labels).double()
    return {
        "ece": multiclass_calibration_error(probabilities, labels, logits.shape[1], n_bins=bins, norm="l1").item(),
        "adaptive_ece": _adaptive_ece(confidence, correct, bins),
        "mce": multiclass_calibration_error(probabilities, labels, logits.shape[1], n_bins=bins, norm="max").item(),
        "bins": bins,
        "reliability": _reliability(confidence, correct, bins),
    }


def fit_temperature(logits, labels):
    """Fit the temperature T > 0 that minimises the negative log-likelihood of logits / T, by LBFGS on log T.

    The NLL is convex in 1/T, so its slopes at T = 0.01 and 100 tell whether the best T lies between; where not (all
    images right: T -> 0; no better than chance: T -> inf) that end is returned. Source: Guo et al. 2017, arXiv 1706.04599.
    logits: (N, K) float of held-out images; labels: (N,) int in 0..K-1. Raises ValueError for others. Returns T.
    """
    logits, labels = _logits_and_labels(logits, labels)
    logits = logits - logits.gather(1, labels[:, None])  # about the true class, whose term of the slope is then 0
    slope_low, slope_high = (((logits / t).softmax(1) * logits).sum(1).mean() for t in (0.01, 100))  # dNLL / d(1/T)
    if slope_low <= 0 or slope_high > 0:  # exactly 0 where every image is right and the rest underflows
        return 0.01 if slope_low <= 0 else 100.0
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    settings = {"max_iter": 200, "tolerance_grad": 1e-12, "tolerance_change": 1e-14}
    optimiser = torch.optim.LBFGS([log_t], line_search_fn="strong_wolfe", **settings)

    def closure():
        nll = nn.functional.cross_entropy(logits / log_t.exp(), labels)
        (log_t.grad,) = torch.autograd.grad(nll, log_t)
        return nll

    optimiser.step(closure)
    return log_t.exp().item()


def detection(scores_in, scores_out, name):
    """Score how well an OOD score ranks: out-of-distribution images are the positive class, high means OOD.

    auroc = P(in < out) + P(in = out) / 2; average_precision (a useless score has the share of OOD images); fpr95 =
    share of in-distribution images flagged at the highest threshold that flags 95 % of the OOD images (papers that
    call in-distribution positive keep 95 % of those instead). All in 0..1.
    Source: Hendrycks and Gimpel 2017, arXiv 1610.02136; for fpr95 Liang et al. 2018, arXiv 1706.02690.
    scores_in: (N,), scores_out: (M,) float, unbounded; name: of the score, for the error where one is not finite.
    Returns {"auroc", "average_precision", "fpr95", "n_in": N, "n_out": M}.

    >>> detection(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([3.5, 8.0]), "energy")["auroc"]
    0.875
    """
    inside = _finite(scores_in, f"{name} in distribution", 1).cpu().double()
    outside = _finite(scores_out, f"{name} out of distribution", 1).cpu().double()
    scores = torch.cat([inside, outside]).numpy()
    positive = np.repeat([0, 1], [len(inside), len(outside)])
    false_rate, true_rate, _ = roc_curve(positive, scores, drop_intermediate=False)  # else the 95 % point may be gone
    auroc, precision = float(roc_auc_score(positive, scores)), float(average_precision_score(positive, scores))
    fpr95 = float(false_rate[np.argmax(true_rate >= 0.95)])
    return {"auroc": auroc, "average_precision": precision, "fpr95": fpr95, "n_in": len(inside), "n_out": len(outside)}


def fast_detection(scores_in, scores_out):
    """Return [auroc, average_precision, fpr95] of `detection`, fast enough for `bootstrap`: one sort, no checks of ours.

    scores_in: (N,), scores_out: (M,) float, unbounded, high = OOD. Raises FloatingPointError where one is not finite.
    """
    inside = _finite(scores_in, "scores_in", 1).cpu().double().numpy()
    outside = _finite(scores_out, "scores_out", 1).cpu().double().numpy()
    thresholds, ties = np.unique(np.concatenate([inside, outside]), return_inverse=True)
    false, true = (np.bincount(part, minlength=len(thresholds)) for part in np.split(ties, [len(inside)]))
    flagged_in, flagged_out = np.cumsum(false[::-1]), np.cumsum(true[::-1])  # at each threshold, the highest first
    auroc = (true[::-1] * (len(inside) - flagged_in + false[::-1] / 2)).sum() / (len(inside) * len(outside))
    precision = (true[::-1] / len(outside) * flagged_out / (flagged_in + flagged_out)).sum()
    fpr95 = flagged_in[np.argmax(flagged_out / len(outside) >= 0.95)] / len(inside)
    return [float(auroc), float(precision), float(fpr95)]


def bootstrap(statistic, *arrays, resamples=200, seed=0, paired=True):
    """Return the 95 % percentile bootstrap interval of a statistic, [low, high], or one for each of several.

    statistic: called as statistic(*arrays) with numpy arrays, returns a float or an array (S,) of S statistics, for which
    the result is a list of S intervals. arrays: (N, ...) each, rows drawn with
    replacement. paired: the same rows of each (logits and labels of an image); else each is drawn by itself and may
    have its own length (scores in and out of distribution). resamples: >= 2. seed: same seed, same interval.
    Raises FloatingPointError where an array or a value of the statistic is not finite, ValueError where paired lengths
    differ.
    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3.
    """
    arrays = [_finite(array, f"array {i} of the bootstrap").cpu().numpy() for i, array in enumerate(arrays)]
    lengths = [len(array) for array in arrays]
    if resamples < 2 or not lengths or (paired and len(set(lengths)) > 1):
        raise ValueError(f"need 2 or more resamples and, paired, arrays of one length; got {resamples}, lengths {lengths}")
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        draws = [generator.integers(length, size=length) for length in (lengths[:1] if paired else lengths)]
        rows = draws * len(arrays) if paired else draws
        values.append(statistic(*(array[index] for array, index in zip(arrays, rows, strict=True))))
    return np.quantile(_finite(np.array(values), "the bootstrapped statistic").numpy(), [0.025, 0.975], axis=0).T.tolist()


def frechet_distance(features_a, features_b):
    """Return the Fréchet distance of Gaussians fitted to two sets of features, in squared units of the features.

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), S over N - 1; >= 0, what rounding puts below is 0. Comparable
    for one feature network and N only, being biased upwards at small N. Source: Heusel et al. 2017, arXiv 1706.08500.
    features_a: (N, D), features_b: (M, D) float, N and M >= 2. Raises ValueError for others.

    >>> features = torch.randn(100, 3)
    >>> round(frechet_distance(features, features + 2), 3)  # 2 in each of three directions
    12.0
    """
    features_a, features_b = (features.cpu() for features in _two_feature_sets(features_a, features_b, least=2))
    network = nn.Identity()
    network.num_features = features_a.shape[1]  # else torchmetrics sends a random image through it to see the width
    distance = FrechetInceptionDistance(feature=network, sync_on_compute=False).set_dtype(torch.float64)
    distance.update(features_a, real=True)
    distance.update(features_b, real=False)
    return max(distance.compute().item(), 0.0)


def precision_recall(features_real, features_fake, k=3, chunk=1000):
    """Return the share of fakes on the manifold of the real (precision) and of real on that of the fakes (recall).

    A point is on a set's manifold if it is as near to some member as that member's k-th nearest other member:
    precision = mean over fakes of [exists r: |fake - r| <= radius_k(r)]. Source: Kynkäänniemi et al. 2019, arXiv 1904.06991.
    features_real: (N, D), features_fake: (M, D) float, N and M > k >= 1. chunk: rows of distances held at once.
    Returns {"precision": 0..1, "recall": 0..1}. Raises ValueError for other features or k.
    """
    if k < 1:
        raise ValueError(f"k must be 1 or more; got {k}")
    real, fake = _two_feature_sets(features_real, features_fake, least=k + 1)
    slack = 1e-6 * torch.cat([real, fake]).norm(dim=1).max()  # the matmul in cdist leaves some 1e-7 of the scale

    def share(points, members):
        nearby = [torch.cdist(part, members).topk(k + 1, largest=False).values for part in members.split(chunk)]
        radii = torch.cat(nearby)[:, -1] + slack  # the nearest of the k + 1 is the member itself
        covered = [(torch.cdist(part, members) <= radii).any(1) for part in points.split(chunk)]
        return torch.cat(covered).double().mean().item()

    return {"precision": share(fake, real), "recall": share(real, fake)}


def class_histogram(labels, num_classes):
    """Count the classes of samples, with the entropy H / ln K: 0 for one class alone, 1 for all equally often.

    labels: (N,) int in 0..K-1; num_classes: K >= 2. ValueError for others. Returns {"counts": K ints, "entropy": 0..1}.
    """
    counts = torch.bincount(_labels(labels, num_classes), minlength=num_classes)
    entropy = torch.special.entr(counts.double() / counts.sum()).sum() / np.log(num_classes)
    return {"counts": counts.tolist(), "entropy": min(entropy.item(), 1.0)}


def nearest(images, pool, chunk=500):
    """Find each image's nearest pool image: its L2 distance, in the units of the pixels, and its index.

    In each block of the pool a float64 distance by matmul proposes four candidates and their exact distances decide,
    so a copy is at distance 0 and near-duplicates keep their order. Among equals any may be named.
    images: (N, ...), pool: (M, ...), each image of one shape. chunk: images in a block; the pool's are ten times that.
    Returns (N distances >= 0, N indices in 0..M-1). Raises ValueError for other shapes.
    """
    images, pool = _finite(images, "images"), _finite(pool, "pool")
    if images.dim() < 2 or images.shape[1:] != pool.shape[1:]:
        raise ValueError(f"images and pool must hold images of one shape; got {tuple(images.shape)}, {tuple(pool.shape)}")
    distances, indices = [], []
    for part in images.flatten(1).split(chunk):
        part, found = part.double(), []
        for number, block in enumerate(pool.flatten(1).split(10 * chunk)):
            block = block.to(part)
            candidates = torch.cdist(part, block).topk(min(4, len(block)), largest=False).indices
            exact, which = (part[:, None] - block[candidates]).norm(dim=2).min(1)  # (rows, 4) to (rows,)
            found.append((exact, candidates.gather(1, which[:, None]).squeeze(1) + number * 10 * chunk))
        exact, places = (torch.stack(column) for column in zip(*found, strict=True))  # (blocks, rows)
        closest, block = exact.min(0)
        distances += closest.tolist()
        indices += places.gather(0, block[None]).squeeze(0).tolist()
    return distances, indices


def split_rhat(series):
    """Return split R-hat: near 1 where the halves of all chains agree in their mean, above where not.

    sqrt((n - 1) / n + (B / n) / W) over the halves, of n draws each; W: mean of their variances, B / n: variance of
    their means, both over N - 1. The middle one of an odd number of draws is left out. Source: Gelman et al.,
    "Bayesian Data Analysis", 3rd ed., section 11.4; Vehtari et al. 2021, arXiv 1903.08008, without rank normalisation.
    series: (chains, draws) float, 4 or more draws. Raises ValueError for others and where no chain moves.
    """
    series = _finite(series, "series", 2).cpu().double()
    half = series.shape[1] // 2
    halves = torch.cat([series[:, :half], series[:, -half:]])
    if half < 2 or (halves == halves[:, :1]).all():
        raise ValueError(f"series: split R-hat needs 4 or more draws and a chain that moves; got {tuple(series.shape)}")
    return ((half - 1) / half + halves.mean(1).var() / halves.var(1).mean()).sqrt().item()


def autocorrelation(series, max_lag):
    """Return the autocorrelation at lags 0..max_lag, each chain about its own mean, averaged over the chains.

    rho_k = sum_t (x_t - m)(x_{t+k} - m) / sum_t (x_t - m)^2, in -1..1; rho_0 = 1. As usual not corrected for the k
    missing terms or for m being estimated, which lower it by about max(k, correlation time) / draws.
    series: (chains, draws) float; max_lag: 0..draws-1. Raises ValueError for others and where a chain never moves.
    """
    series = _finite(series, "series", 2).cpu().double()
    draws = series.shape[1]
    if not 0 <= max_lag < draws or (series == series[:, :1]).all(1).any():
        raise ValueError(f"series: needs chains that move and a max_lag in 0..{draws - 1}; got max_lag {max_lag}")
    centred = series - series.mean(1, keepdim=True)
    products = [(centred[:, : draws - lag] * centred[:, lag:]).sum(1) for lag in range(max_lag + 1)]
    return [(product / products[0]).mean().item() for product in products]
