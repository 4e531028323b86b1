"""Section: the same fresh chains after more and more steps: do they stay, or only pass by?"""

from __future__ import annotations

from typing import Any

import torch

from sgld_nrg.support import plots, sample_metrics
from sgld_nrg.support.report.study import Study, compare, extend, features_of, starts
from sgld_nrg.support.report.words import table

STEPS = (10, 30, 100, 300, 1000, 3000, 10_000)


def measure(study: Study) -> dict[str, Any]:
    """Judge chains by the number of steps: Fréchet distance, ratio to the floor, class entropy.

    The floor is the distance of as many training images. Draws the first chains, a row a number.
    """
    dataset, network, generator = study.dataset, study.network, study.generator(3)
    count = min(study.sizes["long_chains"], len(dataset.test.labels), len(dataset.train.labels))
    reference = features_of(network, dataset.test.images)
    train = study.shuffled_training_images()[:count]
    floor = sample_metrics.frechet_distance(features_of(network, train), reference)
    x, _ = starts(study.checkpoint, count, generator)
    done, found, pictures = 0, {}, []
    for steps in [0, *(steps for steps in STEPS if steps <= study.sizes["longest"])]:
        x = extend(study.checkpoint, study.models["jem"], x, steps - done, generator)
        done = steps
        row = compare(network, features_of(network, x), reference, floor, dataset.num_classes)
        kept = ("frechet_distance", "ratio_to_floor", "entropy")
        found[str(steps)] = {score: row[score] for score in kept}
        pictures.append(x[:16].cpu())
    grid, columns = torch.cat(pictures), len(pictures[0])
    plots.save_grid(grid, study.folder / "long-chains.png", columns=columns)
    return {"chains": count, "floor": floor, "steps": found}


def words(found: dict[str, Any], sizes: dict[str, Any]) -> str:
    """Return the section of report.md."""
    rows = [
        [
            steps,
            f"{row['frechet_distance']:.2f}",
            f"{row['ratio_to_floor']:.2f}",
            f"{row['entropy']:.4f}",
        ]
        for steps, row in found["steps"].items()
    ]
    header = ["steps", "Fréchet distance", "of the floor", "class entropy / ln K"]
    return (
        f"## Long chains\n\n{found['chains']} fresh chains, judged after more and more steps; the "
        f"floor is {found['floor']:.2f}, that of as many training images.\n\n{table(header, rows)}"
        "\n\nThe same chains in each row, the number of steps growing downwards:\n\n"
        "![Long chains](long-chains.png)"
    )
