"""The scores: each against an independent implementation or a closed form, and what they refuse."""

import json
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.signal
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from sgld_nrg.support import metrics, sample_metrics

SIGMAS = 5  # of the statistical error that a test allows


def random(seed=0):
    return np.random.default_rng(seed)


def example(count=400, classes=5, scale=2.0, seed=0):
    """Return overconfident logits (count, classes), and labels from softmax(logits / scale)."""
    rng = random(seed)
    logits = rng.normal(size=(count, classes)) * 2
    noise = rng.gumbel(size=(count, classes))
    return torch.tensor(logits * scale), torch.tensor((logits + noise).argmax(1))


def with_moments(mean, covariance, count, rng):
    """Return (count, D) features whose sample mean and covariance are exactly the given ones."""
    raw = rng.normal(size=(count, len(mean)))
    raw = raw - raw.mean(0)
    white = np.linalg.solve(np.linalg.cholesky(np.cov(raw.T)), raw.T)
    return (np.linalg.cholesky(covariance) @ white).T + mean


def test_classification_scores_equal_a_loop_over_the_images():
    logits, labels = example(60, 4)
    nll = brier = right = 0
    confusion = [[0] * 4 for _ in range(4)]
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        exponentials = [math.exp(value) for value in row]
        p = [value / sum(exponentials) for value in exponentials]
        nll -= math.log(p[label]) / 60
        brier += sum((p[k] - (k == label)) ** 2 for k in range(4)) / 60
        right += (p.index(max(p)) == label) / 60
        confusion[label][p.index(max(p))] += 1
    scores = metrics.classification(logits, labels)
    assert scores["confusion"] == confusion
    found = [scores[key] for key in ("accuracy", "nll", "brier")]
    assert found == pytest.approx([right, nll, brier], rel=1e-12)


def test_the_brier_score_is_two_for_certain_errors_and_zero_for_certain_hits():
    logits = torch.tensor([[0.0, 1000.0, 0.0]] * 3)
    assert metrics.classification(logits, [0, 2, 0])["brier"] == 2
    scores = metrics.classification(logits, [1, 1, 1])
    assert (scores["brier"], scores["nll"], scores["accuracy"]) == (0, 0, 1)
    assert scores["confusion"] == [[0, 0, 0], [0, 3, 0], [0, 0, 0]]


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_calibration_errors_equal_those_of_the_reliability_bins(bins):
    logits, labels = example(700)
    scores = metrics.calibration(logits, labels, bins)
    rows = scores["reliability"]
    filled = [row for row in rows if row["count"]]
    gaps = [(row["count"], abs(row["accuracy"] - row["confidence"])) for row in filled]
    assert scores["bins"] == len(rows) == bins and sum(row["count"] for row in rows) == 700
    assert scores["ece"] == pytest.approx(sum(count * gap for count, gap in gaps) / 700, abs=1e-5)
    assert scores["mce"] == pytest.approx(max(gap for _, gap in gaps), abs=1e-5)


def test_reliability_bins_are_those_of_a_loop_over_the_images():
    logits, labels = example(300)
    probabilities = torch.softmax(logits, 1).numpy()
    rows = metrics.calibration(logits, labels, 10)["reliability"]
    for index, row in enumerate(rows):
        members = [i for i in range(300) if index == int(probabilities[i].max() * 10)]
        assert (row["low"], row["high"]) == (index / 10, (index + 1) / 10)
        assert row["count"] == len(members)
        if members:
            confidence = np.mean([probabilities[i].max() for i in members])
            accuracy = np.mean([probabilities[i].argmax() == labels[i] for i in members])
            assert row["confidence"] == pytest.approx(confidence, abs=1e-6)
            assert row["accuracy"] == pytest.approx(accuracy)
        else:
            assert row["confidence"] is None and row["accuracy"] is None
    assert rows[0]["count"] == 0  # five classes: the largest probability is at least 1/5


def test_a_confidence_on_an_edge_is_in_the_bin_above():
    rows = metrics.calibration(torch.zeros(4, 2), [0, 0, 0, 1], 2)["reliability"]
    assert [row["count"] for row in rows] == [0, 4]
    assert (rows[1]["confidence"], rows[1]["accuracy"]) == (0.5, 0.75)


