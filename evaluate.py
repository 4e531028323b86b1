"""Report what a joint energy-based model promises, measured, with the plain classifier it started from beside it.

    python evaluate.py --checkpoint results/digits/jem.pt --quick

writes report.json, report.md and its figures: classification, calibration, out-of-distribution detection, adversarial
robustness, samples and chains.
"""

from __future__ import annotations

import os

import cli


def build_parser():
    """Return the parser of this script's command line."""
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("data")
    cli.add_data_dir_flag(group)
    group.add_argument(
        "--ood", nargs="+", metavar="NAME_OR_PATH",
        help="out-of-distribution sets: names of data.py, .npz or .npy files of images, folders of image files; without it "
        "all that are made from the test images and all of torchvision's that lie under --data-dir",
    )  # fmt: skip
    group.add_argument(
        "--download", action="store_true", help="download torchvision's out-of-distribution sets that are missing"
    )
    group = parser.add_argument_group("model")
    group.add_argument(
        "--checkpoint", metavar="FILE", default="results/digits/jem.pt", help="checkpoint that train_jem.py wrote"
    )
    group.add_argument(
        "--classifier",
        metavar="FILE",
        help="plain classifier to stand beside it; without it classifier.pt beside the checkpoint",
    )
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--attacks", nargs="+", choices=("linf", "l2", "none"), default=["linf", "l2"], help="norms of the attacks"
    )
    group.add_argument("--bins", type=cli.positive_int, default=15, help="equal-width bins of the calibration errors")
    group.add_argument("--quick", action="store_true", help="smaller samples and fewer attacks: an answer within a minute")
    cli.add_run_flags(parser)
    return parser


def parse_args(argv=None):
    """Parse a command line; contradictory flags end the program with one sentence and exit code 2."""
    parser = build_parser()
    args = cli.parse(parser, argv)
    if "none" in args.attacks and len(args.attacks) > 1:
        parser.error("--attacks none cannot stand beside a norm")
    if args.out_dir is None:
        args.out_dir = os.path.dirname(args.checkpoint) or "."
    return args


if __name__ == "__main__":
    parse_args()  # --help and mistyped flags answer here, before torch is loaded

import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import metrics
import plots
import report
import runs
import train_classifier
from attacks import distal, pgd, refined
from cli import UserError
from models import energy, predict
from sgld import energy_and_gradient, restart_from_state, run_chains

SCORES = ("energy", "max_prob", "grad_norm")
FEATURE_SEED = 1_000_003  # of the independent classifier: no training here uses it
EPSILONS = {"linf": (0.02, 0.05, 0.1, 0.2, 0.3, 0.5), "l2": (0.25, 0.5, 1.0, 1.5, 3.0, 10.0)}  # pixels on [0, 1]
# Sizes: images of each kind, and the steps, restarts and random draws of the attacks.
FULL = {
    "ood": 10_000, "attacked": 1000, "attack_steps": 40, "restarts": 2, "epsilons": EPSILONS,
    "refined": 100, "refined_steps": 10, "refined_attack_steps": 20, "refined_draws": 4,
    "refined_epsilons": {"linf": (0.05, 0.1, 0.2), "l2": (0.5, 1.5, 3.0)},
    "samples": 10_000, "feature_epochs": 3, "chains": 64, "chain_steps": 300, "resamples": 200,
}  # fmt: skip
QUICK = {
    "ood": 1000, "attacked": 100, "attack_steps": 10, "restarts": 1,
    "epsilons": {"linf": (0.05, 0.1, 0.5), "l2": (0.5, 1.5, 10.0)},
    "refined": 32, "refined_steps": 3, "refined_attack_steps": 5, "refined_draws": 2,
    "refined_epsilons": {"linf": (0.1,), "l2": (1.5,)},
    "samples": 1000, "feature_epochs": 1, "chains": 32, "chain_steps": 60, "resamples": 100,
}  # fmt: skip
DRY_RUN = {
    **QUICK, "ood": 50, "attacked": 8, "attack_steps": 2, "refined": 4, "refined_attack_steps": 1,
    "samples": 100, "chains": 4, "chain_steps": 8, "resamples": 5,
}  # fmt: skip


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
        nll = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none").numpy()

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
                "ece": metrics.bootstrap(ece, np.arange(len(labels)), resamples=sizes["resamples"] // 4),
            },
        }
    return found


