"""What evaluate.py measures of the generator in a JEM: samples, class-conditional chains, long chains, mixing.

A function for each section of the report, as in measurements.py; scores come from metrics.py. `network` is the
independent classifier whose features judge the samples, see `feature_network`.
"""

from __future__ import annotations

import numpy as np
import torch

import cli
import metrics
import parallel
import plots
import runs
import train_classifier
from models import predict
from restarts import restart_from_state
from sgld import run_chains

FEATURE_SEED = 1_000_003  # of the independent classifier: no training here uses it
LONG_STEPS = (10, 30, 100, 300, 1000, 3000, 10_000)


def feature_network(dataset, folder, device):
    """Return the independent classifier whose features judge the samples; trained into the folder where it is missing.

    A small-cnn of its own seed, deep enough that its last map has one pixel; the features are its head's input (N, D). Its
    settings are its own but for the augmentation, so that a preset that changes is judged by the same network as before.
    """
    checkpoint = parallel.from_first(lambda: _feature_classifier(dataset, folder, device))
    return runs.load_model(checkpoint, device)


def _feature_classifier(dataset, folder, device):
    place = folder / f"feature-classifier-{dataset.name}"
    path = place / "classifier.pt"
    checkpoint = runs.load_checkpoint(path, "classifier") if path.exists() else None
    if checkpoint and checkpoint["finished"]:
        return checkpoint
    place.mkdir(exist_ok=True)
    epochs, decay = (3, 0.998) if len(dataset.train.labels) > 10_000 else (15, 0.99)
    depth = dataset.shape[1].bit_length() - 1
    flags = f"--dataset {dataset.name} --arch small-cnn --width 16 --depth {depth} --stem-stride 1 --seed {FEATURE_SEED}"
    flags += f" --epochs {epochs} --batch-size 64 --lr 1e-3 --lr-floor 0 --warmup-steps 200 --ema-decay {decay}"
    flags += " --input-noise 0.04"
    return train_classifier.train(cli.parse(train_classifier.build_parser(), flags.split()), dataset, place, device, checkpoint)


def extend(checkpoint, model, x, steps, generator, labels=None, callback=None):
    """Run chains on with the settings and the arithmetic of training: on E(x), or with labels (N,) on E(x, y)."""
    device = generator.device
    return run_chains(
        runs.chain_energy(model, device, runs.pick_precision("auto", device)), x, steps,
        **runs.chain_settings(checkpoint), labels=labels, module=model, chunk_size=500, generator=generator, callback=callback,
    )  # fmt: skip


def starts(checkpoint, count, generator, by_turns=False):
    """Draw from the restart distribution: (count, C, H, W) float in [-1, 1], and labels (count,).

    The classes are as frequent as the restart distribution has them, or come by turns.
    """
    restart, numbers = restart_from_state(checkpoint["restart"], generator.device), torch.arange(count, device=generator.device)
    labels = numbers % restart.num_classes if by_turns else restart.labels(numbers)
    return restart.draw(labels, generator), labels


def fresh_chains(checkpoint, model, count, steps, generator, callback=None):
    """Run chains from the restart distribution: (count, C, H, W) float, pixels in [-1, 1]."""
    return extend(checkpoint, model, starts(checkpoint, count, generator)[0], steps, generator, callback=callback)


def features_of(network, images):
    """Return the features (N, D) by which images (N, C, H, W) are judged, of pixels within [-1, 1] as a picture holds them.

    What a chain left outside, where nothing clamps it, is clamped before it is judged.
    """
    return predict(network.features, images.clamp(-1, 1))


def compare(network, features, reference, floor, num_classes):
    """Compare the features (N, D) of images with a reference's: Frechet distance, its ratio to the floor, class histogram.

    network: the classifier whose features they are. floor: distance of training images, or None for these to be it.
    """
    distance = metrics.frechet_distance(features, reference)
    return {
        "frechet_distance": distance,
        "ratio_to_floor": distance / (floor or distance),
        **metrics.class_histogram(network.head(features).argmax(1), num_classes),
    }


