"""Section: the buffer's and fresh chains, judged by the features of an independent classifier."""

from __future__ import annotations

from typing import Any

import torch

from sgld_nrg.support import plots, sample_metrics
from sgld_nrg.support.presets import FRESH_STEPS
from sgld_nrg.support.report.study import Study, compare, features_of, fresh_chains
from sgld_nrg.support.report.words import table


def measure(study: Study) -> dict[str, Any]:
    """Judge samples; draws them, and the nearest training images.

    Returns the Fréchet distance to the test set, its ratio to the floor (as many training images),
    precision and recall, and class histogram, of training images, the buffer's and fresh chains;
    and the distances to the nearest training image, of both kinds of chains and of the test set.
    """
    dataset, checkpoint, network = study.dataset, study.checkpoint, study.network
    generator, buffer = study.generator(), study.checkpoint["buffer"]["images"].to(study.device)
    train, test = dataset.train.images, dataset.test.images
    count = min(study.sizes["samples"], len(test), len(train), len(buffer))
    chosen = torch.randperm(len(buffer), generator=generator, device=study.device)[:count]
    model = study.models["jem"]
    kinds = {
        "training images": study.shuffled_training_images()[:count].to(study.device),
        "buffer": buffer[chosen],
        "fresh": fresh_chains(checkpoint, model, count, FRESH_STEPS, generator),
    }
    reference = features_of(network, test[:count])
    floor = None
    found: dict[str, Any] = {}
    for kind, images in kinds.items():
        features = features_of(network, images)
        row = compare(network, features, reference, floor, dataset.num_classes)
        floor = floor or row["frechet_distance"]
        found[kind] = {**row, **sample_metrics.precision_recall(reference, features)}

    few, everything = min(count, 1000), train.to(study.device)
    judged = {"buffer": kinds["buffer"], "fresh": kinds["fresh"]}
    judged["test images"] = test[:count].to(study.device)
    distances, indices = {}, {}
    for kind, images in judged.items():
        far, which = sample_metrics.nearest(images[:few].clamp(-1, 1), everything)
        distances[kind], indices[kind] = torch.tensor(far), torch.tensor(which)
        found.setdefault(kind, {})["distance_to_nearest_training_image"] = {
            "median": float(distances[kind].median()),
            "smallest": float(distances[kind].min()),
            "images": few,
        }
    source = torch.Generator().manual_seed(study.args.seed)
    dozen = torch.randperm(few, generator=source)[:12]
    pairs = torch.cat([kinds["fresh"][dozen].cpu(), train[indices["fresh"][dozen]]])
    plots.save_grid(pairs, study.folder / "nearest.png", columns=12)
    plots.save_distances(distances, study.folder / "nearest-distances.png")
    for kind in ("fresh", "buffer"):
        plots.save_grid(kinds[kind][:64], study.folder / f"{kind}.png")
    width = reference.shape[1]
    return {
        "images": count,
        "fresh_steps": FRESH_STEPS,
        "feature_dimensions": width,
        "kinds": found,
    }


def words(found: dict[str, Any], sizes: dict[str, Any]) -> str:
    """Return the section of report.md."""
    rows = []
    for kind, row in found["kinds"].items():
        cells = [""] * 5
        if "frechet_distance" in row:
            distance, ratio = f"{row['frechet_distance']:.2f}", f"{row['ratio_to_floor']:.2f}"
            both = [f"{row[score]:.3f}" for score in ("precision", "recall")]
            cells = [distance, ratio, *both, f"{row['entropy']:.4f}"]
        near = row.get("distance_to_nearest_training_image")
        last = f"{near['median']:.2f} / {near['smallest']:.2f}" if near else ""
        rows.append([kind, *cells, last])
    header = [
        "",
        "Fréchet distance",
        "of the floor",
        "precision",
        "recall",
        "class entropy / ln K",
        "nearest training image: median / smallest",
    ]
    return "\n\n".join(
        [
            "## Samples",
            f"Fréchet distance over the {found['feature_dimensions']} features of an independent "
            f"classifier (not the FID of Inception features), {found['images']} images of each "
            "kind, to as many test images; the floor is that of training images. Fresh chains "
            f"start in the restart distribution and take {found['fresh_steps']} steps. Distances "
            "are L2, pixels on [-1, 1].",
            table(header, rows),
            "Fresh chains:\n\n![Fresh chains](fresh.png)",
            "Chains of the replay buffer:\n\n![Chains of the buffer](buffer.png)",
            "A random dozen of fresh chains, and below each its nearest training image:\n\n"
            "![Nearest training images](nearest.png)",
            "![Distances to the nearest training image](nearest-distances.png)",
        ]
    )