def ood_scores(model, images):
    """Return the out-of-distribution scores of images (N, C, H, W): {score: (N,) float64 array}, high = out.

    energy: E(x). max_prob: minus the largest softmax probability. grad_norm: the L2 norm of dE/dx, the paper's
    approximate mass (arXiv 1912.03263, section 5.3) with the sign turned so that high means out.
    """
    logits = predict(model, images).double()
    _, gradient = energy_and_gradient(lambda x: energy(model(x)), images, chunk_size=500)
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
    """Attack each model, and the JEM behind Langevin refinement, in each norm; checks the attack, draws the curves.

    Returns {"curves": {norm: {model: [{epsilon, accuracy, interval, images}, ...]}}, "checks": {norm: {...}}}.
    """
    images, labels = dataset.test.images[: sizes["attacked"]].to(device), dataset.test.labels[: sizes["attacked"]].to(device)
    few = slice(0, sizes["refined"])
    settings = runs.chain_settings(checkpoint)
    curves, checks = {}, {}
    for norm in [norm for norm in args.attacks if norm != "none"]:
        curves[norm] = {}
        for name, model in models.items():
            curves[norm][name] = [
                attack_row(model, model, images, labels, norm, epsilon, args.seed, sizes["attack_steps"], sizes["restarts"])
                for epsilon in (0.0, *sizes["epsilons"][norm])
            ]
        model = models["jem"]
        noise = torch.Generator(device).manual_seed(args.seed + 1)
        behind = refined(
            lambda x, model=model: energy(model(x)), model, steps=sizes["refined_steps"], generator=noise, **settings
        )
        curves[norm][f"jem-{sizes['refined_steps']}"] = [
            attack_row(
                behind, model, images[few], labels[few], norm, epsilon, args.seed,
                sizes["refined_attack_steps"], 1, sizes["refined_draws"],
            )
            for epsilon in (0.0, *sizes["refined_epsilons"][norm])
        ]  # fmt: skip
        checks[norm] = check_attack(model, images, labels, norm, curves[norm], sizes, args.seed)
    if curves:
        plots.save_robustness(curves, folder / "robustness.png")
    return {"curves": curves, "checks": checks}


def attack_row(logits_of, module, images, labels, norm, epsilon, seed, steps, restarts, draws=1):
    """Return one point of an accuracy-against-epsilon curve with its interval."""
    generator = torch.Generator(images.device).manual_seed(seed)
    result = pgd(
        logits_of,
        images,
        labels,
        norm,
        epsilon,
        steps=steps,
        restarts=restarts,
        samples=draws,
        generator=generator,
        module=module,
    )
    correct = result.correct.double().cpu().numpy()
    return {
        "epsilon": epsilon, "accuracy": float(correct.mean()), "interval": metrics.bootstrap(np.mean, correct),
        "images": len(correct), "steps": steps, "restarts": restarts, "draws": draws,
        "losses": [round(float(loss), 4) for loss in result.losses],
    }  # fmt: skip