@pytest.mark.parametrize("scale", [20.0, 1000.0])
def test_confidences_that_round_to_one_are_in_the_last_bin(scale):
    # half of them certain and wrong, half at 14.5/15 and right: one bin, whose gaps cancel in part
    certain, likely = [scale, 0.0], [math.log(14.5 / 0.5), 0.0]
    logits, labels = torch.tensor([certain] * 10 + [likely] * 10), [1] * 10 + [0] * 10
    scores = metrics.calibration(logits, labels)
    expected = abs((1 + 14.5 / 15) / 2 - 0.5)
    assert scores["reliability"][-1]["count"] == 20
    assert [scores["ece"], scores["mce"]] == pytest.approx([expected, expected], abs=1e-6)


def test_calibration_errors_of_a_calibrated_classifier_are_within_their_statistical_error():
    count, bins = 20_000, 10
    scores = metrics.calibration(*example(count, scale=1.0), bins)
    # each bin's gap has deviation <= 0.5 / sqrt(count_b); Cauchy and Schwarz
    limit = 0.5 * math.sqrt(bins / count)
    assert max(scores["ece"], scores["adaptive_ece"]) < 2 * limit
    overconfident = metrics.calibration(*example(count, scale=3.0), bins)
    assert min(overconfident["ece"], overconfident["adaptive_ece"]) > 10 * limit


def test_adaptive_ece_equals_a_loop_over_sorted_groups_of_equal_size():
    logits, labels = example(600)
    confidence, predictions = logits.softmax(1).max(1)
    triples = sorted(zip(confidence.tolist(), (predictions == labels).tolist(), strict=True))
    groups = [triples[start : start + 40] for start in range(0, 600, 40)]
    expected = sum(abs(sum(c - right for c, right in group)) for group in groups) / 600
    found = metrics.calibration(logits, labels, 15)["adaptive_ece"]
    assert found == pytest.approx(expected, abs=1e-6)


def test_adaptive_ece_does_not_depend_on_the_order_of_equally_confident_images():
    logits = torch.tensor([[2.0, 0.0, 0.0]] * 60 + [[900.0, 0.0, 0.0]] * 40)
    labels = torch.tensor([0] * 36 + [1] * 24 + [0] * 20 + [2] * 20)
    expected = 0.6 * abs(0.6 - math.exp(2) / (math.exp(2) + 2)) + 0.4 * 0.5
    for seed in range(3):
        order = torch.tensor(random(seed).permutation(100))
        for bins in (7, 10):
            scores = metrics.calibration(logits[order], labels[order], bins)
            assert scores["adaptive_ece"] == pytest.approx(expected, abs=1e-6)


def test_more_bins_than_images_leave_bins_empty():
    scores = metrics.calibration(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), [0, 0], 15)
    p, q = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-3))
    expected = (1 - p + q) / 2
    assert [scores["ece"], scores["adaptive_ece"]] == pytest.approx([expected] * 2, abs=1e-6)
    assert scores["mce"] == pytest.approx(q, abs=1e-6)


@pytest.mark.parametrize("scale", [0.02, 0.3, 1.0, 4.0, 60.0])
def test_the_temperature_is_that_of_a_scalar_search(scale):
    logits, labels = example(500, scale=scale)

    def nll(log_temperature):
        z = logits.numpy() / math.exp(log_temperature)
        return -np.mean(z[np.arange(500), labels] - scipy.special.logsumexp(z, axis=1))

    settings = {"bounds": (-5, 5), "method": "bounded", "options": {"xatol": 1e-9}}
    found = scipy.optimize.minimize_scalar(nll, **settings)
    assert metrics.fit_temperature(logits, labels) == pytest.approx(math.exp(found.x), rel=1e-5)


def test_the_temperature_that_spoilt_the_logits_is_found_again():
    logits, labels = example(5000, scale=2.5)
    p = (logits / 2.5).softmax(1)
    z = logits / 2.5
    # Fisher's, about log T
    information = 5000 * ((p * z**2).sum(1) - (p * z).sum(1) ** 2).mean().item()
    error = SIGMAS / math.sqrt(information)
    assert metrics.fit_temperature(logits, labels) == pytest.approx(2.5, rel=error)


@pytest.mark.parametrize("gap", [1e-9, 0.5, 5.0, 50.0])
def test_a_temperature_without_a_minimum_is_the_end_of_its_range(gap):
    logits = torch.eye(3) * gap
    assert metrics.fit_temperature(logits, [0, 1, 2]) == 0.01
    assert metrics.fit_temperature(logits, [1, 2, 0]) == 100


