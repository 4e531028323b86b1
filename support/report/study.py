"""What the sections of the report share: the models and data they look at, sizes, fresh chains."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sgld_nrg.models import energy_of, predict
from sgld_nrg.sgld import run_chains
from sgld_nrg.support import sample_metrics
from sgld_nrg.support.checkpoints import Checkpoint, langevin_from
from sgld_nrg.support.data import Dataset
from sgld_nrg.support.devices import pick_precision
from sgld_nrg.support.restarts import restart_from_state

PRECISION = "float32"  # of every measurement but the chains, which run as in training
# Sizes: images of each kind, and the steps, random starts and draws of the attacks.
FULL: dict[str, Any] = {
    "ood": 10_000,
    "attacked": 1000,
    "attack_steps": 75,
    "random_starts": 1,
    "targets": 2,
    "epsilons": {  # pixels on [0, 1]; the first is that of papers on MNIST and on CIFAR-10
        "grey": {"linf": (0.1, 0.3, 0.5), "l2": (1.5, 3.0, 10.0)},
        "colour": {"linf": (8 / 255, 16 / 255, 0.5), "l2": (0.5, 1.0, 10.0)},
    },
    "square_images": 200,
    "square_queries": 500,
    "stronger_images": 50,
    "refined": 50,
    "refined_steps": 5,
    "refined_attack_steps": 20,
    "refined_draws": 2,
    "refined_epsilons": 1,  # the first ones
    "samples": 10_000,
    "conditional": 1000,
    "long_chains": 400,
    "longest": 10_000,
    "chains": 64,
    "chain_steps": 300,
    "resamples": 200,
}
QUICK: dict[str, Any] = {
    "ood": 1000,
    "attacked": 100,
    "attack_steps": 10,
    "random_starts": 1,
    "targets": 1,
    "epsilons": {
        "grey": {"linf": (0.1, 0.5), "l2": (1.5, 10.0)},
        "colour": {"linf": (8 / 255, 0.5), "l2": (0.5, 10.0)},
    },
    "square_images": 50,
    "square_queries": 50,
    "stronger_images": 20,
    "refined": 16,
    "refined_steps": 3,
    "refined_attack_steps": 5,
    "refined_draws": 2,
    "refined_epsilons": 1,
    "samples": 1000,
    "conditional": 200,
    "long_chains": 200,
    "longest": 100,
    "chains": 32,
    "chain_steps": 60,
    "resamples": 100,
}
DRY_RUN: dict[str, Any] = {
    **QUICK,
    "ood": 50,
    "attacked": 8,
    "attack_steps": 2,
    "square_images": 4,
    "square_queries": 2,
    "stronger_images": 2,
    "refined": 4,
    "refined_attack_steps": 1,
    "samples": 100,
    "conditional": 40,
    "long_chains": 20,
    "longest": 10,
    "chains": 4,
    "chain_steps": 8,
    "resamples": 40,
}


@dataclass
class Study:
    """Everything that a section looks at.

    models: {"jem": network, "classifier": network}, the second only if there is one. network: the
    independent classifier whose features judge samples. ood: what `detection.ood_sets` returned.
    folder: where figures go.
    """

    args: Namespace
    sizes: dict[str, Any]
    device: torch.device
    dataset: Dataset
    checkpoint: Checkpoint
    models: dict[str, nn.Module]
    network: nn.Module
    ood: tuple[dict[str, Tensor], dict[str, str], list[str]]
    folder: Path

    def generator(self, offset: int = 0) -> torch.Generator:
        """Return a generator on the device, seeded by --seed."""
        return torch.Generator(self.device).manual_seed(self.args.seed + offset)

    def shuffled_training_images(self) -> Tensor:
        """Return the training images in an order that --seed alone decides."""
        images = self.dataset.train.images
        source = torch.Generator().manual_seed(self.args.seed)
        return images[torch.randperm(len(images), generator=source)]


def extend(
    checkpoint: Checkpoint,
    model: nn.Module,
    x: Tensor,
    steps: int,
    generator: torch.Generator,
    labels: Tensor | None = None,
    callback: Callable | None = None,
) -> Tensor:
    """Run chains on as in training: on E(x), or with labels (N,) on E(x, y)."""
    return run_chains(
        energy_of(model, pick_precision("auto", generator.device)),
        x,
        steps,
        langevin_from(checkpoint),
        labels=labels,
        module=model,
        chunk_size=500,
        generator=generator,
        callback=callback,
    )


def starts(
    checkpoint: Checkpoint, count: int, generator: torch.Generator, by_turns: bool = False
) -> tuple[Tensor, Tensor]:
    """Draw from the restart distribution: (count, C, H, W) float in [-1, 1], and labels (count,).

    The classes are as frequent as the restart distribution has them, or come by turns.
    """
    device = generator.device
    restart = restart_from_state(checkpoint["restart"], device)
    numbers = torch.arange(count, device=device)
    labels = numbers % restart.num_classes if by_turns else restart.labels(numbers)
    return restart.draw(labels, generator), labels


def fresh_chains(
    checkpoint: Checkpoint,
    model: nn.Module,
    count: int,
    steps: int,
    generator: torch.Generator,
    callback: Callable | None = None,
) -> Tensor:
    """Run chains from the restart distribution: (count, C, H, W) float, pixels in [-1, 1]."""
    x, _ = starts(checkpoint, count, generator)
    return extend(checkpoint, model, x, steps, generator, callback=callback)


def features_of(network: Any, images: Tensor) -> Tensor:
    """Return the features (N, D) by which images (N, C, H, W) are judged.

    What a chain left outside of [-1, 1] is clamped before it is judged, as a picture file would.
    """
    return predict(network.features, images.clamp(-1, 1))


def compare(
    network: Any, features: Tensor, reference: Tensor, floor: float | None, num_classes: int
) -> dict[str, Any]:
    """Compare the features (N, D) of images with a reference's.

    network: the classifier whose features they are. floor: distance of training images, or None for
    these to be it. Returns the Fréchet distance, its ratio to the floor, and the class histogram.
    """
    distance = sample_metrics.frechet_distance(features, reference)
    return {
        "frechet_distance": distance,
        "ratio_to_floor": distance / (floor or distance),
        **sample_metrics.class_histogram(network.head(features).argmax(1), num_classes),
    }
