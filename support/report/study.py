"""What the sections of the report share: the models and data they look at, sizes, fresh chains."""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sgld_nrg.models import energy_of, predict
from sgld_nrg.sgld import run_chains
from sgld_nrg.support import sample_metrics
from sgld_nrg.support.checkpoints import Checkpoint, langevin_from
from sgld_nrg.support.data import Dataset
from sgld_nrg.support.detector import Detector, detector_for
from sgld_nrg.support.devices import pick_precision
from sgld_nrg.support.restarts import restart_from_state

PRECISION = "float32"  # of every measurement but the chains, which run as in training
# Sizes: images of each kind, and the steps, random starts and draws of the attacks.
FULL: dict[str, Any] = {
    "ood": 2000,
    "attacked": 500,  # on a GPU 1000, unless --attacked says
    "attack_steps": 75,
    "random_starts": 1,
    "targets": 2,
    "epsilons": {  # pixels on [0, 1]; the first is that of papers on MNIST and on CIFAR-10
        "grey": {"linf": (0.1, 0.3, 0.5), "l2": (1.5, 3.0, 10.0)},
        "colour": {"linf": (8 / 255, 16 / 255, 0.5), "l2": (0.5, 1.0, 10.0)},
    },
    "square_images": 200,
    "square_queries": 300,
    "stronger_images": 60,
    "refined": 40,
    "refined_steps": 5,
    "refined_attack_steps": 20,
    "refined_draws": 2,
    "refined_epsilons": 1,  # the first ones
    "samples": 10_000,
    "conditional": 500,
    "long_chains": 500,  # on a GPU as many as samples, unless --chains says
    "longest": 1000,
    "nearest": 500,
    "chains": 64,
    "chain_steps": 200,
    "resamples": 100,
}
QUICK: dict[str, Any] = {
    "ood": 250,
    "attacked": 60,
    "attack_steps": 10,
    "random_starts": 1,
    "targets": 1,
    "epsilons": {
        "grey": {"linf": (0.1, 0.5), "l2": (1.5, 10.0)},
        "colour": {"linf": (8 / 255, 0.5), "l2": (0.5, 10.0)},
    },
    "square_images": 30,
    "square_queries": 50,
    "stronger_images": 6,
    "refined": 8,
    "refined_steps": 3,
    "refined_attack_steps": 5,
    "refined_draws": 1,
    "refined_epsilons": 1,
    "samples": 400,
    "conditional": 100,
    "long_chains": 150,
    "longest": 100,
    "nearest": 100,
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
    "nearest": 20,
    "chains": 4,
    "chain_steps": 8,
    "resamples": 40,
}


@dataclass
class Study:
    """Everything that a section looks at.

    models: {"classifier": the one it started from, "control": the same network with the same
    attacks and augmentation and no density, "jem"}, the first two only if there are any. judges:
    {name: classifier whose features judge samples}. ood: what `detection.ood_sets` returned.
    folder: where figures go. kept_detectors: {model: what its checkpoint keeps of a detector}.
    """

    args: Namespace
    sizes: dict[str, Any]
    device: torch.device
    dataset: Dataset
    checkpoint: Checkpoint
    models: dict[str, nn.Module]
    judges: dict[str, Any]
    ood: tuple[dict[str, Tensor], dict[str, str], list[str]]
    folder: Path
    kept_detectors: dict[str, Any] = field(default_factory=dict)

    def detector(self, name: str) -> Detector:
        """Return a model's detector: the one that its training left, or one fitted alike."""
        if name in self.kept_detectors:
            return Detector.from_state(self.models[name], self.kept_detectors[name])
        return detector_for(self.models[name], self.dataset)

    def generator(self, offset: int = 0) -> torch.Generator:
        """Return a generator on the device, seeded by --seed."""
        return torch.Generator(self.device).manual_seed(self.args.seed + offset)

    def yardsticks(self, count: int) -> dict[str, Yardstick]:
        """Return each judge's yardstick of the first `count` test images."""
        test, train = self.dataset.test.images[:count], self.dataset.train.images
        return {name: Yardstick(judge, test, train) for name, judge in self.judges.items()}


class Yardstick:
    """What a judge measures samples against: reference images, and as many training images.

    judge: a network with `features` and `head`. reference: (N, C, H, W), N >= 2; train: (M, C, H,
    W), M >= N. floor: the mean Fréchet distance of DRAWS draws of N training images to the
    reference; deviation: their standard deviation. The draws are the same on every machine.
    """

    DRAWS = 8

    def __init__(self, judge: Any, reference: Tensor, train: Tensor):
        self.judge, self.count = judge, len(reference)
        self.reference = features_of(judge, reference)
        sources = (torch.Generator().manual_seed(draw) for draw in range(self.DRAWS))
        draws = [torch.randperm(len(train), generator=s)[: self.count] for s in sources]
        drawn = torch.cat(draws).unique()  # an image of several draws is looked at once
        features = features_of(judge, train[drawn])
        sets = [features[torch.searchsorted(drawn, rows).to(features.device)] for rows in draws]
        self.training = sets[-1]
        distances = [sample_metrics.frechet_distance(each, self.reference) for each in sets]
        self.floor, self.deviation = statistics.mean(distances), statistics.stdev(distances)

    def judge_images(self, images: Tensor) -> dict[str, Any]:
        """Judge as many images as the reference has; see `judge_features`."""
        return self.judge_features(features_of(self.judge, images))

    def judge_features(self, features: Tensor) -> dict[str, Any]:
        """Judge (N, D) features: distance, ratio, precision, recall, and the classes' entropy.

        The ratio's deviation is the floor's, carried over. Raises ValueError for another N than the
        reference's, since distances of different counts do not compare.
        """
        if len(features) != self.count:
            raise ValueError(f"{len(features)} images cannot be judged against {self.count}")
        distance = sample_metrics.frechet_distance(features, self.reference)
        ratio, logits = distance / self.floor, self.judge.head(features)
        return {
            "frechet_distance": distance,
            "ratio_to_floor": ratio,
            "deviation": ratio * self.deviation / self.floor,
            **sample_metrics.precision_recall(self.reference, features),
            **sample_metrics.class_histogram(logits.argmax(1), logits.shape[1]),
        }


def extend(
    checkpoint: Checkpoint,
    model: nn.Module,
    x: Tensor,
    steps: int,
    generator: torch.Generator,
    labels: Tensor | None = None,
    callback: Callable | None = None,
    without_noise: bool = False,
) -> Tensor:
    """Run chains on as in training: on E(x), or with labels (N,) on E(x, y)."""
    langevin = langevin_from(checkpoint)
    return run_chains(
        energy_of(model, pick_precision("auto", generator.device)),
        x,
        steps,
        langevin.without_noise() if without_noise else langevin,
        labels=labels,
        module=model,
        chunk_size=2500 if generator.device.type == "cuda" else 500,
        generator=generator,
        callback=callback,
    )


def cleaned(
    checkpoint: Checkpoint,
    model: nn.Module,
    x: Tensor,
    generator: torch.Generator,
    labels: Tensor | None = None,
) -> Tensor:
    """Return chains after one more step, without noise, which is how sample.py shows them."""
    return extend(checkpoint, model, x, 1, generator, labels, without_noise=True)


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


@torch.no_grad()
def features_of(judge: Any, images: Tensor) -> Tensor:
    """Return the features (N, D) by which images (N, C, H, W) are judged.

    What a chain left outside of [-1, 1] is clamped before it is judged, as a picture file would.
    """
    return predict(judge.features, images.clamp(-1, 1))
