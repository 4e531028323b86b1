"""Batch normalisation for a classifier's training, folded into the convolutions it leaves behind.

A classifier learns faster with it, but the energy of one image would depend on the others in its
batch. So a network has it while the classifier is trained, and at no other time.
"""

from __future__ import annotations

import copy

from torch import nn
from torch.nn.utils import fuse_conv_bn_eval


class Normalised(nn.Sequential):
    """A convolution and its batch normalisation."""


def add_batch_norm(network: nn.Module) -> None:
    """Put a BatchNorm2d behind each convolution of a network, in place."""
    for name, layer in network.named_children():
        if isinstance(layer, nn.Conv2d):
            setattr(network, name, Normalised(layer, nn.BatchNorm2d(layer.out_channels)))
        else:
            add_batch_norm(layer)


def folded(network: nn.Module) -> nn.Module:
    """Return a copy of a network as it was before `add_batch_norm`, with what it does in eval mode.

    Its weights take over the running statistics: the function is the same, to rounding.
    """
    network = copy.deepcopy(network).eval()
    _fold(network)
    return network.train()


def _fold(network: nn.Module) -> None:
    for name, layer in network.named_children():
        if isinstance(layer, Normalised):
            setattr(network, name, fuse_conv_bn_eval(*layer))
        else:
            _fold(layer)