def check_attack(model, images, labels, norm, curve, sizes, seed):
    """Tell whether the attack works, so that a broken attack is not mistaken for robustness.

    It does where accuracy is below 5 % at the largest epsilon, where more steps never help the defender by more than
    one image in a hundred, and where the loss rises along the attack (at 19 of 20 steps, after smoothing by nothing).
    """
    middle = sizes["epsilons"][norm][len(sizes["epsilons"][norm]) // 2 - 1]
    some = slice(0, min(len(images), 200))
    by_steps = [
        attack_row(model, model, images[some], labels[some], norm, middle, seed, steps, 1)
        for steps in (5, sizes["attack_steps"], 2 * sizes["attack_steps"])
    ]
    accuracies = [row["accuracy"] for row in by_steps]
    losses = np.array(by_steps[-1]["losses"])
    return {
        "accuracy_at_largest_epsilon": curve["jem"][-1]["accuracy"],
        "falls_to_zero": curve["jem"][-1]["accuracy"] < 0.05,
        "accuracy_by_steps": {str(row["steps"]): row["accuracy"] for row in by_steps},
        "more_steps_never_help": bool(np.all(np.diff(accuracies) <= 0.01)),
        "share_of_steps_on_which_the_loss_rises": float((np.diff(losses) >= -1e-3).mean()),
        "epsilon": middle,
    }


def feature_network(dataset, folder, device):
    """Return the independent classifier whose features judge the samples; trained into the folder where it is missing.

    A small-cnn of its own seed, deep enough that its last map has one pixel; the features are its head's input (N, D).
    """
    path = folder / "feature-classifier" / "classifier.pt"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        epochs = 2 if len(dataset.train.labels) > 10_000 else 40
        flags = ["--dataset", dataset.name, "--width", "16", "--depth", str(dataset.shape[1].bit_length() - 1)]
        flags += ["--epochs", str(epochs), "--seed", str(FEATURE_SEED)]
        train_classifier.train(cli.parse(train_classifier.build_parser(), flags), dataset, path.parent, device)
    return runs.load_model(runs.load_checkpoint(path, "classifier"), device)


def fresh_chains(checkpoint, model, count, steps, generator, callback=None):
    """Draw chains from the restart distribution and run them: (count, C, H, W) float, pixels in [-1, 1]."""
    restart = restart_from_state(checkpoint["restart"], generator.device)
    labels = torch.randint(restart.num_classes, (count,), generator=generator, device=generator.device)
    return run_chains(
        lambda x: energy(model(x)), restart.draw(labels, generator), steps, **runs.chain_settings(checkpoint),
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
    nearest = {
        kind: metrics.nearest(images[:few], dataset.train.images.to(device))
        for kind, images in kinds.items()
        if kind != "training images"
    }
    nearest["test images"] = metrics.nearest(test[:few].to(device), dataset.train.images.to(device))
    for kind, (distances, _) in nearest.items():
        found.setdefault(kind, {})["distance_to_nearest_training_image"] = {
            "median": float(distances.median()), "smallest": float(distances.min()), "images": few,
        }  # fmt: skip
    dozen = torch.randperm(few, generator=torch.Generator().manual_seed(args.seed))[:12]
    pairs = torch.cat([kinds["fresh"][dozen].cpu(), dataset.train.images[nearest["fresh"][1][dozen].cpu()]])
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
            model, noise.expand(count, *shape).clone(), torch.arange(count, device=device), steps=100, step_size=0.02
        )
        pictures.append(images.cpu())
        found[name] = [round(float(value), 4) for value in confidences[-1]]
    plots.save_grid(torch.cat(pictures), folder / "distal.png", columns=count)
    return found


@cli.exits_cleanly
def main(argv=None):
    """Run the script with a list of arguments, or with the command line's."""
    args = parse_args(argv)
    device = runs.pick_device(args.device)
    checkpoint = runs.load_checkpoint(args.checkpoint, "jem", device)
    dataset = data.load(checkpoint["dataset"], args.data_dir)
    sizes = {**(DRY_RUN if args.dry_run else QUICK if args.quick else FULL), "bins": args.bins}
    models = {"jem": runs.load_model(checkpoint, device).eval()}
    path = args.classifier or Path(args.checkpoint).with_name("classifier.pt")
    if args.classifier or path.exists():
        models["classifier"] = runs.load_model(runs.load_checkpoint(path, "classifier", device), device).eval()
    jem = models["jem"]
    with runs.run_folder(args) as folder:
        sections = {
            "classification": lambda: classification(models, dataset, sizes),
            "out_of_distribution": lambda: out_of_distribution(models, dataset, args, sizes, folder, device),
            "robustness": lambda: robustness(models, checkpoint, dataset, args, sizes, folder, device),
            "distal_adversarials": lambda: distal_adversarials(models, args, folder, device, dataset.shape),
            "samples": lambda: samples(checkpoint, jem, dataset, args, sizes, folder, device),
            "chains": lambda: chains(checkpoint, jem, args, sizes, folder, device),
        }
        found = {"protocol": protocol(args, checkpoint, sizes, path if "classifier" in models else None, dataset)}
        bar = tqdm(sections.items(), disable=None)
        for name, measure in bar:
            bar.set_description(name)
            found[name] = measure()
        plots.save_reliability(found["classification"], folder / "reliability.png")
        plots.save_confusion(found["classification"]["jem"]["confusion"], folder / "confusion.png")
        (folder / "report.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
        (folder / "report.md").write_text(report.markdown(found))
        print(report.summary(found))
        runs.report_files(
            args, sorted(path for path in folder.iterdir() if path.name.startswith("report") or path.suffix == ".png")
        )


def protocol(args, checkpoint, sizes, classifier, dataset):
    """Return what a reader must know to repeat the measurement."""
    return {
        "command": "python evaluate.py "
        + " ".join(f"--{name.replace('_', '-')} {getattr(args, name)}" for name in sorted(args.given)),
        "data_set": dataset.name,
        "checkpoint": str(args.checkpoint),
        "classifier": classifier and str(classifier),
        "seed": args.seed,
        "sizes": sizes,
        "splits": {name: len(getattr(dataset, name).labels) for name in ("train", "val", "test")},
        "sgld": checkpoint["sgld"],
        "precision": "float32",
        "packages": runs.package_versions(),
        "git_commit": runs.git_commit(),
    }


if __name__ == "__main__":
    main()
