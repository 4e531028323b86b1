"""Networks that map images to logits, and the energies that the logits define.

Every network here is built by `build_model(**model_config)` from plain numbers and strings, so a checkpoint that
holds its model_config needs nothing else to be loaded. None has normalisation layers: batch statistics would make
the energy of one image depend on the others in its batch.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, linear, pad, pixel_unshuffle

from sgld import frozen

ARCHITECTURES = ("small-cnn", "wide-resnet")
MANY = 256  # images in a batch, above which the windows of a HalvingConv cost more memory traffic than the products save


def energy(logits):
    """Return the marginal energy E(x) = -logsumexp_y f(x)[y].

    logits: (N, K) float. Returns (N,) float; low means likely. Source: arXiv 1912.03263, equation 7.

    >>> energy(torch.tensor([[0.0, 0.0], [9.0, 0.0]]))
    tensor([-0.6931, -9.0001])
    """
    return -logits.logsumexp(1)


def joint_energy(logits, labels):
    """Return the joint energy E(x, y) = -f(x)[y].

    logits: (N, K) float; labels: (N,) int64 in 0..K-1. Returns (N,) float. Source: arXiv 1912.03263, equation 5.

    >>> joint_energy(torch.tensor([[2.0, 3.0]]), torch.tensor([1]))
    tensor([-3.])
    """
    return -logits.gather(1, labels[:, None]).squeeze(1)


def mixture_energy(logits, weights):
    """Return E(x, w) = -log sum_y w[y] exp f(x)[y], the energy of a mixture of the classes' densities.

    logits, weights: (N, K) float, weights >= 0 and one at least above 0 in each row. Returns (N,) float.

    >>> mixture_energy(torch.tensor([[0.0, 0.0, 7.0]]), torch.tensor([[1.0, 1.0, 0.0]]))  # the third class is no part of it
    tensor([-0.6931])
    """
    return -(logits + weights.log()).logsumexp(1)


def path_energy(logits, weights):
    """Return E(x, w) = -sum_y w[y] f(x)[y]: between two classes it is the geometric path from one density to the other.

    logits, weights: (N, K) float. Returns (N,) float. Source of such paths: Neal, "Annealed importance sampling"
    (Statistics and Computing, 2001), equation 3.

    >>> path_energy(torch.tensor([[2.0, 4.0]]), torch.tensor([[0.5, 0.5]]))
    tensor([-3.])
    """
    return -(logits * weights).sum(1)


class BlockStem(nn.Conv2d):
    """A convolution of stride s with windows of 3s - 1 pixels that is computed as a 3x3 one of stride 1 over s x s blocks.

    Weights and function are those of Conv2d(channels, width, 3 * s - 1, stride=s, padding=s), to rounding, on an image that
    zeros below and to the right fill up to a multiple of s. The gradient with respect to an image of few channels, which
    every Langevin step needs, costs a fraction of what it does there.
    """

    def __init__(self, channels, width, stride):
        super().__init__(channels, width, 3 * stride - 1, stride=stride, padding=stride)

    def forward(self, x):
        """Map x: (N, C, H, W) to (N, width, ceil(H / stride), ceil(W / stride))."""
        side = self.stride[0]
        beyond = (0, -x.shape[3] % side, 0, -x.shape[2] % side)
        blocks = pixel_unshuffle(pad(x, beyond) if any(beyond) else x, side)
        weight = pixel_unshuffle(pad(self.weight, (0, 1, 0, 1)), side)
        if x.is_cuda:  # or the layers after it would copy its maps to this layout, and their gradients back
            blocks, weight = (part.contiguous(memory_format=torch.channels_last) for part in (blocks, weight))
        return conv2d(blocks, weight, self.bias, padding=1)


class HalvingConv(nn.Conv2d):
    """A 4x4 convolution of stride 2; bfloat16 batches on a CPU, if not too large, go through `ProductOfWindows`."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, 4, stride=2, padding=1)

    def forward(self, x):
        """Map x: (N, inputs, H, W) to (N, outputs, H // 2, W // 2)."""
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu") or len(x) > MANY:
            return super().forward(x)
        precision = torch.get_autocast_dtype("cpu")
        return ProductOfWindows.apply(x.to(precision), self.weight.to(precision), self.bias.to(precision))


