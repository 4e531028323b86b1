"""Batch normalisation: in the classifier's training, and in nothing that is kept."""

import pytest
import torch
from conftest import generator, run
from torch import nn

from sgld_nrg.models import build_model, load_model, predict
from sgld_nrg.support.batch_norm import add_batch_norm, folded
from sgld_nrg.support.checkpoints import load_checkpoint
from sgld_nrg.support.schedule import MovingAverage

CONFIGS = {
    "small-cnn": {"width": 4, "depth": 2},
    "small-cnn, strided": {"width": 4, "depth": 1, "stem_stride": 4},
    "vgg": {"width": 4, "depth": 2},
    "wide-resnet": {"width": 1, "depth": 10},
}


def normalised(name):
    torch.manual_seed(0)
    network = build_model(name.split(",")[0], 5, 3, 16, **CONFIGS[name])
    plain = list(network.state_dict())
    add_batch_norm(network)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight, 1, 0.5)
            nn.init.normal_(part.bias)
    return network, plain


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folded_network_does_what_the_normalised_one_does_in_eval_mode(name):
    network, plain = normalised(name)
    images = 3 * torch.randn(64, 3, 16, 16, generator=generator()) + 1
    for _ in range(5):
        network(images)  # moves the running statistics
    with torch.no_grad():
        as_trained = network(images)
    result = folded(network)
    assert list(result.state_dict()) == plain and result.training and network.training
    torch.testing.assert_close(predict(result, images), predict(network, images))
    assert (as_trained - predict(result, images)).abs().max() > 0.1  # the batch's own statistics


def test_the_average_follows_the_running_statistics():
    network, _ = normalised("vgg")
    average = MovingAverage(network, 0.5)
    images = torch.randn(8, 3, 16, 16, generator=generator())
    seen = []
    for _ in range(2):
        network(images)
        seen.append(network.features[0][1].running_mean.clone())
        average.update(network)
    decay = 2 / 11  # of the second update, which is below 0.5
    wanted = decay * seen[0] + (1 - decay) * seen[1]
    torch.testing.assert_close(average.module.features[0][1].running_mean, wanted)


@pytest.mark.parametrize("ema_decay", [0, 0.9])
def test_a_classifier_trained_with_it_is_kept_without_it_and_a_jem_starts_there(
    tmp_path, capsys, no_curves, ema_decay
):
    flags = ["--arch", "vgg", "--width", 8, "--depth", 2, "--batch-norm", "--out-dir", tmp_path]
    flags += ["--buffer-size", 100, "--epochs", 1, "--ema-decay", ema_decay]
    run("train_jem", *flags, "--pretrain-epochs", 4)
    classifier = load_checkpoint(tmp_path / "classifier.pt", "classifier")
    model = load_model(classifier)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in model.modules())
    said = capsys.readouterr().out
    assert float(said.split("test accuracy:")[1].split("%")[0]) > 60
    assert load_checkpoint(tmp_path / "jem.pt", "jem")["model"].keys() == classifier["model"].keys()


def test_a_training_with_it_goes_on_where_it_was_stopped(tmp_path, no_curves):
    flags = ["--arch", "vgg", "--width", 4, "--depth", 2, "--batch-norm"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run("train_classifier", *flags, "--epochs", 2, "--lr-floor", 1, "--out-dir", whole)
    run("train_classifier", *flags, "--epochs", 1, "--lr-floor", 1, "--out-dir", parts)
    run("train_classifier", "--resume", "--epochs", 2, "--out-dir", parts)
    ends = [load_checkpoint(folder / "classifier.pt", "classifier") for folder in (whole, parts)]
    for name, value in ends[0]["training"]["model"].items():
        assert torch.equal(value, ends[1]["training"]["model"][name]), name
    for name, value in ends[0]["model"].items():
        assert torch.equal(value, ends[1]["model"][name]), name
