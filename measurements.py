"""The measurements of evaluate.py, a function for each section of the report; scores come from metrics.py.

Every function takes networks and data, writes its figures into a folder and returns a dict of plain numbers.
`models` is {"jem": network, "classifier": network}, the second only where there is one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

import cli
import data
import metrics
import plots
import runs
import train_classifier
from attacks import distal, pgd, refined
from cli import UserError
from models import energy, predict
from sgld import energy_and_gradient, restart_from_state, run_chains

SCORES = ("energy", "max_prob", "grad_norm")
FEATURE_SEED = 1_000_003  # of the independent classifier: no training here uses it
PRECISION = "float32"  # of every measurement
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
        hits = (logits.argmax(1) == labels).double().numpy()
        nll = cross_entropy(logits.double(), labels, reduction="none").numpy()

        def ece(rows, scaled=logits, truth=labels):
            return metrics.calibration(scaled[rows], truth[rows], sizes["bins"])["ece"]

        found[name] = {
            **metrics.classification(logits, labels),
            "calibration": before,
            "temperature": temperature,
            "calibration_after_temperature": after,
            "intervals": {
                "accuracy": metrics.bootstrap(np.mean, hits, resamples=sizes["resamples"]),
                "nll": metrics.bootstrap(np.mean, nll, resamples=sizes["resamples"]),
                "ece": metrics.bootstrap(ece, np.arange(len(labels)), resamples=sizes["resamples"]),
            },
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


def out_of_distribution(models, dataset, args, sizes, folder, device):
    """Measure how each score of each model tells the test set from other data; draws histograms and ROC curves.

    Returns {"sets": what each set is, "skipped": lines, "results": {model: {set: {score: detection}}}}.
    """
    sets, described, skipped = {}, {}, []
    for name in args.ood or [*data.GENERATED, *data.TORCHVISION]:
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
    results, scored = {}, {}
    for model_name, model in models.items():
        inside = ood_scores(model, dataset.test.images.to(device))
        scored[model_name] = {"test set": inside, **{label: ood_scores(model, images) for label, images in sets.items()}}
        results[model_name] = {
            label: {
                score: {
                    **metrics.detection(inside[score], outside[score], f"{model_name} {score} on {label}"),
                    "auroc_interval": metrics.bootstrap(
                        metrics.fast_auroc, inside[score], outside[score], resamples=sizes["resamples"], paired=False
                    ),
                }
                for score in SCORES
            }
            for label, outside in list(scored[model_name].items())[1:]
        }
    for model_name, by_set in scored.items():
        plots.save_score_histograms(by_set, folder / f"ood-histograms-{model_name}.png")
    plots.save_roc_curves(scored, folder / "ood-roc.png")
    return {"sets": described, "skipped": skipped, "results": results}


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


def feature_network(dataset, folder, device):
    """Return the independent classifier whose features judge the samples; trained into the folder where it is missing.

    A small-cnn of its own seed, deep enough that its last map has one pixel; the features are its head's input (N, D).
    """
    place = folder / f"feature-classifier-{dataset.name}"
    path = place / "classifier.pt"
    checkpoint = runs.load_checkpoint(path, "classifier") if path.exists() else None
    if checkpoint is None or not checkpoint["finished"]:
        place.mkdir(exist_ok=True)
        epochs = 2 if len(dataset.train.labels) > 10_000 else 15
        flags = ["--dataset", dataset.name, "--width", "16", "--depth", str(dataset.shape[1].bit_length() - 1)]
        flags += ["--epochs", str(epochs), "--seed", str(FEATURE_SEED)]
        args = cli.parse(train_classifier.build_parser(), flags)
        checkpoint = train_classifier.train(args, dataset, place, device, checkpoint)
    return runs.load_model(checkpoint, device)


def fresh_chains(checkpoint, model, count, steps, generator, callback=None):
    """Draw chains from the restart distribution and run them: (count, C, H, W) float, pixels in [-1, 1]."""
    restart = restart_from_state(checkpoint["restart"], generator.device)
    labels = torch.randint(restart.num_classes, (count,), generator=generator, device=generator.device)
    return run_chains(
        runs.chain_energy(model, generator.device, PRECISION),
        restart.draw(labels, generator), steps, **runs.chain_settings(checkpoint),
        module=model, chunk_size=500, generator=generator, callback=callback,
    )  # fmt: skip


def samples(checkpoint, model, dataset, args, sizes, folder, device):
    """Judge the buffer's and fresh chains by the features of an independent classifier; draws nearest training images.

    Returns the Frechet distance to the test set with its floor (as many training images) and their ratio, precision and
    recall, class histogram, and the distances to the nearest training image, of both and of the test set.
    """
    network = feature_network(dataset, folder, device)
    generator = torch.Generator(device).manual_seed(args.seed)
    count = min(sizes["samples"], len(dataset.test.labels), len(dataset.train.labels), len(checkpoint["buffer"]["labels"]))
    steps = runs.fresh_steps(checkpoint)
    buffer = checkpoint["buffer"]["images"].to(device)
    chosen = torch.randperm(len(buffer), generator=generator, device=device)[:count]
    train = dataset.train.images[torch.randperm(len(dataset.train.images), generator=torch.Generator().manual_seed(args.seed))]
    kinds = {
        "training images": train[:count].to(device),
        "buffer": buffer[chosen],
        "fresh": fresh_chains(checkpoint, model, count, steps, generator),
    }
    test = dataset.test.images[:count]
    reference = predict(network.features, test)
    floor, found = None, {}
    few = min(count, 1000)
    for kind, images in kinds.items():
        features = predict(network.features, images)
        distance = metrics.frechet_distance(features, reference)
        floor = distance if floor is None else floor
        found[kind] = {
            "frechet_distance": distance,
            "ratio_to_floor": distance / floor,
            **metrics.precision_recall(reference, features),
            **metrics.class_histogram(network.head(features).argmax(1), dataset.num_classes),
        }
    everything = dataset.train.images.to(device)
    judged = {"buffer": kinds["buffer"], "fresh": kinds["fresh"], "test images": test.to(device)}
    nearest = {kind: [torch.tensor(column) for column in metrics.nearest(x[:few], everything)] for kind, x in judged.items()}
    for kind, (distances, _) in nearest.items():
        found.setdefault(kind, {})["distance_to_nearest_training_image"] = {
            "median": float(distances.median()), "smallest": float(distances.min()), "images": few,
        }  # fmt: skip
    dozen = torch.randperm(few, generator=torch.Generator().manual_seed(args.seed))[:12]
    pairs = torch.cat([kinds["fresh"][dozen].cpu(), dataset.train.images[nearest["fresh"][1][dozen]]])
    plots.save_grid(pairs, folder / "nearest.png", columns=12)
    plots.save_distances({kind: distances for kind, (distances, _) in nearest.items()}, folder / "nearest-distances.png")
    plots.save_grid(kinds["fresh"][:64], folder / "fresh.png")
    plots.save_grid(kinds["buffer"][:64], folder / "buffer.png")
    return {"images": count, "fresh_steps": steps, "feature_dimensions": reference.shape[1], "kinds": found}


def chains(checkpoint, model, args, sizes, folder, device):
    """Follow fresh chains: energy, displacement and saturation along the way; split R-hat and autocorrelation after half."""
    energies, displacements, saturated, last = [], [], [], None

    def follow(step, x, values):
        nonlocal last
        energies.append(values.cpu())
        saturated.append(float((x.abs() >= 1).float().mean()))
        displacements.append(0.0 if last is None else float((x - last).flatten(1).norm(dim=1).mean()))
        last = x

    generator = torch.Generator(device).manual_seed(args.seed + 2)
    fresh_chains(checkpoint, model, sizes["chains"], sizes["chain_steps"], generator, follow)
    series = torch.stack(energies, dim=1)
    settled = series[:, series.shape[1] // 2 :]
    correlation = metrics.autocorrelation(settled, min(100, settled.shape[1] // 2))
    found = {
        "chains": sizes["chains"], "steps": sizes["chain_steps"],
        "mean_energy": {str(step): float(series[:, step].mean()) for step in (0, series.shape[1] // 2, series.shape[1] - 1)},
        "split_rhat_of_energy": metrics.split_rhat(settled),
        "autocorrelation_of_energy": {str(lag): correlation[lag] for lag in (1, 10, 30, 100) if lag < len(correlation)},
        "mean_displacement_per_step": float(np.mean(displacements[1:])),
        "saturated_share_at_end": saturated[-1],
    }  # fmt: skip
    plots.save_chains(series, correlation, displacements, saturated, folder / "chains.png")
    return found


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