class ProductOfWindows(torch.autograd.Function):
    """conv2d(x, weight, bias, stride=2, padding=1) with 4x4 weights, forward and backward as products of matrices.

    The products come near to the processor's bfloat16 rate, where the convolution library's gradients of such a layer take
    up to three times as long as its forward pass.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        """Map x: (N, C, H, W), weight: (O, C, 4, 4), bias: (O,) to (N, O, H // 2, W // 2), all of one type."""
        rows, (height, width) = windows(x, 4, 2)
        matrix = weight.permute(0, 2, 3, 1).flatten(1)  # (O, 16 C)
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, matrix)
        ctx.shape = x.shape
        return torch.addmm(bias, rows, matrix.t()).view(len(x), height, width, -1).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        """Return the gradients of x, weight and bias, None where none is wanted, from that of the output."""
        (rows, matrix), (count, channels, height, width) = ctx.saved_tensors, ctx.shape
        outputs, of_x, of_weight, of_bias = len(matrix), None, None, None
        if ctx.needs_input_grad[0]:
            # A 2x2 block of the padded image is seen by 2x2 outputs, by the first of two through the taps 2 and 3 of four.
            seen_by, (high, wide) = windows(gradient, 2, 1)
            taps = matrix.view(outputs, 2, 2, 2, 2, channels).flip(1, 3).permute(1, 3, 0, 2, 4, 5)
            blocks = (seen_by @ taps.reshape(4 * outputs, 4 * channels)).view(count, high, wide, 2, 2, channels)
            of_x = gradient.new_empty(count, height, width, channels)
            for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):  # in a block; the padding's rows and columns fall away
                part = of_x[:, 1 - row :: 2, 1 - column :: 2]
                part.copy_(blocks[:, 1 - row :, 1 - column :, row, column][:, : part.shape[1], : part.shape[2]])
            of_x = of_x.permute(0, 3, 1, 2)
        if ctx.needs_input_grad[1]:
            flat = gradient.permute(0, 2, 3, 1).reshape(-1, outputs)
            of_weight = (flat.t() @ rows).view(outputs, 4, 4, channels).permute(0, 3, 1, 2)
            of_bias = flat.sum(0)
        return of_x, of_weight, of_bias


def windows(x, size, stride):
    """Pad x: (N, C, H, W) by 1 and cut it into windows: (N * rows * columns, size * size * C), and (rows, columns)."""
    padded = pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()
    count, height, width, channels = padded.shape
    rows, columns = (height - size) // stride + 1, (width - size) // stride + 1
    image, row, column, _ = padded.stride()
    shape, strides = (count, rows, columns, size, size * channels), (image, stride * row, stride * column, row, 1)
    return padded.as_strided(shape, strides).reshape(-1, size * size * channels), (rows, columns)


class FlattenLast(nn.Flatten):
    """Flatten maps with the channels last, as they lie in memory: nn.Flatten would copy them there and back."""

    def forward(self, x):
        """Map x: (N, C, H, W) to (N, H * W * C)."""
        return x.permute(0, 2, 3, 1).flatten(1)


class MapHead(nn.Linear):
    """A linear layer on maps that `FlattenLast` has flattened; its weights lie as for nn.Flatten, (K, C * H * W)."""

    def __init__(self, channels, size, num_classes):
        super().__init__(channels * size * size, num_classes)
        self.channels = channels

    def forward(self, x):
        """Map x: (N, H * W * C) to logits (N, K)."""
        weight = self.weight.unflatten(1, (self.channels, -1)).transpose(1, 2).flatten(1)
        return linear(x, weight, self.bias)