@pytest.mark.parametrize("decimals", [0, 1, 12])
def test_detection_scores_equal_their_definitions_with_and_without_ties(decimals):
    rng = random(decimals)
    inside = rng.normal(size=90).round(decimals)
    outside = (rng.normal(size=70) + 1).round(decimals)
    above = (outside[:, None] > inside).mean() + (outside[:, None] == inside).mean() / 2
    precision = recall = 0
    for threshold in sorted(set(outside) | set(inside), reverse=True):
        hits, alarms = (outside >= threshold).sum(), (inside >= threshold).sum()
        precision += (hits / 70 - recall) * hits / (hits + alarms)
        recall = hits / 70
    threshold = max(t for t in set(outside) if (outside >= t).mean() >= 0.95)
    scores = metrics.detection(torch.tensor(inside), torch.tensor(outside), "energy")
    assert scores["auroc"] == pytest.approx(above)
    assert scores["average_precision"] == pytest.approx(precision)
    assert scores["fpr95"] == pytest.approx((inside >= threshold).mean())
    assert (scores["n_in"], scores["n_out"]) == (90, 70)


def test_fpr95_counts_from_the_image_that_completes_95_percent():
    outside = np.arange(20.0)  # 19 of 20 are at 1 or above
    scores = metrics.detection([0.0, 0.5, 0.9, 1.0, 1.5], outside, "energy")
    assert scores["fpr95"] == pytest.approx(2 / 5)


def test_fpr95_of_a_useless_score_is_95_percent():
    scores = metrics.detection(np.arange(40.0), np.arange(40.0), "energy")
    assert scores["fpr95"] == pytest.approx(0.95)


def test_high_means_out_of_distribution_also_for_energies_far_from_zero():
    inside, outside = -1000 - np.arange(10.0), -900 - np.arange(10.0)
    scores = metrics.detection(inside, outside, "energy")
    found = [scores[name] for name in ("auroc", "average_precision", "fpr95")]
    assert found == pytest.approx([1, 1, 0])
    swapped = metrics.detection(outside, inside, "energy")
    assert (swapped["auroc"], swapped["fpr95"]) == (0, 1)


@pytest.mark.parametrize("decimals", [0, 1, 12])
def test_detection_scores_are_those_of_scikit_learn_with_and_without_ties(decimals):
    rng = random(decimals)
    inside = rng.normal(size=130).round(decimals)
    outside = (rng.normal(size=57) * 2 + 0.3).round(decimals)
    scores, is_ood = np.concatenate([inside, outside]), np.repeat([0, 1], [130, 57])
    false_rate, true_rate, _ = roc_curve(is_ood, scores, drop_intermediate=False)
    expected = {
        "auroc": roc_auc_score(is_ood, scores),
        "average_precision": average_precision_score(is_ood, scores),
        "fpr95": false_rate[np.argmax(true_rate >= 0.95)],
        "n_in": 130,
        "n_out": 57,
    }
    assert metrics.detection(inside, outside) == pytest.approx(expected, abs=1e-12)


def test_scores_that_are_all_alike_say_nothing():
    found = metrics.detection([3.0, 3.0], [3.0])
    expected = {"auroc": 0.5, "average_precision": 1 / 3, "fpr95": 1, "n_in": 2, "n_out": 1}
    assert found == pytest.approx(expected, abs=1e-12)


def test_a_bootstrap_of_several_statistics_gives_each_its_interval():
    sample = random(11).normal(size=100)
    both = metrics.bootstrap(lambda x: np.array([x.mean(), x.max()]), sample)
    assert both == [metrics.bootstrap(np.mean, sample), metrics.bootstrap(np.max, sample)]


def test_bootstrap_intervals_of_a_mean_have_the_width_of_the_normal_theory():
    sample = random(1).normal(size=400)
    low, high = metrics.bootstrap(np.mean, sample, resamples=4000)
    error = sample.std() / math.sqrt(400)
    # a 2.5 % quantile of 4000 draws has deviation sqrt(0.025 * 0.975 / 4000) / density, which is
    # 0.042 errors
    assert low == pytest.approx(sample.mean() - 1.96 * error, abs=SIGMAS * 0.042 * error)
    assert high == pytest.approx(sample.mean() + 1.96 * error, abs=SIGMAS * 0.042 * error)


