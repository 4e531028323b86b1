"""Networks that map images to logits, and the energies that the logits define.

`build_model(**model_config)` builds every network from plain numbers and strings, so a checkpoint
needs its model_config alone to be loaded. No network has normalisation layers: batch statistics
would make the energy of one image depend on the others in its batch. A classifier may train with
them (support/batch_norm.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sgld_nrg.sgld import frozen
from sgld_nrg.support.errors import UserError
from sgld_nrg.support.layers import BlockStem, FlattenLast, HalvingConv, MapHead

ARCHITECTURES = ("small-cnn", "vgg", "wide-resnet")


def marginal_energy(logits: Tensor) -> Tensor:
    """Return the marginal energy E(x) = -logsumexp_y f(x)[y]; low means likely.

    logits: (N, K) float. Returns (N,) float. Source: arXiv 1912.03263, equation 7.

    >>> marginal_energy(torch.tensor([[0.0, 0.0], [9.0, 0.0]]))
    tensor([-0.6931, -9.0001])
    """
    return -logits.logsumexp(1)


def joint_energy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the joint energy E(x, y) = -f(x)[y].

    logits: (N, K) float; labels: (N,) int64 in 0..K-1. Returns (N,) float.
    Source: arXiv 1912.03263, equation 5.

    >>> joint_energy(torch.tensor([[2.0, 3.0]]), torch.tensor([1]))
    tensor([-3.])
    """
    return -logits.gather(1, labels[:, None]).squeeze(1)


def mixture_energy(logits: Tensor, weights: Tensor) -> Tensor:
    """Return E(x, w) = -log sum_y w[y] exp f(x)[y], of a mixture of the classes' densities.

    logits, weights: (N, K) float, weights >= 0 and above 0 at least once in each row.
    Returns (N,) float. Here the third class is no part of the mixture:

    >>> mixture_energy(torch.tensor([[0.0, 0.0, 7.0]]), torch.tensor([[1.0, 1.0, 0.0]]))
    tensor([-0.6931])
    """
    return -(logits + weights.log()).logsumexp(1)


def path_energy(logits: Tensor, weights: Tensor) -> Tensor:
    """Return E(x, w) = -sum_y w[y] f(x)[y], the geometric path from one class's density to another.

    logits, weights: (N, K) float. Returns (N,) float. Source: Neal, "Annealed importance sampling"
    (Statistics and Computing, 2001), equation 3.

    >>> path_energy(torch.tensor([[2.0, 4.0]]), torch.tensor([[0.5, 0.5]]))
    tensor([-3.])
    """
    return -(logits * weights).sum(1)


