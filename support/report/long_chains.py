"""Section: the same fresh chains after more and more steps: do they stay, or only pass by?"""

from __future__ import annotations

from typing import Any

import torch

from sgld_nrg.support import plots
from sgld_nrg.support.report.study import Study, cleaned, extend, starts
from sgld_nrg.support.report.words import ratio, table, worse_first

STEPS = (10, 30, 100, 300, 1000, 3000, 10_000)
SCORES = ("frechet_distance", "ratio_to_floor", "deviation", "precision", "recall", "entropy")


def measure(study: Study) -> dict[str, Any]:
    """Judge chains by the number of steps; draws the first chains, a row a number.

    Returns for each judge its floor, that of as many training images as chains, and of what
    `Yardstick.judge_features` says the SCORES after each number of steps, with the ratio after one
    more step, without noise, as "cleaned".
    """
    dataset, model, generator = study.dataset, study.models["jem"], study.generator(3)
    splits = (dataset.test, dataset.train)
    count = min(study.sizes["long_chains"], *(len(split.labels) for split in splits))
    yardsticks = study.yardsticks(count)
    judged: dict[str, Any] = {
        name: {"floor": yardstick.floor, "floor_deviation": yardstick.deviation, "steps": {}}
        for name, yardstick in yardsticks.items()
    }
    x, _ = starts(study.checkpoint, count, generator)
    done, pictures = 0, []
    for steps in [0, *(steps for steps in STEPS if steps <= study.sizes["longest"])]:
        x = extend(study.checkpoint, model, x, steps - done, generator)
        done = steps
        clean = cleaned(study.checkpoint, model, x, generator) if steps else x
        for name, yardstick in yardsticks.items():
            row = yardstick.judge_images(x)
            row_of_clean = yardstick.judge_images(clean) if steps else row
            judged[name]["steps"][str(steps)] = {
                **{score: row[score] for score in SCORES},
                "cleaned": row_of_clean["ratio_to_floor"],
            }
        pictures.append(clean[:16].cpu())
    grid, columns = torch.cat(pictures), len(pictures[0])
    plots.save_grid(grid, study.folder / "long-chains.png", columns=columns)
    return {"chains": count, "judges": judged}


def words(found: dict[str, Any], sizes: dict[str, Any]) -> str:
    """Return the section of report.md."""

    def last(judge: dict[str, Any]) -> float:
        return list(judge["steps"].values())[-1]["ratio_to_floor"]

    rows = []
    for name, judge in worse_first(found["judges"], last):
        for steps, row in judge["steps"].items():
            cells = [f"{row['frechet_distance']:.2f}", ratio(row), f"{row['cleaned']:.2f}"]
            cells += [f"{row[score]:.3f}" for score in ("precision", "recall")]
            rows.append([name, steps, *cells, f"{row['entropy']:.4f}"])
    header = ["judge", "steps", "Fréchet distance", "of the floor", "cleaned"]
    header += ["precision", "recall"]
    return (
        f"## Long chains\n\n{found['chains']} fresh chains, judged after more and more steps "
        "against as many test images, with the floor of as many training images. Cleaned: the "
        "ratio after one more step, without noise.\n\n"
        f"{table([*header, 'class entropy / ln K'], rows)}"
        "\n\nThe same chains in each row, the number of steps growing downwards:\n\n"
        "![Long chains](long-chains.png)"
    )