def test_bootstrap_intervals_cover_the_true_mean_as_often_as_they_say():
    samples = random(2).normal(size=(20, 50, 20))  # 400 of size 50, twenty in one bootstrap
    intervals = [
        interval
        for seed, columns in enumerate(samples)
        for interval in metrics.bootstrap(lambda x: x.mean(0), columns, seed=seed)
    ]
    covered = np.mean([low <= 0 <= high for low, high in intervals])
    assert len(intervals) == 400
    expected = 0.94  # P(|t| < 1.96 sqrt(49/50)) at 49 degrees of freedom
    assert abs(covered - expected) < SIGMAS * math.sqrt(0.95 * 0.05 / 400)


def test_a_bootstrap_seed_gives_its_interval_again_and_another_seed_another():
    sample = random(3).normal(size=30)
    first = metrics.bootstrap(np.mean, sample, seed=4)
    assert metrics.bootstrap(np.mean, torch.tensor(sample), seed=4) == first
    assert metrics.bootstrap(np.mean, sample, seed=5) != first


def test_paired_arrays_are_resampled_together_and_others_apart():
    a = random(4).normal(size=80)
    low, high = metrics.bootstrap(lambda a, b: np.mean(b - a), a, a + 2)
    assert [low, high] == pytest.approx([2, 2])
    apart = metrics.bootstrap(lambda a, b: np.mean(b) - np.mean(a), a, a[:50] + 2, paired=False)
    assert apart[1] - apart[0] > 0.2
    with pytest.raises(ValueError, match="one length"):
        metrics.bootstrap(lambda a, b: 0.0, a, a[:50])


def test_the_bootstrap_takes_our_own_scores():
    logits, labels = example(200)
    accuracy = metrics.classification(logits, labels)["accuracy"]

    def statistic(*arrays):
        return metrics.classification(*arrays)["accuracy"]

    low, high = metrics.bootstrap(statistic, logits, labels, resamples=50)
    assert low < accuracy < high


def test_the_bootstrap_interval_of_an_auroc_has_the_width_of_delong():
    inside, outside = random(5).normal(size=300), random(6).normal(size=200) + 1
    beaten = outside[:, None] > inside
    # DeLong et al. 1988
    variance = beaten.mean(0).var(ddof=1) / 300 + beaten.mean(1).var(ddof=1) / 200

    def auroc(*scores):
        return metrics.detection(*scores)["auroc"]

    low, high = metrics.bootstrap(auroc, inside, outside, resamples=1000, paired=False)
    # 1000 resamples leave each end 0.084 deviations of error
    error = SIGMAS * 0.084 * math.sqrt(2 * variance)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(variance), abs=error)
    assert low < beaten.mean() < high


def test_a_bootstrapped_statistic_that_is_not_finite_is_refused():
    with pytest.raises(FloatingPointError, match="bootstrapped statistic"):
        metrics.bootstrap(lambda a: math.nan, [1.0, 2.0])


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_the_frechet_distance_of_diagonal_gaussians_is_the_closed_form(offset):
    rng, sizes = random(7), (500, 300)
    means, deviations = rng.normal(size=(2, 4)), rng.uniform(0.5, 2, size=(2, 4))
    a, b = (
        with_moments(means[i] + offset, np.diag(deviations[i] ** 2), sizes[i], rng)
        for i in range(2)
    )
    expected = ((means[0] - means[1]) ** 2 + (deviations[0] - deviations[1]) ** 2).sum()
    assert sample_metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-7)
    swapped = sample_metrics.frechet_distance(torch.tensor(b), torch.tensor(a))
    assert swapped == pytest.approx(expected, rel=1e-7)


def test_the_frechet_distance_of_correlated_features_is_that_of_a_matrix_square_root():
    rng = random(8)
    a = rng.normal(size=(90, 6)) @ rng.normal(size=(6, 6))
    b = rng.normal(size=(70, 6)) @ rng.normal(size=(6, 6)) + 1
    s, t = np.cov(a.T), np.cov(b.T)
    apart = ((a.mean(0) - b.mean(0)) ** 2).sum()
    expected = apart + np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real)
    assert sample_metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    single = sample_metrics.frechet_distance(a.astype(np.float32), b.astype(np.float32))
    assert single == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rows, width", [(50, 5), (5, 50), (2, 1)])