class SmallCNN(nn.Module):
    """A plain convolutional network: a first layer, then `depth` strided 4x4 ones that double width and halve the map.

    The first layer is 3x3, or with stem_stride 2 or 4 one of larger windows that halves or quarters the map at once (see
    `BlockStem`), so that a Langevin step costs a half or a third as much. SiLU throughout, because SGLD follows the gradient
    with respect to the input and ReLU makes it piecewise constant. The head is linear on the flattened last map.
    """

    def __init__(self, num_classes, channels, image_size, width=32, depth=2, stem_stride=2):
        super().__init__()
        stem = BlockStem(channels, width, stem_stride) if stem_stride > 1 else nn.Conv2d(channels, width, 3, padding=1)
        layers = [stem, nn.SiLU()]
        size = -(-image_size // stem_stride)
        for stage in range(depth):
            layers += [HalvingConv(width << stage, width << (stage + 1)), nn.SiLU()]
            size //= 2
        self.features = nn.Sequential(*layers, FlattenLast())
        self.head = MapHead(width << depth, size, num_classes)

    def forward(self, x):
        """Map x: (N, C, H, W) float, pixels in [-1, 1], to logits (N, K)."""
        return self.head(self.features(x))


class ResidualBlock(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions; the second starts at zero, so the block is the identity."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride=stride)

    def forward(self, x):
        """Map (N, inputs, H, W) to (N, outputs, H/stride, W/stride)."""
        active = nn.functional.silu(x)
        return self.shortcut(x) + self.second(nn.functional.silu(self.first(active)))


class WideResNet(nn.Module):
    """WRN-depth-width without normalisation, the architecture of the paper (there WRN-28-10 with leaky ReLU).

    depth: 6n + 4 convolutions, n blocks in each of three groups; width: multiplies the 16, 32 and 64 channels.
    Source: Zagoruyko and Komodakis, "Wide Residual Networks" (arXiv 1605.07146), table 1.
    """

    def __init__(self, num_classes, channels, image_size, width=10, depth=28):
        super().__init__()
        layers = [nn.Conv2d(channels, 16, 3, padding=1)]
        inputs = 16
        for group in range(3):
            for block in range((depth - 4) // 6):
                outputs = (16 << group) * width
                layers.append(ResidualBlock(inputs, outputs, stride=2 if group > 0 and block == 0 else 1))
                inputs = outputs
        self.features = nn.Sequential(*layers, nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, x):
        """Map x: (N, C, H, W) float, pixels in [-1, 1], to logits (N, K)."""
        return self.head(self.features(x))


def build_model(arch, num_classes, channels, image_size, width, depth, stem_stride=1):
    """Build the network that a model_config describes.

    arch: one of ARCHITECTURES; num_classes, channels, image_size (pixels a side), width and depth: positive ints;
    stem_stride: of the small-cnn's first layer, 1, 2 or 4; 1 for a wide-resnet.
    The weights come from torch's global random generator. Raises ValueError for a configuration that no network has.
    """
    if min(num_classes, channels, image_size, width, depth) < 1:
        raise ValueError("num_classes, channels, image_size, width and depth must be 1 or more")
    if stem_stride not in ((1, 2, 4) if arch == "small-cnn" else (1,)):
        raise ValueError(f"stem_stride {stem_stride}: the first layer has stride 1, a small-cnn's 1, 2 or 4; set --stem-stride")
    if arch == "small-cnn":
        if -(-image_size // stem_stride) >> depth < 1:
            raise ValueError(f"a small-cnn of depth {depth} halves {image_size}x{image_size} images to nothing; lower depth")
        network = SmallCNN(num_classes, channels, image_size, width, depth, stem_stride)
    elif arch == "wide-resnet":
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"a wide-resnet has depth 6n + 4 (10, 16, 22, 28, ...), not {depth}")
        network = WideResNet(num_classes, channels, image_size, width, depth)
    else:
        raise ValueError(f"unknown architecture {arch!r}; choose from {', '.join(ARCHITECTURES)}")
    return network.to(memory_format=torch.channels_last)


def predict(model, images, batch_size=1000):
    """Return the logits (N, K) float32 of images (N, C, H, W), pixels in [-1, 1], in eval mode and batch by batch."""
    device = next(model.parameters()).device
    with frozen(model), torch.no_grad():
        return torch.cat([model(part.to(device)).float() for part in images.split(batch_size)])
