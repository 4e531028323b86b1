"""The defaults that depend on the data set: a base, and what each preset changes of it.

Any flag on the command line overrides its entry; a training script prints what it uses. A flag
that is off in the base is off in every preset that does not name it.

The temperature that step and noise imply, noise_std^2 / (2 * step_size), is 0.032 for the digits
and 0.05 for MNIST; the paper's (step 1, noise 0.01) is 5e-5. The chains sample exp(-E / T), the
classifier is softmax(f) at temperature 1: the lower T, the flatter the logits that the chains ask
for, and the less confident the classifier.
"""

from __future__ import annotations

from typing import Any

Preset = dict[str, Any]

BASE: Preset = {
    "arch": "small-cnn",
    "width": 48,
    "depth": 2,
    "stem_stride": 1,
    "batch_norm": False,
    "epochs": 60,
    "pretrain_epochs": 20,
    "pretrain_lr": 0.0,
    "batch_size": 64,
    "optimizer": "adam",
    "weight_decay": 0.0,
    "lr": 1e-3,
    "lr_floor": 0.0,
    "warmup_iterations": 100,
    "ema_decay": 0.99,
    "input_noise": 0.05,
    "augment": 0.0,
    "shift": 0,
    "flip_prob": 0.0,
    "clean_share": 1.0,
    "adversarial_eps": 0.0,
    "attack_share": 1.0,
    "p_x_weight": 0.3,
    "energy_reg": 0.001,
    "outlier_weight": 0.0,
    "outlier_share": 0.125,
    "outlier_margin": 20.0,
    "chain_batch_size": 64,
    "first_steps": 0,
    "steps": 10,
    "step_size": 0.1,
    "noise_std": 0.08,
    "noise_first": False,
    "pixel_grad_clip": 1.0,
    "clamp": 1.0,
    "buffer_size": 2000,
    "reinit_prob": 0.05,
    "restart_parts": 1,
    "restart_rank": 64,
    "long_chains": 0,
    "long_share": 0.0,
}


def _changed(base: Preset, **changes: Any) -> Preset:
    """Return a preset that differs from another in some of its flags."""
    assert changes.keys() <= base.keys()
    return {**base, **changes}


# For the first run: half the base's chains and steps, two thirds of its epochs.
DIGITS = _changed(BASE, epochs=40, lr=2e-3, chain_batch_size=32, steps=5)
MNIST = _changed(
    BASE,
    width=96,
    depth=1,
    stem_stride=4,
    epochs=18,
    pretrain_epochs=1,
    lr=2e-3,
    lr_floor=0.05,
    warmup_iterations=200,
    ema_decay=0.9995,
    input_noise=0.04,
    augment=1.0,
    clean_share=0.5,
    adversarial_eps=0.08,
    attack_share=0.5,
    p_x_weight=0.14,
    energy_reg=1e-4,
    outlier_weight=0.14,
    chain_batch_size=32,
    first_steps=3,
    steps=6,
    noise_std=0.1,
    noise_first=True,
    pixel_grad_clip=5.0,
    buffer_size=10_000,
    restart_parts=50,
    restart_rank=20,
    long_chains=400,
    long_share=0.3,
)
# Clothes have mid-tones, where no clamp hides noise, and textures, which resampling would blur:
# less noise, and images moved by whole pixels. Its chains are still far from the data.
FASHION = _changed(MNIST, input_noise=0.03, augment=0.0, shift=2, flip_prob=0.5, noise_std=0.03)
# For an hour: a first layer of stride 2, which is three and a half times the arithmetic; more and
# stronger attacks; a rate that ends high and a smaller weight of log p(x), which robustness wants.
MNIST_HOUR = _changed(
    MNIST,
    width=64,
    depth=2,
    stem_stride=2,
    lr_floor=0.5,
    adversarial_eps=0.1,
    attack_share=0.7,
    p_x_weight=0.04,
)
# Colour: mirrored images moved by whole pixels, which stay as sharp as those that the energy sees,
# less noise, for no clamp hides it in mid-tones, and no cross-entropy on images as they are, which
# the network would memorise.
CIFAR10 = _changed(
    BASE,
    arch="vgg",
    width=32,
    depth=3,
    batch_norm=True,
    epochs=9,
    pretrain_epochs=10,
    pretrain_lr=2e-3,
    optimizer="adamw",
    weight_decay=0.05,
    lr=1e-3,
    warmup_iterations=200,
    input_noise=0.03,
    shift=4,
    flip_prob=0.5,
    clean_share=0.0,
    p_x_weight=0.07,
    outlier_weight=0.02,
    chain_batch_size=32,
    steps=6,
    step_size=0.05,
    noise_std=0.02,
    noise_first=True,
    pixel_grad_clip=5.0,
    buffer_size=10_000,
    reinit_prob=0.1,
    restart_parts=10,
    long_chains=400,
    long_share=0.3,
)
# For ten minutes of a GPU: a network four times as costly, and large batches.
CIFAR10_GPU = _changed(
    CIFAR10,
    width=64,
    epochs=100,
    pretrain_epochs=20,
    batch_size=128,
    chain_batch_size=64,
    ema_decay=0.9995,
)
SVHN = _changed(CIFAR10, flip_prob=0.0)  # mirrored numbers are no numbers
# The paper's run (arXiv 1912.03263, appendix A) as far as flags can say it.
PAPER = _changed(
    BASE,
    arch="wide-resnet",
    width=10,
    depth=28,
    epochs=150,
    pretrain_epochs=1,
    lr=1e-4,
    lr_floor=1.0,
    warmup_iterations=1000,
    ema_decay=0.0,
    input_noise=0.03,
    augment=1.0,
    flip_prob=0.5,
    clean_share=0.0,
    p_x_weight=1.0,
    energy_reg=0.0,
    steps=20,
    step_size=1.0,
    noise_std=0.01,
    pixel_grad_clip=0.0,
    clamp=0.0,
    buffer_size=10_000,
)
OF_DATASET = {
    "digits": DIGITS,
    "mnist": MNIST,
    "fashion-mnist": FASHION,
    "kmnist": MNIST,
    "emnist-letters": MNIST,
    "folder": MNIST,
    "cifar10": CIFAR10,
    "cifar100": CIFAR10,
    "svhn": SVHN,
}
PRESETS = {**OF_DATASET, "mnist-hour": MNIST_HOUR, "cifar10-gpu": CIFAR10_GPU, "paper": PAPER}
# Shapes of other networks than a preset's own; the paper's wide-resnet is --width 10 --depth 28.
SHAPES: dict[str, Preset] = {
    "vgg": {"width": 32, "depth": 3, "stem_stride": 1},
    "wide-resnet": {"width": 2, "depth": 10, "stem_stride": 1},
}
FRESH_STEPS = 30  # of a fresh chain by default: on the validation splits chains are best near it