def test_the_frechet_distance_of_a_set_to_itself_is_zero_and_never_below(rows, width):
    features = random(9).normal(size=(rows, width))
    assert 0 <= sample_metrics.frechet_distance(features, features) < 1e-6


def brute_force_share(points, members, k):
    inside = 0
    for point in points:
        for i, member in enumerate(members):
            others = np.delete(members, i, axis=0)
            others = sorted(np.linalg.norm(member - other) for other in others)
            if np.linalg.norm(point - member) <= others[k - 1]:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.parametrize("k, chunk", [(1, 1000), (3, 7), (3, 1000)])
def test_precision_and_recall_equal_a_loop_over_all_pairs(k, chunk):
    rng = random(k)
    real, fake = rng.normal(size=(40, 3)), rng.normal(size=(30, 3)) * 0.7 + 0.5
    scores = sample_metrics.precision_recall(real, fake, k, chunk)
    precision, recall = brute_force_share(fake, real, k), brute_force_share(real, fake, k)
    assert scores == pytest.approx({"precision": precision, "recall": recall})
    assert 0 < scores["recall"] < scores["precision"] <= 1  # the fakes are narrower


def test_precision_and_recall_are_one_for_equal_sets_and_zero_for_distant_ones():
    features = random(10).normal(size=(60, 200)) + 30
    same = sample_metrics.precision_recall(features, features[::-1].copy())
    assert same == {"precision": 1, "recall": 1}
    assert sample_metrics.precision_recall(features, features + 100) == {
        "precision": 0,
        "recall": 0,
    }


def test_fakes_of_one_mode_are_precise_and_recall_that_mode_alone():
    rng = random(11)
    real = np.concatenate([rng.normal(size=(50, 2)), rng.normal(size=(50, 2)) + 100])
    scores = sample_metrics.precision_recall(real, real[:50])
    assert (scores["precision"], scores["recall"]) == (1, 0.5)


def test_a_set_of_copies_covers_its_own_point_alone():
    rng = random(12)
    copies = (rng.normal(size=(1, 1000)) + 3).repeat(40, 0)
    real = np.concatenate([copies, rng.normal(size=(60, 1000)) + 50])
    assert sample_metrics.precision_recall(real, copies[:20]) == {"precision": 1, "recall": 0.4}
    assert sample_metrics.precision_recall(real, copies[:20] + 0.01) == {
        "precision": 0,
        "recall": 0,
    }


def test_the_class_histogram_counts_and_its_entropy_is_relative():
    assert sample_metrics.class_histogram([0, 1, 2, 3], 4) == {"counts": [1, 1, 1, 1], "entropy": 1}
    one_class = sample_metrics.class_histogram(torch.tensor([2, 2]), 4)
    assert one_class == {"counts": [0, 0, 2, 0], "entropy": 0}
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(3)
    assert sample_metrics.class_histogram([0, 0, 0, 2], 3)["entropy"] == pytest.approx(expected)


@pytest.mark.parametrize("chunk", [2, 500])
def test_nearest_images_are_those_of_a_loop(chunk):
    rng = random(13)
    images, pool = rng.uniform(-1, 1, size=(11, 1, 5, 5)), rng.uniform(-1, 1, size=(70, 1, 5, 5))
    distances, indices = sample_metrics.nearest(torch.tensor(images), torch.tensor(pool), chunk)
    for image, distance, index in zip(images, distances, indices, strict=True):
        every = [math.sqrt(((image - other) ** 2).sum()) for other in pool]
        assert index == every.index(min(every))
        assert distance == pytest.approx(min(every), rel=1e-12)


@pytest.mark.parametrize("chunk", [4, 500])
def test_copies_are_at_distance_exactly_zero_among_near_duplicates(chunk):
    base = torch.tensor(random(14).uniform(0, 255, size=(1, 3, 16, 16)), dtype=torch.float32)
    pool = base.repeat(100, 1, 1, 1)
    pool[:, 0, 0, 0] += torch.arange(100) * 2e-4
    rows = [99, 0, 41, 40, 7]
    assert sample_metrics.nearest(pool[rows], pool, chunk) == ([0.0] * 5, rows)


def test_copies_are_found_when_the_rounding_of_a_matmul_in_float64_hides_the_difference():
    pool = torch.tensor(random(20).uniform(0, 255, size=(60, 1, 16, 16)))
    pool[:3] = pool[0]
    pool[1, 0, 0, 0] += 1e-7
    pool[2, 0, 0, 0] -= 1e-7
    assert sample_metrics.nearest(pool[:3].repeat(20, 1, 1, 1), pool) == (
        [0.0] * 60,
        [0, 1, 2] * 20,
    )


