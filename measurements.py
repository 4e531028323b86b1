"""What evaluate.py measures of the classifier in a JEM: classification, out-of-distribution detection, robustness.

A function for each section of the report; scores come from metrics.py, the chains are measured in chain_quality.py.
Every function takes networks and data, writes its figures into a folder and returns a dict of plain numbers.
`models` is {"jem": network, "classifier": network}, the second only where there is one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import data
import metrics
import plots
import runs
from attacks import distal, pgd, refined
from cli import UserError
from models import energy, predict
from sgld import energy_and_gradient

CLASS_SCORES, CALIBRATION_SCORES = ("accuracy", "nll", "brier"), ("ece", "adaptive_ece", "mce")
SCORES = ("energy", "max_prob", "grad_norm")
DETECTION_SCORES = ("auroc", "average_precision", "fpr95")
PRECISION = "float32"  # of every measurement in this file
ATTACK_BATCH = 100  # images attacked at once


def classification(models, dataset, sizes):
    """Measure accuracy, likelihood and calibration of each model on the test set.

    The temperature is fitted on the validation split. Returns {model: {...}}, with bootstrap 95 % intervals.
    """
    found = {}
    for name, model in models.items():
        logits, labels = predict(model, dataset.test.images).cpu(), dataset.test.labels
        temperature = metrics.fit_temperature(predict(model, dataset.val.images).cpu(), dataset.val.labels)
        before = metrics.calibration(logits, labels, sizes["bins"])
        after = metrics.calibration(logits / temperature, labels, sizes["bins"])

        def scores(rows, scaled=logits, truth=labels):
            part = metrics.classification(scaled[rows], truth[rows])
            errors = metrics.calibration(scaled[rows], truth[rows], sizes["bins"])
            return np.array([*(part[score] for score in CLASS_SCORES), *(errors[score] for score in CALIBRATION_SCORES)])

        intervals = metrics.bootstrap(scores, np.arange(len(labels)), resamples=sizes["resamples"])
        found[name] = {
            **metrics.classification(logits, labels),
            "calibration": before,
            "temperature": temperature,
            "calibration_after_temperature": after,
            "intervals": dict(zip((*CLASS_SCORES, *CALIBRATION_SCORES), intervals, strict=True)),
        }
    return found


def ood_scores(model, images):
    """Return the out-of-distribution scores of images (N, C, H, W): {score: (N,) float64 array}, high = out.

    energy: E(x). max_prob: minus the largest softmax probability. grad_norm: the L2 norm of dE/dx, the paper's
    approximate mass (arXiv 1912.03263, section 5.3) with the sign turned so that high means out.
    """
    logits = predict(model, images).double()
    _, gradient = energy_and_gradient(runs.chain_energy(model, images.device, PRECISION), images, chunk_size=500)
    return {
        "energy": energy(logits).cpu().numpy(),
        "max_prob": -logits.softmax(1).amax(1).cpu().numpy(),
        "grad_norm": gradient.flatten(1).double().norm(dim=1).cpu().numpy(),
    }


def ood_sets(dataset, args, sizes, device):
    """Load the out-of-distribution sets that --ood names, or all that are there but the data set itself.

    Returns ({label: images (n, C, H, W) on the device}, {label: what the set is}, why those that are missing were skipped).
    Raises UserError where a named set cannot be had.
    """
    sets, described, skipped = {}, {}, []
    for name in args.ood or [name for name in [*data.GENERATED, *data.TORCHVISION] if name != dataset.name]:
        generator = torch.Generator().manual_seed(args.seed)
        try:
            images, words = data.load_ood(name, dataset.test.images, args.data_dir, sizes["ood"], generator, args.download)
        except UserError as error:
            if args.ood:
                raise
            skipped.append(str(error))
            continue
        label = name if name in data.GENERATED or name in data.TORCHVISION else Path(name).stem
        sets[label], described[label] = images.to(device), f"{len(images)} images, {words}"
    return sets, described, skipped


def out_of_distribution(models, dataset, ood, sizes, folder, device):
    """Measure how each score of each model tells the test set from other data; draws histograms and ROC curves.

    ood: what `ood_sets` returned.
    Returns {"sets": what each set is, "skipped": lines, "results": {model: {set: {score: detection}}}}.
    """
    sets, described, skipped = ood
    results, scored = {}, {}
    for model_name, model in models.items():
        inside = ood_scores(model, dataset.test.images.to(device))
        scored[model_name] = {"test set": inside, **{label: ood_scores(model, images) for label, images in sets.items()}}
        results[model_name] = {
            label: {
                score: detect(inside[score], outside[score], f"{model_name} {score} on {label}", sizes["resamples"])
                for score in SCORES
            }
            for label, outside in list(scored[model_name].items())[1:]
        }
    for model_name, by_set in scored.items():
        plots.save_score_histograms(by_set, folder / f"ood-histograms-{model_name}.png")
    plots.save_roc_curves(scored, folder / "ood-roc.png")
    return {"sets": described, "skipped": skipped, "results": results}


def detect(inside, outside, name, resamples):
    """Return metrics.detection with a bootstrap 95 % interval for each of its scores."""
    found = metrics.detection(inside, outside, name)
    intervals = metrics.bootstrap(metrics.fast_detection, inside, outside, resamples=resamples, paired=False)
    return {**found, "intervals": dict(zip(DETECTION_SCORES, intervals, strict=True))}


def robustness(models, checkpoint, dataset, args, sizes, folder, device):
    """Attack each model, and the JEM behind Langevin refinement, in each norm; check the attack, draw the curves.

    Returns {"curves": {norm: {model: [{epsilon, accuracy, interval, images, ...}, ...]}}, "checks": {norm: {...}}}.
    """
    images, labels = (tensor[: sizes["attacked"]].to(device) for tensor in dataset.test)
    few = slice(0, sizes["refined"])
    jem, curves, checks = models["jem"], {}, {}
    plain = {"seed": args.seed, "steps": sizes["attack_steps"], "restarts": sizes["restarts"]}
    adaptive = {"seed": args.seed, "steps": sizes["refined_attack_steps"], "samples": sizes["refined_draws"]}
    for norm in [norm for norm in args.attacks if norm != "none"]:
        curves[norm] = {
            name: [attack(model, model, images, labels, norm, epsilon, **plain) for epsilon in (0.0, *sizes["epsilons"][norm])]
            for name, model in models.items()
        }
        behind = refined(
            runs.chain_energy(jem, device, PRECISION), jem, steps=sizes["refined_steps"],
            generator=torch.Generator(device).manual_seed(args.seed + 1), **runs.chain_settings(checkpoint),
        )  # fmt: skip
        curves[norm][f"jem-{sizes['refined_steps']}"] = [
            attack(behind, jem, images[few], labels[few], norm, epsilon, transferred_from=jem, **adaptive)
            for epsilon in (0.0, *sizes["refined_epsilons"][norm])
        ]
        checks[norm] = check_attack(jem, images, labels, norm, curves[norm]["jem"], sizes, args.seed)
    if curves:
        plots.save_robustness(curves, folder / "robustness.png")
    return {"curves": curves, "checks": checks}


def attack(logits_of, module, images, labels, norm, epsilon, *, seed, steps, restarts=1, samples=1, transferred_from=None):
    """Return one point of an accuracy-against-epsilon curve with its interval.

    logits_of, module, norm, epsilon, steps, restarts, samples: as in attacks.pgd; epsilon 0 measures without attack.
    transferred_from: a classifier whose adversarial images (same settings, one draw) must be survived as well; the
    accuracy is then that under the worse of the two.
    """
    generator = torch.Generator(images.device).manual_seed(seed)
    if epsilon == 0:
        steps = restarts = 1  # the ball is the image itself
    correct, losses = [], []
    for x, y in zip(images.split(ATTACK_BATCH), labels.split(ATTACK_BATCH), strict=True):
        settings = {"steps": steps, "restarts": restarts, "generator": generator, "module": module}
        found = pgd(logits_of, x, y, norm, epsilon, samples=samples, **settings)
        survived = found.correct
        if transferred_from is not None:
            elsewhere = pgd(transferred_from, x, y, norm, epsilon, **settings).images
            with torch.no_grad():
                mean = torch.stack([logits_of(elsewhere).softmax(1) for _ in range(samples)]).mean(0)
            survived = survived & (mean.argmax(1) == y)
        correct.append(survived)
        losses.append(found.losses * len(x))
    correct = torch.cat(correct).double().cpu().numpy()
    return {
        "epsilon": epsilon,
        "accuracy": float(correct.mean()),
        "interval": metrics.bootstrap(np.mean, correct),
        "images": len(correct),
        "steps": steps,
        "restarts": restarts,
        "draws": samples,
        "losses": [round(float(loss), 4) for loss in torch.stack(losses).sum(0) / len(correct)],
    }


def check_attack(model, images, labels, norm, curve, sizes, seed):
    """Tell whether an attack works, so that a broken one is not mistaken for robustness.

    It works where accuracy is below 5 % at the largest epsilon, where more steps never help the defender by more than
    one image in a hundred, and where the loss rises along the attack.
    """
    epsilons = sizes["epsilons"][norm]
    epsilon = epsilons[(len(epsilons) - 1) // 2]
    some = slice(0, 200)
    rows = [
        attack(model, model, images[some], labels[some], norm, epsilon, seed=seed, steps=steps)
        for steps in (sizes["attack_steps"] // 4 or 1, sizes["attack_steps"], 2 * sizes["attack_steps"])
    ]
    return {
        "accuracy_at_largest_epsilon": curve[-1]["accuracy"],
        "falls_to_zero": curve[-1]["accuracy"] < 0.05,
        "epsilon": epsilon,
        "accuracy_by_steps": {str(row["steps"]): row["accuracy"] for row in rows},
        "more_steps_never_help": bool(np.all(np.diff([row["accuracy"] for row in rows]) <= 0.01)),
        "share_of_steps_on_which_the_loss_rises": float((np.diff(rows[-1]["losses"]) >= -1e-3).mean()),
    }


def distal_adversarials(models, args, folder, device, shape):
    """Climb each class's confidence from one noise image; draws what comes out, a row for each model."""
    count = next(iter(models.values())).head.out_features
    noise = torch.rand((1, *shape), generator=torch.Generator().manual_seed(args.seed)).to(device) * 2 - 1
    found, pictures = {}, []
    for name, model in models.items():
        images, confidences = distal(
            model, noise.expand(count, *shape).clone(), torch.arange(count, device=device), steps=100, step_size=0.1
        )
        pictures.append(images.cpu())
        found[name] = [round(float(value), 4) for value in confidences[-1]]
    plots.save_grid(torch.cat(pictures), folder / "distal.png", columns=count)
    return found