def samples(checkpoint, model, network, dataset, args, sizes, folder, device):
    """Judge the buffer's and fresh chains by the features of an independent classifier; draws nearest training images.

    Returns the Frechet distance to the test set with its floor (as many training images) and their ratio, precision and
    recall, class histogram, and the distances to the nearest training image, of both and of the test set.
    """
    generator = torch.Generator(device).manual_seed(args.seed)
    count = min(sizes["samples"], len(dataset.test.labels), len(dataset.train.labels), len(checkpoint["buffer"]["labels"]))
    steps = runs.FRESH_STEPS
    buffer = checkpoint["buffer"]["images"].to(device)
    chosen = torch.randperm(len(buffer), generator=generator, device=device)[:count]
    train = dataset.train.images[torch.randperm(len(dataset.train.images), generator=torch.Generator().manual_seed(args.seed))]
    kinds = {
        "training images": train[:count].to(device),
        "buffer": buffer[chosen],
        "fresh": fresh_chains(checkpoint, model, count, steps, generator),
    }
    test = dataset.test.images[:count]
    reference = features_of(network, test)
    floor, found = None, {}
    few = min(count, 1000)
    for kind, images in kinds.items():
        features = features_of(network, images)
        row = compare(network, features, reference, floor, dataset.num_classes)
        floor = floor or row["frechet_distance"]
        found[kind] = {**row, **metrics.precision_recall(reference, features)}
    everything = dataset.train.images.to(device)
    judged = {"buffer": kinds["buffer"], "fresh": kinds["fresh"], "test images": test.to(device)}
    nearest = {
        kind: [torch.tensor(column) for column in metrics.nearest(x[:few].clamp(-1, 1), everything)]
        for kind, x in judged.items()
    }
    for kind, (distances, _) in nearest.items():
        found.setdefault(kind, {})["distance_to_nearest_training_image"] = {
            "median": float(distances.median()), "smallest": float(distances.min()), "images": few,
        }  # fmt: skip
    dozen = torch.randperm(few, generator=torch.Generator().manual_seed(args.seed))[:12]
    pairs = torch.cat([kinds["fresh"][dozen].cpu(), dataset.train.images[nearest["fresh"][1][dozen]]])
    plots.save_grid(pairs, folder / "nearest.png", columns=12)
    plots.save_distances({kind: distances for kind, (distances, _) in nearest.items()}, folder / "nearest-distances.png")
    plots.save_grid(kinds["fresh"][:64], folder / "fresh.png")
    plots.save_grid(kinds["buffer"][:64], folder / "buffer.png")
    return {"images": count, "fresh_steps": steps, "feature_dimensions": reference.shape[1], "kinds": found}


def long_chains(checkpoint, model, network, dataset, args, sizes, folder, device):
    """Judge the same fresh chains after more and more steps: do they stay, or only pass by?

    Returns the Frechet distance to the test set, its ratio to the floor of as many training images, and the class
    entropy, by the number of steps; draws the first chains, a row for each number.
    """
    generator = torch.Generator(device).manual_seed(args.seed + 3)
    count = min(sizes["long_chains"], len(dataset.test.labels), len(dataset.train.labels))
    reference = features_of(network, dataset.test.images)
    train = dataset.train.images[torch.randperm(len(dataset.train.images), generator=torch.Generator().manual_seed(args.seed))]
    floor = metrics.frechet_distance(features_of(network, train[:count]), reference)
    x, done, found, pictures = starts(checkpoint, count, generator)[0], 0, {}, []
    for steps in [0, *(steps for steps in LONG_STEPS if steps <= sizes["longest"])]:
        x, done = extend(checkpoint, model, x, steps - done, generator), steps
        row = compare(network, features_of(network, x), reference, floor, dataset.num_classes)
        found[str(steps)] = {score: row[score] for score in ("frechet_distance", "ratio_to_floor", "entropy")}
        pictures.append(x[:16].cpu())
    plots.save_grid(torch.cat(pictures), folder / "long-chains.png", columns=len(pictures[0]))
    return {"chains": count, "floor": floor, "steps": found}


def class_conditional(checkpoint, model, network, dataset, args, sizes, folder, device):
    """Measure how often an independent classifier reads the class that a chain on E(x, y) was asked for.

    Draws ten such chains of each class, a row for each class.
    """
    generator = torch.Generator(device).manual_seed(args.seed + 4)
    x, labels = starts(checkpoint, sizes["conditional"], generator, by_turns=True)
    steps = runs.FRESH_STEPS
    before = predict(network, x).argmax(1) == labels
    x = extend(checkpoint, model, x, steps, generator, labels)
    right = (predict(network, x.clamp(-1, 1)).argmax(1) == labels).double().cpu().numpy()
    rows = [x[labels == label][:10] for label in range(dataset.num_classes)]
    columns = min(map(len, rows))
    plots.save_grid(torch.cat([row[:columns] for row in rows]), folder / "class-conditional.png", columns=columns)
    return {
        "chains": len(labels), "steps": steps, "share_as_asked": float(right.mean()),
        "interval": metrics.bootstrap(np.mean, right, resamples=sizes["resamples"]),
        "share_of_the_starts": float(before.double().mean()),
    }  # fmt: skip


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