def test_near_duplicates_keep_their_exact_distance():
    pool = torch.tensor(random(15).uniform(-1, 1, size=(300, 1, 28, 28)), dtype=torch.float32)
    images = pool[:20].clone()
    # a matmul in float32 loses this: 1e-3 of the distance is under its rounding
    images[:, 0, 3, 3] += 2**-12
    distances, indices = sample_metrics.nearest(images, pool)
    assert indices == list(range(20))
    expected = (images - pool[:20]).flatten(1).double().norm(dim=1)
    assert distances == pytest.approx(expected.tolist(), rel=1e-9)


def test_byte_images_are_compared_in_their_own_units():
    images = torch.tensor([[[0, 255]]], dtype=torch.uint8)
    pool = torch.tensor([[[255, 255]], [[3, 251]]], dtype=torch.uint8)
    assert sample_metrics.nearest(images, pool) == ([5.0], [1])


def test_split_rhat_equals_its_formula_written_out():
    series = np.array([[1.0, 2.0, 4.0, 3.0, 7.0], [2.0, 2.5, 9.0, 1.0, 0.0]])
    halves = [[1.0, 2.0], [3.0, 7.0], [2.0, 2.5], [1.0, 0.0]]  # the middle draw left out
    means = [np.mean(half) for half in halves]
    within = np.mean([sum((x - np.mean(half)) ** 2 for x in half) / 1 for half in halves])
    between = 2 * sum((mean - np.mean(means)) ** 2 for mean in means) / 3
    expected = math.sqrt((within / 2 + between / 2) / within)
    assert sample_metrics.split_rhat(series) == pytest.approx(expected, rel=1e-12)


def test_split_rhat_is_near_one_for_independent_draws():
    chains, draws = 8, 1000
    rhat = sample_metrics.split_rhat(random(16).normal(size=(chains, draws)))
    # rhat^2 - 1 = (B / W - 1) / n, with halves of n draws and B / W about chi2 / df at
    # df = 2 * chains - 1
    assert abs(rhat**2 - 1) < SIGMAS * math.sqrt(2 / (2 * chains - 1)) / (draws / 2)


def test_split_rhat_sees_chains_that_differ_and_chains_that_drift():
    draws = random(17).normal(size=(4, 500))
    assert sample_metrics.split_rhat(draws + 2 * np.arange(4)[:, None]) > 1.5
    assert sample_metrics.split_rhat(draws + np.linspace(0, 6, 500)) > 1.5
    assert sample_metrics.split_rhat(torch.tensor(draws[:1] + np.linspace(0, 6, 500))) > 1.5


@pytest.mark.parametrize("phi", [0.0, 0.8, -0.5])
def test_the_autocorrelation_of_an_autoregressive_chain_is_a_power(phi):
    chains, draws, lags = 40, 2000, 10
    noise = random(18).normal(size=(chains, draws + 200))
    series = scipy.signal.lfilter([1], [1, -phi], noise, axis=1)[:, 200:]
    series = series + np.arange(chains)[:, None]
    expected = phi ** np.arange(lags + 1)
    # Bartlett 1946: deviation below sqrt((1 + phi^2) / (1 - phi^2) / n); bias of order
    # (lag + correlation time) / draws
    error = SIGMAS * math.sqrt((1 + phi**2) / (1 - phi**2) / (chains * draws))
    bias = (lags + (1 + phi) / (1 - phi)) / draws
    found = sample_metrics.autocorrelation(series, lags)
    np.testing.assert_allclose(found, expected, atol=error + bias, rtol=0)


def test_the_autocorrelation_equals_numpy_correlate():
    series = random(19).normal(size=(3, 12)).cumsum(1)
    rows = []
    for chain in series - series.mean(1, keepdims=True):
        full = np.correlate(chain, chain, "full")[11:]
        rows.append(full / full[0])
    found = sample_metrics.autocorrelation(torch.tensor(series), 11)
    assert found[0] == 1
    np.testing.assert_allclose(found, np.mean(rows, 0), rtol=0, atol=1e-12)


