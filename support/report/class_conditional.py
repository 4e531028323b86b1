"""Section: how often chains on E(x, y) are read as the class that they were asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sgld_nrg.models import predict
from sgld_nrg.support import metrics, plots
from sgld_nrg.support.origin import named
from sgld_nrg.support.presets import FRESH_STEPS
from sgld_nrg.support.report.study import Study, cleaned, extend, starts
from sgld_nrg.support.report.words import interval, percent, table, worse_first

CHANGING_STEPS = 100  # of a chain that starts in another class


def measure(study: Study) -> dict[str, Any]:
    """Measure the shares that the judges read as asked; draws ten chains of each class.

    As asked: of chains that start in the class's own restart distribution, and of these starts.
    Changed: of chains that start in another class's, the others by turns, and of these starts.
    """
    generator, checkpoint, model = study.generator(4), study.checkpoint, study.models["jem"]
    classes = study.dataset.classes
    x, labels = starts(checkpoint, study.sizes["conditional"], generator, by_turns=True)
    ends = extend(checkpoint, model, x, FRESH_STEPS, generator, labels)
    further = 1 + torch.arange(len(labels), device=labels.device) // len(classes)
    wanted = (labels + 1 + further % (len(classes) - 1)) % len(classes)
    changed = extend(checkpoint, model, x, CHANGING_STEPS, generator, wanted)
    images = {
        "as_asked": (ends, labels),
        "of_the_starts": (x, labels),
        "changed": (changed, wanted),
        "changed_before": (x, wanted),
    }
    judged: dict[str, dict[str, Any]] = {}
    for name, judge in study.judges.items():
        judged[name] = {}
        for kind, (pictures, asked) in images.items():
            right = predict(judge, pictures.clamp(-1, 1)).argmax(1) == asked
            share = right.double().cpu().numpy()
            around = metrics.bootstrap(np.mean, share, resamples=study.sizes["resamples"])
            judged[name][kind] = {"share": float(share.mean()), "interval": around}
    clean = cleaned(checkpoint, model, ends, generator, labels)
    rows = [clean[labels == label][:10] for label in range(len(classes))]
    columns = min(map(len, rows))
    grid = torch.cat([row[:columns] for row in rows])
    names = classes if named(classes) else ()
    plots.save_grid(grid, study.folder / "class-conditional.png", columns, names)
    return {
        "chains": len(labels),
        "steps": FRESH_STEPS,
        "changing_steps": CHANGING_STEPS,
        "judges": judged,
    }


def words(found: dict[str, Any], sizes: dict[str, Any]) -> str:
    """Return the section of report.md."""

    def cell(row: dict[str, Any]) -> str:
        return f"{percent(row['share'])} {interval(row['interval'], 100, 1)}"

    judges = worse_first(found["judges"], lambda judge: -judge["changed"]["share"])
    rows = [[name, *map(cell, judge.values())] for name, judge in judges]
    header = ["judge", "own class", "of its starts", "another class", "of its starts"]
    return (
        f"## Class-conditional chains\n\nThe share of {found['chains']} chains on E(x, y) that a "
        "judge reads as the class asked for: of those that start in that class's restart "
        f"distribution, after {found['steps']} steps, and of those that start in another class's "
        f"and have to change, after {found['changing_steps']}; beside each the share of the starts "
        f"that are read so already.\n\n{table(header, rows)}\n\nA row for each class, after one "
        "more step, without noise:\n\n"
        "![Class-conditional chains](class-conditional.png)"
    )