def logits_of(model: nn.Module, x: Tensor, precision: str) -> Tensor:
    """Return a network's logits (N, K) float32 of x (N, C, H, W), in float32 or bf16 arithmetic."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return model(x).float()


def energy_of(
    model: nn.Module,
    precision: str = "float32",
    given_class: Callable[[Tensor, Tensor], Tensor] = joint_energy,
) -> Callable[..., Tensor]:
    """Return a network's energy as `sgld.run_chains` wants it: x (N, C, H, W) -> E(x), (N,).

    Called as (x, labels) it returns given_class(logits, labels), by default E(x, y).
    """

    def energy(x: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = logits_of(model, x, precision)
        return marginal_energy(logits) if labels is None else given_class(logits, labels)

    return energy


class SmallCNN(nn.Module):
    """A first layer, then `depth` strided 4x4 convolutions that double width and halve the map.

    The first layer is 3x3, or with stem_stride 2 or 4 has larger windows and shrinks the map at
    once, so that a Langevin step costs a half or a third as much. SiLU throughout, because SGLD
    follows the gradient with respect to the input and ReLU makes it piecewise constant.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int,
        image_size: int,
        width: int = 32,
        depth: int = 2,
        stem_stride: int = 2,
    ):
        super().__init__()
        strided = stem_stride > 1
        stem = (
            BlockStem(channels, width, stem_stride)
            if strided
            else nn.Conv2d(channels, width, 3, padding=1)
        )
        layers: list[nn.Module] = [stem, nn.SiLU()]
        size = -(-image_size // stem_stride)
        for stage in range(depth):
            layers += [HalvingConv(width << stage, width << (stage + 1)), nn.SiLU()]
            size //= 2
        self.features = nn.Sequential(*layers, FlattenLast())
        self.head = MapHead(width << depth, size, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map x: (N, C, H, W) float, pixels in [-1, 1], to logits (N, K)."""
        return self.head(self.features(x))


class VGG(nn.Module):
    """A first layer, then `depth` stages of two 3x3 convolutions, the first of which is max-pooled.

    The first stage has `width` channels, every other one 4 * width. Convolutions begin as the
    identity of what they are given (Dirac's initialisation). Sources: Simonyan and Zisserman (arXiv
    1409.1556); proportions and initialisation: Jordan, "94% on CIFAR-10 in 3.29 seconds on a single
    GPU" (arXiv 2404.00498), who trains with batch normalisation, here `--batch-norm`.
    """

    def __init__(
        self, num_classes: int, channels: int, image_size: int, width: int = 32, depth: int = 3
    ):
        super().__init__()
        first = nn.Conv2d(channels, max(width * 3 // 4, 1), 3, padding=1)
        layers: list[nn.Module] = [first, nn.SiLU()]
        inputs = first.out_channels
        for stage in range(depth):
            outputs = width if stage == 0 else 4 * width
            for pooling in (nn.MaxPool2d(2), nn.Identity()):
                layer = nn.Conv2d(inputs, outputs, 3, padding=1)
                nn.init.dirac_(layer.weight[:inputs])
                layers += [layer, pooling, nn.SiLU()]
                inputs = outputs
        self.features = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map x: (N, C, H, W) float, pixels in [-1, 1], to logits (N, K)."""
        return self.head(self.features(x))


class ResidualBlock(nn.Module):
    """Pre-activation block of two 3x3 convolutions; the second starts at zero: the identity."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H/stride, W/stride)."""
        active = nn.functional.silu(x)
        return self.shortcut(x) + self.second(nn.functional.silu(self.first(active)))


class WideResNet(nn.Module):
    """WRN-depth-width without normalisation, the paper's network (WRN-28-10, leaky ReLU there).

    depth: 6n + 4 convolutions, n blocks in each of three groups; width: multiplies the 16, 32 and
    64 channels. Source: Zagoruyko and Komodakis, "Wide Residual Networks" (arXiv 1605.07146).
    """

    def __init__(
        self, num_classes: int, channels: int, image_size: int, width: int = 10, depth: int = 28
    ):
        super().__init__()
        first = nn.Conv2d(channels, 16, 3, padding=1)
        blocks, inputs = [], first.out_channels
        for group in range(3):
            for number in range((depth - 4) // 6):
                outputs, stride = (16 << group) * width, 2 if group > 0 and number == 0 else 1
                blocks.append(ResidualBlock(inputs, outputs, stride))
                inputs = outputs
        pooled = (nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.features = nn.Sequential(first, *blocks, *pooled)
        self.head = nn.Linear(64 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map x: (N, C, H, W) float, pixels in [-1, 1], to logits (N, K)."""
        return self.head(self.features(x))


def build_model(
    arch: str,
    num_classes: int,
    channels: int,
    image_size: int,
    width: int,
    depth: int,
    stem_stride: int = 1,
) -> nn.Module:
    """Build the network that a model_config describes, with weights from torch's global generator.

    arch: one of ARCHITECTURES; image_size: pixels a side; the rest as the networks have it.
    Raises ValueError for a configuration that no network has.
    """
    if min(num_classes, channels, image_size, width, depth) < 1:
        raise ValueError("num_classes, channels, image_size, width and depth must be 1 or more")
    if stem_stride not in ((1, 2, 4) if arch == "small-cnn" else (1,)):
        raise ValueError(
            f"stem_stride {stem_stride}: the first layer has stride 1, a small-cnn's 1, 2 or 4; "
            "set --stem-stride"
        )
    network: nn.Module
    if arch in ("small-cnn", "vgg") and -(-image_size // stem_stride) >> depth < 1:
        raise ValueError(
            f"a {arch} of depth {depth} halves {image_size}x{image_size} images to nothing; "
            "lower depth"
        )
    if arch == "small-cnn":
        network = SmallCNN(num_classes, channels, image_size, width, depth, stem_stride)
    elif arch == "vgg":
        network = VGG(num_classes, channels, image_size, width, depth)
    elif arch == "wide-resnet":
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"wide-resnet: depth is 6n + 4 (10, 16, 22, 28, ...), not {depth}")
        network = WideResNet(num_classes, channels, image_size, width, depth)
    else:
        raise ValueError(f"unknown architecture {arch!r}; choose from {', '.join(ARCHITECTURES)}")
    return network.to(memory_format=torch.channels_last)


def load_model(checkpoint: dict[str, Any], device: torch.device | str = "cpu") -> nn.Module:
    """Rebuild a checkpoint's network, with the weights that were kept, on a device.

    Raises UserError if the weights are not those of that network.
    """
    try:
        model = build_model(**checkpoint["model_config"]).to(device)
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            "the checkpoint's weights do not fit its model_config: train it again, or name another"
        ) from error
    return model


def predict(model: nn.Module, images: Tensor, batch_size: int = 1000) -> Tensor:
    """Return the logits (N, K) float32 of images (N, C, H, W), in eval mode and batch by batch."""
    device = next(model.parameters()).device
    with frozen(model), torch.no_grad():
        return torch.cat([model(part.to(device)).float() for part in images.split(batch_size)])