LOGITS, LABELS, PAIR = torch.eye(3), [0, 1, 1], np.eye(4)
CALLS = {  # a usable call of each, and what it names if the first array is not finite
    "classification": ([LOGITS, LABELS], "logits"),
    "calibration": ([LOGITS, LABELS], "logits"),
    "fit_temperature": ([LOGITS, LABELS], "logits"),
    "detection": ([[1.0, 2.0], [3.0], "grad_norm"], "grad_norm in distribution"),
    "frechet_distance": ([PAIR, PAIR], "features"),
    "precision_recall": ([PAIR, PAIR + 1], "features"),
    "nearest": ([PAIR, PAIR], "images"),
    "split_rhat": ([PAIR], "series"),
    "autocorrelation": ([PAIR, 2], "series"),
}


def called(name):
    return getattr(metrics, name, None) or getattr(sample_metrics, name)


@pytest.mark.parametrize("function", CALLS)
def test_json_can_write_every_result(function):
    arguments, _ = CALLS[function]
    result = called(function)(*arguments)
    again = json.loads(json.dumps(result, allow_nan=False))
    assert again == (list(result) if isinstance(result, tuple) else result)


@pytest.mark.parametrize("function", CALLS)
def test_tensors_that_require_gradients_and_single_precision_give_the_same_result(function):
    arguments, _ = CALLS[function]
    (first, *others), call = arguments, called(function)
    result = call(torch.as_tensor(first, dtype=torch.float64), *others)
    single = torch.as_tensor(first, dtype=torch.float32).requires_grad_()
    with torch.no_grad():
        assert call(single, *others) == result
    assert call(single, *others) == result and single.grad is None


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_name(function, value):
    arguments, name = CALLS[function]
    spoilt = torch.as_tensor(arguments[0]).clone()
    spoilt.view(-1)[1] = value
    with pytest.raises(FloatingPointError, match=f"{name}.*not finite"):
        called(function)(spoilt, *arguments[1:])


def test_what_is_not_finite_is_refused_in_the_other_arguments_too():
    with pytest.raises(FloatingPointError, match=r"grad_norm out of distribution.*not finite"):
        metrics.detection([1.0], [math.nan], "grad_norm")
    with pytest.raises(FloatingPointError, match=r"pool.*not finite"):
        sample_metrics.nearest(PAIR, np.full((4, 4), math.inf))
    with pytest.raises(FloatingPointError, match=r"array 1 of the bootstrap.*not finite"):
        metrics.bootstrap(lambda a, b: 0.0, [1.0], [math.nan])


@pytest.mark.parametrize(
    "function, arguments, message",
    [
        (metrics.classification, (LOGITS, [0, 1]), "logits must be"),
        (metrics.classification, (LOGITS, [0, 1, 3]), "0..2"),
        (metrics.classification, (LOGITS, [0, 1, -1]), "0..2"),
        (metrics.classification, (LOGITS, [0.0, 1.0, 1.0]), "integers"),
        (metrics.classification, (torch.zeros(3, 1), [0, 0, 0]), "2 or more classes"),
        (metrics.classification, (torch.zeros(3), [0, 0, 0]), "logits.*2 dimensions"),
        (metrics.calibration, (LOGITS, LABELS, 0), "n_bins"),
        (metrics.detection, ([], [1.0], "energy"), "energy in distribution.*empty"),
        (metrics.bootstrap, (np.mean,), "resamples"),
        (sample_metrics.frechet_distance, (PAIR, PAIR[:1]), "2 or more rows"),
        (sample_metrics.frechet_distance, (PAIR, PAIR[:, :2]), "one width"),
        (sample_metrics.precision_recall, (PAIR, PAIR[:3]), "4 or more rows"),
        (sample_metrics.precision_recall, (PAIR, PAIR, 0), "k must be"),
        (sample_metrics.class_histogram, ([0, 4], 4), "0..3"),
        (sample_metrics.class_histogram, ([0], 1), "2 or more classes"),
        (sample_metrics.nearest, (PAIR, PAIR[:, :2]), "one shape"),
        (sample_metrics.split_rhat, (PAIR[:, :3],), "4 or more"),
        (sample_metrics.split_rhat, (np.ones((2, 8)),), "moves"),
        (sample_metrics.autocorrelation, (PAIR, 4), "max_lag"),
        (sample_metrics.autocorrelation, (np.ones((2, 8)) * 0.1, 2), "move"),
    ],
)
def test_arguments_that_mean_nothing_are_refused_by_name(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)
