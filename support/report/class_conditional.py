"""Section: how often chains on E(x, y) are read as the class that they were asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sgld_nrg.models import predict
from sgld_nrg.support import metrics, plots
from sgld_nrg.support.origin import named
from sgld_nrg.support.presets import FRESH_STEPS
from sgld_nrg.support.report.study import Study, extend, starts
from sgld_nrg.support.report.words import interval, percent


def measure(study: Study) -> dict[str, Any]:
    """Measure the share that an independent classifier reads as asked; draws ten of each class."""
    generator, checkpoint = study.generator(4), study.checkpoint
    x, labels = starts(checkpoint, study.sizes["conditional"], generator, by_turns=True)
    before = predict(study.network, x).argmax(1) == labels
    x = extend(checkpoint, study.models["jem"], x, FRESH_STEPS, generator, labels)
    read = predict(study.network, x.clamp(-1, 1)).argmax(1)
    right = (read == labels).double().cpu().numpy()
    rows = [x[labels == label][:10] for label in range(study.dataset.num_classes)]
    columns = min(map(len, rows))
    grid = torch.cat([row[:columns] for row in rows])
    classes = study.dataset.classes
    names = classes if named(classes) else ()
    plots.save_grid(grid, study.folder / "class-conditional.png", columns, names)
    return {
        "chains": len(labels),
        "steps": FRESH_STEPS,
        "share_as_asked": float(right.mean()),
        "interval": metrics.bootstrap(np.mean, right, resamples=study.sizes["resamples"]),
        "share_of_the_starts": float(before.double().mean()),
    }


def words(found: dict[str, Any], sizes: dict[str, Any]) -> str:
    """Return the section of report.md."""
    return (
        f"## Class-conditional chains\n\nOf {found['chains']} chains of {found['steps']} steps on "
        "E(x, y), started in the class's restart distribution, the independent classifier reads "
        f"{percent(found['share_as_asked'])} {interval(found['interval'], 100, 1)} as the class "
        f"that was asked for (of their starts {percent(found['share_of_the_starts'])}). A row for "
        "each class:\n\n![Class-conditional chains](class-conditional.png)"
    )
