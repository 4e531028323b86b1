"""The judges of samples: two classifiers of different families.

The Fréchet ratio depends on the network whose features it is taken over, so there are two of them:
recipes are chosen by the first, and reports show both. They see clean images, have batch
normalisation, and are trained once for a data set. Of the networks in models.py the vgg alone is
of a judge's family.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from sgld_nrg.models import predict
from sgld_nrg.support.augment import shifted
from sgld_nrg.support.checkpoints import read_state, write_whole
from sgld_nrg.support.data import Dataset
from sgld_nrg.support.parallel import Alone
from sgld_nrg.support.parser import HERE

JUDGES = ("vgg", "convmixer")  # recipes are chosen by the first
SEED = 1_000_003  # of their weights and batches: no training of a model uses it
MIRRORED = ("cifar10", "cifar100")  # no recipe's flag decides it: judges do not move with recipes


class VGG(nn.Module):
    """Three stages of two 3x3 convolutions with ReLU, each halved by its largest values.

    Source, but for the normalisation: Simonyan and Zisserman (arXiv 1409.1556).
    """

    def __init__(self, num_classes: int, channels: int, widths: Sequence[int]):
        super().__init__()
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False)]
            layers += [nn.MaxPool2d(2, ceil_mode=True), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map x: (N, C, H, W) float, pixels in [-1, 1], to logits (N, K)."""
        return self.head(self.features(x))


class ConvMixer(nn.Module):
    """Patches, mixed over space by depthwise convolutions and over channels by 1x1 ones.

    Source: Trockman and Kolter, "Patches are all you need?" (arXiv 2201.09792).
    """

    def __init__(
        self, num_classes: int, channels: int, patch: int, width: int, depth: int, kernel: int
    ):
        super().__init__()
        embedding = nn.Conv2d(channels, width, patch, stride=patch)
        layers: list[nn.Module] = [nn.Sequential(embedding, nn.GELU(), nn.BatchNorm2d(width))]
        layers += [MixerBlock(width, kernel) for _ in range(depth)]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map x: (N, C, H, W) float, pixels in [-1, 1], to logits (N, K)."""
        return self.head(self.features(x))


class MixerBlock(nn.Module):
    """A layer of `ConvMixer`: a residual depthwise convolution, then one of single pixels."""

    def __init__(self, width: int, kernel: int):
        super().__init__()
        depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.space = nn.Sequential(depthwise, nn.GELU(), nn.BatchNorm2d(width))
        self.mix = nn.Sequential(nn.Conv2d(width, width, 1), nn.GELU(), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, width, H, W) to the same shape."""
        return self.mix(x + self.space(x))


def build_judge(name: str, num_classes: int, shape: Sequence[int]) -> nn.Module:
    """Return a judge, untrained, for images of shape (C, H, W): wider and deeper if in colour."""
    channels, side, _ = shape
    colour = channels == 3
    if name == "vgg":
        widths = (48, 192, 192) if colour else (16, 32, 64)
        return VGG(num_classes, channels, widths)
    patch = 2 if colour or side < 16 else 4
    width, depth, kernel = (128, 6, 5) if colour else (64, 3, 3)
    return ConvMixer(num_classes, channels, patch, width, depth, kernel)


def judges(
    dataset: Dataset,
    folder: Path,
    device: torch.device,
    ranks: Alone,
    most_iterations: int | None = None,
) -> dict[str, Any]:
    """Return the judges of a data set, {name: network in eval mode}, trained if not found.

    They are looked for in `folder`, then in the project's own results/judges, by the training
    images' fingerprint; one that is trained here is kept in `folder`. most_iterations: of a
    training, for a dry run; None: no limit.
    """
    found = {}
    fingerprint = dataset.origin["fingerprint"]["train"]
    for name in JUDGES:

        def make(name: str = name) -> dict[str, Any]:
            file = f"{dataset.name}-{fingerprint.split()[-1]}-{name}.pt"
            for place in (folder, HERE / "results" / "judges"):
                state = read_state(place / file)
                if state and state["fingerprint"]["train"] == fingerprint:
                    return state
            state = _train(name, dataset, device, most_iterations)
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / file, state)
            return state

        network = build_judge(name, dataset.num_classes, dataset.shape).to(device)
        network.load_state_dict(ranks.from_first(make)["model"])
        found[name] = network.eval()
    return found


def _train(
    name: str, dataset: Dataset, device: torch.device, most_iterations: int | None = None
) -> dict[str, Any]:
    """Train a judge on clean training images, shifted and, as the data set allows, mirrored."""
    images, labels = dataset.train.to(device)
    colour, count = dataset.shape[0] == 3, len(labels)
    epochs, batch = (8, 256) if colour else (4, 128) if count > 10_000 else (20, 64)
    batch = min(batch, count)
    generator = torch.Generator(device).manual_seed(SEED)
    flip_prob = 0.5 if dataset.name in MIRRORED else 0.0
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(SEED)
        network = build_judge(name, dataset.num_classes, dataset.shape).to(device)
    network = network.to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    total = min(epochs * (count // batch), most_iterations or epochs * count)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=4e-3, total_steps=total)
    rows: Iterator[Tensor] = iter(())
    for _ in tqdm(range(total), disable=None, desc=f"judge {name}", unit="it"):
        chosen = next(rows, None)
        if chosen is None:  # an epoch begins
            order = torch.randperm(count, device=device, generator=generator)
            rows = iter(order[: count // batch * batch].split(batch))
            chosen = next(rows)
        x = shifted(images[chosen], dataset.shape[1] // 14, generator, flip_prob)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = network(x)
        loss = cross_entropy(logits.float(), labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    val = dataset.val.to(device)
    accuracy = (predict(network, val.images).argmax(1) == val.labels).float().mean().item()
    print(f"judge {name}: validation accuracy {100 * accuracy:.2f} %", flush=True)
    state = network.state_dict()
    weights = {key: (v.half() if v.is_floating_point() else v).cpu() for key, v in state.items()}
    return {"model": weights, "fingerprint": dataset.origin["fingerprint"], "accuracy": accuracy}
