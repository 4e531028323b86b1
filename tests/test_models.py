"""Energies against hand-computed values; networks by their shapes and independence of rows."""

import math

import pytest
import torch
from conftest import generator
from torch import nn

from sgld_nrg.models import (
    ARCHITECTURES,
    build_model,
    joint_energy,
    marginal_energy,
    mixture_energy,
    path_energy,
    predict,
)
from sgld_nrg.support.layers import BlockStem, HalvingConv

RESNET = {"width": 1, "depth": 10}
SHAPES = {"small-cnn": {"width": 4, "depth": 2}, "vgg": {"width": 4, "depth": 2}}
SHAPES["wide-resnet"] = RESNET


def make(arch, **rest):
    torch.manual_seed(0)
    config = {"arch": arch, "num_classes": 5, "channels": 1, "image_size": 8, **SHAPES[arch]}
    return build_model(**{**config, **rest})


def test_energies_have_the_values_computed_by_hand():
    logits = torch.tensor([[math.log(2.0), math.log(3.0), 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(marginal_energy(logits), -torch.tensor([6.0, 3.0]).log())
    found = joint_energy(logits, torch.tensor([1, 2]))
    torch.testing.assert_close(found, -torch.tensor([3.0, 1.0]).log())


def test_the_joint_density_divided_by_the_marginal_is_the_softmax():
    logits = torch.randn(6, 5)
    for label in range(5):
        labels = torch.full((6,), label)
        conditional = (marginal_energy(logits) - joint_energy(logits, labels)).exp()
        torch.testing.assert_close(conditional, logits.softmax(1)[:, label])


def test_mixtures_and_paths_have_the_energies_they_are_made_of():
    logits, labels = torch.randn(6, 5), torch.arange(6) % 5
    one_hot = nn.functional.one_hot(labels, 5).float()
    for of in (mixture_energy, path_energy):
        torch.testing.assert_close(of(logits, one_hot), joint_energy(logits, labels))
    torch.testing.assert_close(mixture_energy(logits, torch.ones(6, 5)), marginal_energy(logits))
    pair = torch.tensor([0.25, 0, 0.75, 0, 0]).expand(6, 5)
    first, third = logits[:, 0], logits[:, 2]
    torch.testing.assert_close(path_energy(logits, pair), -0.25 * first - 0.75 * third)
    mixed = -(0.25 * first.exp() + 0.75 * third.exp()).log()
    torch.testing.assert_close(mixture_energy(logits, pair), mixed)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("channels, image_size", [(1, 8), (3, 32), (1, 28)])
def test_every_architecture_maps_images_to_logits(arch, channels, image_size):
    model = make(arch, channels=channels, image_size=image_size)
    logits = model(torch.zeros(2, channels, image_size, image_size))
    assert logits.shape == (2, 5) and torch.isfinite(logits).all()


@pytest.mark.parametrize("stride", [2, 4])
@pytest.mark.parametrize("channels, height, width", [(1, 28, 28), (3, 32, 32), (1, 29, 27)])
def test_the_stem_on_blocks_is_a_strided_convolution_with_the_same_gradients(
    channels, height, width, stride
):
    stem = BlockStem(channels, 8, stride)
    plain = torch.nn.Conv2d(channels, 8, 3 * stride - 1, stride=stride, padding=stride)
    plain.load_state_dict(stem.state_dict())
    x = torch.randn(4, channels, height, width, requires_grad=True)
    filled = nn.functional.pad(x, (0, -width % stride, 0, -height % stride))

    def output_and_gradients(layer, seen):
        output = layer(seen)
        return output, *torch.autograd.grad(output.square().sum(), [x, layer.weight, layer.bias])

    found, wanted = output_and_gradients(stem, x), output_and_gradients(plain, filled)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("height, width", [(14, 14), (7, 7), (6, 9), (3, 2)])
def test_the_halving_convolution_in_bfloat16_is_the_plain_one_with_the_same_gradients(
    height, width
):
    layer, source = HalvingConv(5, 8), generator()
    x = torch.randn(3, 5, height, width, generator=source).bfloat16().float().requires_grad_()
    layer.weight.data = layer.weight.data.bfloat16().float()  # so that both are asked the same
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16 and expected.dtype == torch.float32
    downstream = torch.randn(expected.shape, generator=source).bfloat16()
    wanted = (x, layer.weight, layer.bias)
    exact = (expected, *torch.autograd.grad(expected, wanted, downstream.float()))
    rounded = (found, *torch.autograd.grad(found, wanted, downstream))
    for one, other in zip(rounded, exact, strict=True):
        tolerance = 2**-7 * float(other.detach().abs().max())
        torch.testing.assert_close(one.float(), other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("stem_stride, depth, width", [(2, 2, 4), (4, 1, 8)])
def test_a_strided_stem_shrinks_the_map_like_stages(stem_stride, depth, width):
    small = make("small-cnn", image_size=28, depth=depth, width=width, stem_stride=stem_stride)
    plain = make("small-cnn", image_size=28, depth=3, width=2)
    assert small.head.in_features == plain.head.in_features == 4 * 4 * 9
    assert small(torch.zeros(2, 1, 28, 28)).shape == (2, 5)


def test_the_head_reads_the_maps_in_the_order_of_torchs_own_flatten():
    model, plain = make("small-cnn", image_size=16), nn.Linear(16 * 4 * 4, 5)
    plain.load_state_dict(model.head.state_dict())
    images = torch.randn(3, 1, 16, 16)
    maps = model.features[:-1](images)
    assert maps.shape == (3, 16, 4, 4)
    torch.testing.assert_close(model(images), plain(maps.flatten(1)))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_logits_of_an_image_do_not_depend_on_its_batch(arch):
    model, images = make(arch), torch.randn(6, 1, 8, 8)
    torch.testing.assert_close(model(images)[2:3], model(images[2:3]), atol=1e-5, rtol=1e-4)


def test_a_residual_network_has_three_groups_of_blocks_each_twice_as_wide_at_half_the_size():
    stem, *blocks, _, _, _ = make("wide-resnet", depth=16, width=2).features
    x, shapes = stem(torch.randn(1, 1, 8, 8)), []
    for block in blocks:
        x = block(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(32, 8, 8)] * 2 + [(64, 4, 4)] * 2 + [(128, 2, 2)] * 2


def test_a_vgg_has_stages_of_half_the_size_whose_convolutions_begin_as_the_identity():
    model, x = make("vgg", image_size=16, width=8, depth=3), torch.randn(1, 6, 8, 8)
    layers = [layer for layer in model.features if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in layers] == [6, 8, 8, 32, 32, 32, 32]
    shapes = []
    maps = torch.randn(2, 1, 16, 16)
    for layer in model.features:
        maps = layer(maps)
        shapes += [maps.shape[2]] if isinstance(layer, nn.MaxPool2d) else []
    assert shapes == [8, 4, 2] and maps.shape == (2, 32)
    given = layers[1](x)[:, :6] - layers[1].bias[:6, None, None]
    torch.testing.assert_close(given, x)


def test_residual_blocks_start_as_the_identity_and_learn():
    model = make("wide-resnet")
    model(torch.randn(3, 1, 8, 8)).square().sum().backward()
    seconds = [part.second.weight for part in model.modules() if hasattr(part, "second")]
    assert seconds and all(not weight.any() and weight.grad.any() for weight in seconds)


@pytest.mark.parametrize(
    "config",
    [
        {"arch": "small-cnn", "depth": 4},
        {"arch": "vgg", "depth": 4},
        {"arch": "wide-resnet", "depth": 11},
        {"arch": "small-cnn", "width": 0},
    ],
)
def test_configurations_that_no_network_has_are_refused(config):
    with pytest.raises(ValueError, match="depth"):
        make(**config)


@pytest.mark.parametrize(
    "config", [{"arch": "small-cnn", "stem_stride": 3}, {"arch": "wide-resnet", "stem_stride": 2}]
)
def test_a_stem_that_no_network_has_is_refused(config):
    with pytest.raises(ValueError, match="--stem-stride"):
        make(**config)


def test_an_unknown_architecture_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="small-cnn"):
        build_model("transformer", 10, 1, 8, 1, 1)


def test_predict_goes_batch_by_batch_in_eval_mode_and_leaves_the_modes():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 3))
    model[1].eval()
    model[2].train()
    images = torch.randn(7, 1, 2, 2)
    modes = [part.training for part in model.modules()]
    logits = predict(model, images, batch_size=3)
    torch.testing.assert_close(logits, model[2](images.flatten(1)).detach())
    assert [part.training for part in model.modules()] == modes and not logits.requires_grad
