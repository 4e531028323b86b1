"""Section: accuracy, likelihood and calibration of each model on the test set."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sgld_nrg.models import predict
from sgld_nrg.support import metrics, plots
from sgld_nrg.support.report.study import Study
from sgld_nrg.support.report.words import interval, percent, table

SCORES = ("accuracy", "nll", "brier")
CALIBRATION = ("ece", "adaptive_ece", "mce")


def measure(study: Study) -> dict[str, Any]:
    """Return {model: {...}}, with bootstrap 95 % intervals; draws reliability and confusion.

    The temperature is fitted on the validation split.
    """
    found, bins, (val, test) = {}, study.sizes["bins"], study.dataset[-2:]
    for name, model in study.models.items():
        logits, labels = predict(model, test.images).cpu(), test.labels
        temperature = metrics.fit_temperature(predict(model, val.images).cpu(), val.labels)

        probabilities = logits.double().softmax(1)
        sure, said = probabilities.max(1)
        one_hot = torch.nn.functional.one_hot(labels, logits.shape[1])
        each = torch.stack(  # of each image: right or not, -log p_y, Brier score, confidence
            [
                (said == labels).double(),
                torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none"),
                (probabilities - one_hot).square().sum(1),
                sure,
            ],
            dim=1,
        )

        def scores(rows: np.ndarray) -> list[float]:
            means = rows[:, :3].mean(0)
            return [*means, *metrics.calibration_errors(rows[:, 3], rows[:, 0], bins)]

        intervals = metrics.bootstrap(scores, each, resamples=study.sizes["resamples"])
        found[name] = {
            **metrics.classification(logits, labels),
            "calibration": metrics.calibration(logits, labels, bins),
            "temperature": temperature,
            "calibration_after_temperature": metrics.calibration(
                logits / temperature, labels, bins
            ),
            "intervals": dict(zip((*SCORES, *CALIBRATION), intervals, strict=True)),
        }
    plots.save_reliability(found, study.folder / "reliability.png")
    path, classes = study.folder / "confusion.png", study.dataset.classes
    plots.save_confusion(found["jem"]["confusion"], classes, path)
    return found


def words(found: dict[str, Any], sizes: dict[str, Any]) -> str:
    """Return the section of report.md."""
    bins = sizes["bins"]

    def share(row: dict, score: str) -> str:
        value = row["calibration"][score] if score in CALIBRATION else row[score]
        return f"{percent(value)} {interval(row['intervals'][score], 100, 2)}"

    def number(row: dict, score: str) -> str:
        return f"{row[score]:.4f} {interval(row['intervals'][score], digits=4)}"

    def scaled(row: dict, score: str) -> str:
        return percent(row["calibration_after_temperature"][score])

    lines = (
        ("accuracy", share, "accuracy"),
        ("negative log-likelihood [nat]", number, "nll"),
        ("Brier score (0 to 2)", number, "brier"),
        (f"ECE, {bins} equal-width bins", share, "ece"),
        (f"adaptive ECE, {bins} equal-mass bins", share, "adaptive_ece"),
        ("maximum calibration error", share, "mce"),
        (
            "temperature, fitted on the validation split",
            lambda row, score: f"{row[score]:.3f}",
            "temperature",
        ),
        ("ECE after temperature scaling", scaled, "ece"),
        ("adaptive ECE after it", scaled, "adaptive_ece"),
    )
    rows = [[name, *(cell(row, score) for row in found.values())] for name, cell, score in lines]
    return (
        f"## Classification and calibration\n\n{table(['', *found], rows)}\n\n"
        "![Reliability diagrams](reliability.png)\n\n![Confusion matrix of the JEM](confusion.png)"
    )
