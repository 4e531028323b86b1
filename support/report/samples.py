"""Section: the buffer's and fresh chains, judged by the features of independent classifiers."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from sgld_nrg.support import plots, sample_metrics
from sgld_nrg.support.augment import add_noise
from sgld_nrg.support.errors import first_line
from sgld_nrg.support.presets import FRESH_STEPS
from sgld_nrg.support.report.study import Study, cleaned, fresh_chains
from sgld_nrg.support.report.words import ratio, table, worse_first


def measure(study: Study) -> dict[str, Any]:
    """Judge samples; draws them, and the nearest training images.

    Returns for each judge its floor and, of the buffer's and fresh chains, as they are and after
    a step without noise, what `Yardstick.judge_features` says; of training images the same, of one
    of the floor's draws, and of others with the noise of --input-noise, which is what the density
    is of; with --fid also the FID of each kind; and the distances to the nearest training image, of
    the chains without noise and of the test set.
    """
    dataset, checkpoint = study.dataset, study.checkpoint
    generator, buffer = study.generator(), checkpoint["buffer"]["images"]
    train, test = dataset.train.images, dataset.test.images
    count = min(study.sizes["samples"], len(test), len(train))
    if 5 * len(buffer) >= count:  # a checkpoint made small keeps too few to judge
        count = min(count, len(buffer))
    source = torch.Generator().manual_seed(study.args.seed)
    chosen = torch.randperm(len(buffer), generator=source)[:count]
    others = train[torch.randperm(len(train), generator=source)[:count]]
    noise = checkpoint["args"]["input_noise"]
    model = study.models["jem"]
    fresh = fresh_chains(checkpoint, model, count, FRESH_STEPS, generator)
    chains = {"buffer": buffer[chosen].to(study.device), "fresh": fresh}
    clean = {kind: cleaned(checkpoint, model, x, generator) for kind, x in chains.items()}
    kinds = {"training images with the training's noise": add_noise(others, noise, source)}
    for kind, x in chains.items():
        kinds |= {kind: x, f"{kind}, cleaned": clean[kind]}
    kinds = {kind: images for kind, images in kinds.items() if len(images) == count}
    judged = {}
    for name, yardstick in study.yardsticks(count).items():
        found = {"training images": yardstick.judge_features(yardstick.training)}
        found |= {kind: yardstick.judge_images(images) for kind, images in kinds.items()}
        judged[name] = {
            "floor": yardstick.floor,
            "floor_deviation": yardstick.deviation,
            "feature_dimensions": yardstick.reference.shape[1],
            "kinds": found,
        }

    everything = train.to(study.device)
    fid = _fid(everything, kinds, study.args.fid)
    few = min(count, study.sizes["nearest"])
    distances, indices = {}, {}
    for kind, images in {**clean, "test images": test.to(study.device)}.items():
        far, which = sample_metrics.nearest(images[:few].clamp(-1, 1), everything)
        distances[kind], indices[kind] = torch.tensor(far), torch.tensor(which)
    dozen = torch.randperm(few, generator=source)[:12]
    pairs = torch.cat([clean["fresh"][dozen].cpu(), train[indices["fresh"][dozen]]])
    plots.save_grid(pairs, study.folder / "nearest.png", columns=12)
    plots.save_distances(distances, study.folder / "nearest-distances.png")
    for kind, images in clean.items():
        plots.save_grid(images[:64], study.folder / f"{kind}.png")
    return {
        "images": count,
        "fresh_steps": FRESH_STEPS,
        "judges": judged,
        **fid,
        "distance_to_nearest_training_image": {
            kind: {"median": float(far.median()), "smallest": float(far.min()), "images": few}
            for kind, far in distances.items()
        },
    }


def _fid(train: Tensor, kinds: dict[str, Tensor], wanted: bool) -> dict[str, Any]:
    """Return the FID of each kind of images to the training images, or why there is none."""
    if not wanted:
        return {}
    try:
        kinds = {kind: images.to(train.device) for kind, images in kinds.items()}
        return {"fid": sample_metrics.inception_distances(train, kinds)}
    except (ImportError, OSError) as error:
        print(f"--fid: {first_line(error)}; going on without", file=sys.stderr, flush=True)
        return {"no_fid": first_line(error)}


def words(found: dict[str, Any], sizes: dict[str, Any]) -> str:
    """Return the section of report.md."""
    rows = []
    for name, judge in worse_first(
        found["judges"], lambda judge: judge["kinds"]["fresh"]["ratio_to_floor"]
    ):
        for kind, row in judge["kinds"].items():
            cells = [f"{row['frechet_distance']:.2f}", ratio(row)]
            cells += [f"{row[score]:.3f}" for score in ("precision", "recall")]
            rows.append([name, kind, *cells, f"{row['entropy']:.4f}"])
    header = ["judge", "", "Fréchet distance", "of the floor", "precision", "recall"]
    floors = "; ".join(
        f"{name} {judge['floor']:.2f} ± {judge['floor_deviation']:.2f}"
        for name, judge in found["judges"].items()
    )
    near = found["distance_to_nearest_training_image"]
    return "\n\n".join(
        [
            "## Samples",
            "Fréchet distances over the features of two independent classifiers (not the FID of "
            f"Inception features), {found['images']} images of each kind to as many test images, "
            "the worse judge first. The floor is the mean distance of eight draws of as many "
            f"training images ({floors}); its deviation stands behind each ratio. Fresh chains "
            f"start in the restart distribution and take {found['fresh_steps']} steps. The density "
            "is that of training images with noise, so their row is what chains can come down to. "
            "Cleaned: after one more step, without noise, as sample.py ends and the figures show. "
            "A buffer of too few chains, as of a checkpoint made small, is not judged.",
            table([*header, "class entropy / ln K"], rows),
            *_words_of_fid(found),
            "L2 distance to the nearest training image, pixels on [-1, 1], median / smallest of at "
            f"most {near['fresh']['images']}: "
            + ", ".join(
                f"{kind} {d['median']:.2f} / {d['smallest']:.2f}" for kind, d in near.items()
            )
            + ".",
            "Fresh chains:\n\n![Fresh chains](fresh.png)",
            "Chains of the replay buffer:\n\n![Chains of the buffer](buffer.png)",
            "A random dozen of fresh chains, and below each its nearest training image:\n\n"
            "![Nearest training images](nearest.png)",
            "![Distances to the nearest training image](nearest-distances.png)",
        ]
    )


def _words_of_fid(found: dict[str, Any]) -> list[str]:
    """Return what --fid brought, in no or one paragraph."""
    if "no_fid" in found:
        return [f"FID: not measured ({found['no_fid']})."]
    if "fid" not in found:
        return []
    rows = ", ".join(f"{kind} {value:.2f}" for kind, value in found["fid"].items())
    return [
        f"FID, Inception's features, {found['images']} images of each kind to all training "
        f"images: {rows}."
    ]
