"""Section: how each score of each model tells the test set from other data."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgld_nrg.models import energy_of, marginal_energy, predict
from sgld_nrg.sgld import energy_and_gradient
from sgld_nrg.support import metrics, ood, plots
from sgld_nrg.support.data import TORCHVISION, Dataset
from sgld_nrg.support.detector import Detector
from sgld_nrg.support.errors import UserError
from sgld_nrg.support.images import reading_from
from sgld_nrg.support.report.study import PRECISION, Study
from sgld_nrg.support.report.words import interval, table

SCORES = ("detector", "energy", "typicality", "max_prob", "grad_norm")
INSIDE = "test set"


def ood_sets(
    dataset: Dataset, args: Namespace, limit: int, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """Load the sets that --ood names, or all that are there but the data set itself.

    Returns {label: images (n, C, H, W) on the device}, {label: what the set is}, and why those that
    are missing were skipped. Raises UserError if a named set cannot be had.
    """
    sets, described, skipped = {}, {}, []
    known = [*ood.GENERATED, *TORCHVISION]
    names = args.ood or [name for name in known if name != dataset.name]
    places = [name if name in known else str(Path(name).resolve()) for name in names]
    for name, place in zip(names, places, strict=True):
        if places.count(place) > 1:
            raise UserError(f"--ood names {name!r} twice")
    reading = reading_from(args)
    stems = [Path(place).stem for place in places]
    for name, stem, place in zip(names, stems, places, strict=True):
        generator = torch.Generator().manual_seed(args.seed)
        try:
            images, done = ood.load_ood(
                name, dataset.test.images, args.data_dir, limit, generator, args.download, reading
            )
        except UserError as error:
            if args.ood:
                raise
            skipped.append(str(error))
            continue
        # of two files of one name, the paths
        label = name if stems.count(stem) > 1 else place if stem == INSIDE else stem
        sets[label], described[label] = images.to(device), f"{len(images)} images, {done}"
        if name not in known:
            print(f"--ood {name}: {described[label]}", flush=True)
    return sets, described, skipped


def ood_scores(detector: Detector, images: Tensor, median: float) -> dict[str, np.ndarray]:
    """Return the OOD scores of images (N, C, H, W): {score: (N,) float64}, high = out.

    detector: its own score, and the network behind the others. energy: E(x). typicality:
    |E(x) - median|, median: of training images' energies. max_prob: minus the largest softmax
    probability. grad_norm: the L2 norm of dE/dx, the paper's approximate mass (arXiv 1912.03263,
    section 5.3) with the sign turned.
    """
    model = detector.model
    logits = predict(model, images).double()
    energy = energy_of(model, PRECISION)
    gradient = torch.cat([energy_and_gradient(energy, part)[1] for part in images.split(500)])
    energies = marginal_energy(logits).cpu().numpy()
    return {
        "detector": detector.scores(images).numpy(),
        "energy": energies,
        "typicality": np.abs(energies - median),
        "max_prob": -logits.softmax(1).amax(1).cpu().numpy(),
        "grad_norm": gradient.flatten(1).double().norm(dim=1).cpu().numpy(),
    }


def measure(study: Study) -> dict[str, Any]:
    """Return {"sets", "skipped", "results": {model: {set: {score: {...}}}}}; draws the scores."""
    sets, described, skipped = study.ood
    results, scored = {}, {}
    test = study.dataset.test.images[: study.sizes["ood"]].to(study.device)
    train = study.dataset.train.images[: study.sizes["ood"]]
    for model_name, model in study.models.items():
        median = marginal_energy(predict(model, train)).median().item()
        detector = study.detector(model_name)
        inside = ood_scores(detector, test, median)
        outside = {label: ood_scores(detector, images, median) for label, images in sets.items()}
        scored[model_name] = {INSIDE: inside, **outside}
        results[model_name] = {
            label: {
                score: {
                    **metrics.detection(
                        inside[score], scores[score], f"{model_name} {score} on {label}"
                    ),
                    "intervals": metrics.detection_intervals(
                        inside[score], scores[score], study.sizes["resamples"]
                    ),
                }
                for score in SCORES
            }
            for label, scores in outside.items()
        }
    plots.save_score_histograms(scored, study.folder / "ood-histograms.png")
    plots.save_roc_curves(scored, study.folder / "ood-roc.png")
    return {"sets": described, "skipped": skipped, "results": results}


def words(found: dict[str, Any], sizes: dict[str, Any]) -> str:
    """Return the section of report.md."""

    def cell(row: dict) -> str:
        auroc = f"{row['auroc']:.3f} {interval(row['intervals']['auroc'])}"
        return f"{auroc} / {row['average_precision']:.3f} / {row['fpr95']:.3f}"

    models = found["results"]
    tables = []
    for score in SCORES:
        rows = [
            [name, *(cell(results[name][score]) for results in models.values())]
            for name in found["sets"]
        ]
        tables.append(f"### {score}\n\n{table(['set', *models], rows)}")
    lines = [f"- {name}: {what}" for name, what in found["sets"].items()]
    lines += [f"- skipped: {line}" for line in found["skipped"]]
    return "\n\n".join(
        [
            "## Out-of-distribution detection",
            "AUROC / average precision / FPR at 95 % TPR. The positive class is the data out of "
            "distribution, the negative class the test set; a high score means out of it. "
            "detector is support/detector.py's, fitted to each model alike; energy is E(x), "
            "typicality its distance from the training images' median, max_prob minus the largest "
            "softmax probability, grad_norm ‖∂E/∂x‖.",
            *tables,
            "![Histograms of the scores](ood-histograms.png)",
            "![ROC curves](ood-roc.png)",
            "\n".join(lines),
        ]
    )
