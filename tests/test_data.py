"""Data sets, splits, scaling, and files that are missing or damaged."""

import os
import shutil
import urllib.error
from pathlib import Path

import pytest
import torch

import data
from cli import DATASETS, UserError

MNIST = Path(os.environ.get("SGLD_NRG_DATA", "data")) / "MNIST" / "raw"
needs_mnist = pytest.mark.skipif(not MNIST.is_dir(), reason="MNIST is not on this machine; SGLD_NRG_DATA says where it is")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def test_scaling_and_its_inverse_cancel():
    pixels = torch.linspace(0, 1, 17)
    torch.testing.assert_close(data.to_unit(data.to_model(pixels)), pixels)
    assert data.to_model(pixels).min() == -1 and data.to_model(pixels).max() == 1
    assert data.to_unit(torch.tensor([-7.0, 7.0])).tolist() == [0, 1]


def test_augmentation_moves_each_image_by_itself_within_its_bounds():
    dots = torch.full((200, 1, 28, 28), -1.0)
    dots[:, :, 13:15, 13:15] = 1.0
    moved = data.augment(dots, 1.0, torch.Generator().manual_seed(0))
    mass, axis = moved + 1, torch.arange(28.0)
    rows, columns = ((mass.sum(dim) * axis).sum(-1) / mass.sum((2, 3)) for dim in (3, 2))
    assert len(torch.stack([rows, columns]).unique()) == 400  # no two alike
    for centre in (rows, columns):
        assert 1.5 < (centre - 13.5).abs().max() < 3 and (centre - 13.5).mean().abs() < 0.5
    assert moved[:, :, 0, 0].eq(-1).all()  # background comes in from outside


def test_augmentation_of_no_strength_changes_nothing(digits):
    torch.testing.assert_close(data.augment(digits.test.images, 0.0), digits.test.images, atol=1e-5, rtol=0)


def test_digits_are_split_without_overlap_and_with_every_class(digits):
    assert [len(split.labels) for split in (digits.train, digits.val, digits.test)] == [1257, 180, 360]
    everything = torch.cat([digits.train.images, digits.val.images, digits.test.images]).flatten(1)
    assert len(everything.unique(dim=0)) == len(everything) == 1797
    for split in (digits.train, digits.val, digits.test):
        share = split.labels.bincount(minlength=10) / len(split.labels)
        assert split.images.shape[1:] == (1, 8, 8) and split.images.min() == -1 and split.images.max() == 1
        assert (share - 0.1).abs().max() < 0.01


def test_the_split_is_the_same_whatever_the_random_state(digits):
    torch.manual_seed(123)
    again = data.load("digits", "unused")
    for mine, other in zip(digits[2:], again[2:], strict=True):
        assert torch.equal(mine.images, other.images) and torch.equal(mine.labels, other.labels)


def test_every_data_set_of_the_command_line_has_a_loader():
    with pytest.raises(UserError) as caught:
        data.load("nothing", "unused")
    assert all(name in str(caught.value) for name in DATASETS)


@needs_mnist
def test_mnist_has_its_published_sizes_and_a_validation_split():
    mnist = data.load("mnist", MNIST.parent.parent)
    assert [len(split.labels) for split in (mnist.train, mnist.val, mnist.test)] == [55000, 5000, 10000]
    assert mnist.shape == (1, 28, 28)
    assert abs(data.to_unit(mnist.test.images).mean() - 0.1325) < 0.001  # the known mean of the test set's pixels


def test_missing_mnist_without_a_network_says_what_to_do(tmp_path, no_network):
    with pytest.raises(UserError, match=r"--data-dir .* --dataset digits"):
        data.load("mnist", tmp_path)


@needs_mnist
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"])
@pytest.mark.parametrize("keep", [0, 10, 5000])
def test_truncated_mnist_files_are_named_as_damaged(tmp_path, no_network, name, keep):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in MNIST.iterdir():
        if file.suffix == "":
            os.symlink(file.resolve(), raw / file.name)
    (raw / name).unlink()
    (raw / name).write_bytes((MNIST / name).read_bytes()[:keep])
    with pytest.raises(UserError, match="damaged"):
        data.load("mnist", tmp_path)
    shutil.rmtree(tmp_path)
