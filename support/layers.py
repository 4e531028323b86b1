"""Layers: torch's own, to rounding, computed in a cheaper way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, linear, pad, pixel_unshuffle

MANY = 256  # images above which a HalvingConv's windows cost more memory traffic than they save


class BlockStem(nn.Conv2d):
    """Conv2d(channels, width, 3 * s - 1, stride=s, padding=s), as a 3x3 one over s x s blocks.

    To rounding, on an image that zeros below and to the right fill up to a multiple of s. The
    gradient with respect to an image of few channels, which every Langevin step needs, costs a
    fraction of what it does there.
    """

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__(channels, width, 3 * stride - 1, stride=stride, padding=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map x: (N, C, H, W) to (N, width, ceil(H / stride), ceil(W / stride))."""
        side = self.stride[0]
        beyond = (0, -x.shape[3] % side, 0, -x.shape[2] % side)
        blocks = pixel_unshuffle(pad(x, beyond) if any(beyond) else x, side)
        weight = pixel_unshuffle(pad(self.weight, (0, 1, 0, 1)), side)
        if x.is_cuda:  # or the layers after it would copy its maps to this layout and back
            blocks = blocks.contiguous(memory_format=torch.channels_last)
            weight = weight.contiguous(memory_format=torch.channels_last)
        return conv2d(blocks, weight, self.bias, padding=1)


class HalvingConv(nn.Conv2d):
    """Conv2d(inputs, outputs, 4, stride=2, padding=1); bf16 on a CPU by `ProductOfWindows`."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map x: (N, inputs, H, W) to (N, outputs, H // 2, W // 2)."""
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu") or len(x) > MANY:
            return super().forward(x)
        precision = torch.get_autocast_dtype("cpu")
        assert self.bias is not None
        parts = (x.to(precision), self.weight.to(precision), self.bias.to(precision))
        return ProductOfWindows.apply(*parts)


class ProductOfWindows(torch.autograd.Function):
    """conv2d(x, weight, bias, stride=2, padding=1) with 4x4 weights, as products of matrices.

    They come near to the processor's bf16 rate; the convolution library's gradients of such a
    layer take up to three times as long as its forward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Map x: (N, C, H, W), weight: (O, C, 4, 4), bias: (O,) to (N, O, H // 2, W // 2)."""
        rows, (height, width) = _windows(x, 4, 2)
        matrix = weight.permute(0, 2, 3, 1).flatten(1)  # (O, 16 C)
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, matrix)
        ctx.shape = x.shape
        product = torch.addmm(bias, rows, matrix.t())
        return product.view(len(x), height, width, -1).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias, None if not wanted, from the output's."""
        (rows, matrix), (count, channels, height, width) = ctx.saved_tensors, ctx.shape
        outputs, of_x, of_weight, of_bias = len(matrix), None, None, None
        if ctx.needs_input_grad[0]:
            # A 2x2 block of the padded image is seen by 2x2 outputs, by the first of two through
            # the taps 2 and 3 of four.
            seen_by, (high, wide) = _windows(gradient, 2, 1)
            taps = matrix.view(outputs, 2, 2, 2, 2, channels).flip(1, 3).permute(1, 3, 0, 2, 4, 5)
            blocks = seen_by @ taps.reshape(4 * outputs, 4 * channels)
            blocks = blocks.view(count, high, wide, 2, 2, channels)
            of_x = gradient.new_empty(count, height, width, channels)
            for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):  # in a block; padding falls away
                part = of_x[:, 1 - row :: 2, 1 - column :: 2]
                seen = blocks[:, 1 - row :, 1 - column :, row, column]
                part.copy_(seen[:, : part.shape[1], : part.shape[2]])
            of_x = of_x.permute(0, 3, 1, 2)
        if ctx.needs_input_grad[1]:
            flat = gradient.permute(0, 2, 3, 1).reshape(-1, outputs)
            of_weight = (flat.t() @ rows).view(outputs, 4, 4, channels).permute(0, 3, 1, 2)
            of_bias = flat.sum(0)
        return of_x, of_weight, of_bias


def _windows(x: Tensor, size: int, stride: int) -> tuple[Tensor, tuple[int, int]]:
    """Pad x: (N, C, H, W) by 1 and cut it: (N * rows * columns, size^2 * C), (rows, columns)."""
    padded = pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()
    count, height, width, channels = padded.shape
    rows, columns = (height - size) // stride + 1, (width - size) // stride + 1
    image, row, column, _ = padded.stride()
    shape = (count, rows, columns, size, size * channels)
    strides = (image, stride * row, stride * column, row, 1)
    cut = padded.as_strided(shape, strides)
    return cut.reshape(-1, size * size * channels), (rows, columns)


class FlattenLast(nn.Flatten):
    """Flatten maps with the channels last, as they lie in memory; nn.Flatten would copy them."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x: (N, C, H, W) to (N, H * W * C)."""
        return x.permute(0, 2, 3, 1).flatten(1)


class MapHead(nn.Linear):
    """A linear layer on what `FlattenLast` flattened; its weights lie as after nn.Flatten."""

    def __init__(self, channels: int, size: int, num_classes: int):
        super().__init__(channels * size * size, num_classes)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """Map x: (N, H * W * C) to logits (N, K)."""
        weight = self.weight.unflatten(1, (self.channels, -1)).transpose(1, 2).flatten(1)
        return linear(x, weight, self.bias)
