"""Section: whether the detector keeps its promise on the test set, and what disturbances do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgld_nrg.support import ood
from sgld_nrg.support.report.study import Study
from sgld_nrg.support.report.words import interval, percent, table

ALPHAS = (0.01, 0.05, 0.1)
DISTURBED = 0.05  # the alpha at which disturbed images are judged


def measure(study: Study) -> dict[str, Any]:
    """Return how often the JEM's detector errs on test images, with Clopper-Pearson intervals.

    At each alpha the share that is called unfamiliar (promised: alpha at most, over draws of the
    held-out images) and the share whose label set lacks the true class (likewise); and the share
    of disturbed test images that is called unfamiliar at DISTURBED.
    """
    images, labels = (part.cpu() for part in study.dataset.test)
    detector = study.detector("jem")
    verdicts = detector.verdicts(images)
    truth = labels[:, None]
    promises = {}
    for alpha in ALPHAS:
        sets = detector.label_sets(verdicts, alpha)
        promises[str(alpha)] = {
            "unfamiliar": share(verdicts.p_values <= alpha),
            "label_missed": share(~sets.gather(1, truth)[:, 0]),
            "mean_size_of_label_sets": float(sets.sum(1).double().mean()),
        }
    few = images[: study.sizes["ood"]]
    disturbed = {}
    for name, disturb in ood.DISTURBANCES.items():
        source = torch.Generator().manual_seed(study.args.seed)
        p_values = detector.p_values(disturb(few, source))
        disturbed[name] = share(p_values <= DISTURBED)
    return {
        "held_out_images": detector.familiar.count,
        "smallest_p_value": detector.smallest,
        "promises": promises,
        "disturbed": disturbed,
    }


def share(flags: Tensor) -> dict[str, Any]:
    """Return the share of flags (N,) bool that are set, with its exact 95 % interval."""
    from scipy.stats import binomtest

    count, total = int(flags.sum()), len(flags)
    low, high = binomtest(count, total).proportion_ci()
    return {"share": count / total, "interval": [float(low), float(high)], "images": total}


def words(found: dict[str, Any], sizes: dict[str, Any]) -> str:
    """Return the section of report.md."""

    def cell(row: dict[str, Any]) -> str:
        return f"{percent(row['share'])} {interval(row['interval'], 100, 2)}"

    rows = [
        [
            alpha,
            cell(row["unfamiliar"]),
            cell(row["label_missed"]),
            f"{row['mean_size_of_label_sets']:.3f}",
        ]
        for alpha, row in found["promises"].items()
    ]
    header = ["α", "called unfamiliar", "true class not in the label set", "classes in a label set"]
    disturbed = [[name, cell(row)] for name, row in found["disturbed"].items()]
    return (
        f"## Unfamiliar pictures\n\nThe detector of predict.py on test images. At level α at most "
        "a share α of pictures of the training's kind is to be called unfamiliar, and to miss its "
        f"true class, on average over draws of the {found['held_out_images']} held-out images; the "
        f"smallest p-value is {found['smallest_p_value']:.2g}.\n\n{table(header, rows)}\n\n"
        f"What ordinary disturbances do, at α = {DISTURBED:g}:\n\n"
        f"{table(['test images with', 'called unfamiliar'], disturbed)}"
    )
