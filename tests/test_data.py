"""Data sets, splits, scaling, and files that are missing or damaged."""

import os
import pickle
import urllib.error
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import generator, run, write_folder

from sgld_nrg.support import data, plots
from sgld_nrg.support.augment import augment
from sgld_nrg.support.errors import UserError
from sgld_nrg.support.flags import DATASETS
from sgld_nrg.support.pixels import to_model, to_unit

MNIST = Path(os.environ.get("SGLD_NRG_DATA", "data")) / "MNIST" / "raw"
needs_mnist = pytest.mark.skipif(
    not MNIST.is_dir(), reason="MNIST is not on this machine; SGLD_NRG_DATA says where it is"
)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def test_scaling_and_its_inverse_cancel():
    pixels = torch.linspace(0, 1, 17)
    torch.testing.assert_close(to_unit(to_model(pixels)), pixels)
    assert to_model(pixels).min() == -1 and to_model(pixels).max() == 1
    assert to_unit(torch.tensor([-7.0, 7.0])).tolist() == [0, 1]


def test_augmentation_moves_each_image_by_itself_within_its_bounds():
    dots = torch.full((200, 1, 28, 28), -1.0)
    dots[:, :, 13:15, 13:15] = 1.0
    moved = augment(dots, 1.0, generator())
    mass, axis = moved + 1, torch.arange(28.0)
    rows, columns = ((mass.sum(dim) * axis).sum(-1) / mass.sum((2, 3)) for dim in (3, 2))
    assert len(torch.stack([rows, columns]).unique()) == 400  # no two alike
    for centre in (rows, columns):
        assert 1.5 < (centre - 13.5).abs().max() < 3 and (centre - 13.5).mean().abs() < 0.5
    assert moved[:, :, 0, 0].eq(-1).all()  # background comes in from outside


def test_mirrored_images_are_a_share_of_all_and_colour_is_reflected_at_the_border():
    images = torch.rand(400, 3, 8, 8) * 2 - 1
    moved = augment(images, 0.0, generator(), flip_prob=0.3)
    mirrored, same = (
        torch.isclose(moved, other, rtol=1e-5, atol=1e-5).flatten(1).all(1)
        for other in (images.flip(3), images)
    )
    assert (mirrored ^ same).all()
    assert abs(mirrored.float().mean() - 0.3) < 4 * (0.3 * 0.7 / 400) ** 0.5
    bright = torch.full((50, 3, 8, 8), 0.5)
    torch.testing.assert_close(augment(bright, 1.0, generator()), bright)
    grey = bright[:, :1]
    assert augment(grey, 1.0, generator()).min() < 0  # background comes in


def test_augmentation_of_no_strength_changes_nothing(digits):
    images = digits.test.images
    torch.testing.assert_close(augment(images, 0.0), images, atol=1e-5, rtol=0)


def test_digits_are_split_without_overlap_and_with_every_class(digits):
    splits = (digits.train, digits.val, digits.test)
    assert [len(split.labels) for split in splits] == [1257, 180, 360]
    everything = torch.cat([split.images for split in splits]).flatten(1)
    assert len(everything.unique(dim=0)) == len(everything) == 1797
    for split in splits:
        share = split.labels.bincount(minlength=10) / len(split.labels)
        assert split.images.shape[1:] == (1, 8, 8)
        assert split.images.min() == -1 and split.images.max() == 1
        assert (share - 0.1).abs().max() < 0.01


def test_the_split_is_the_same_whatever_the_random_state(digits):
    torch.manual_seed(123)
    again = data.load("digits", "unused")
    for mine, other in zip(digits[-3:], again[-3:], strict=True):
        assert torch.equal(mine.images, other.images) and torch.equal(mine.labels, other.labels)


def test_every_data_set_of_the_command_line_has_a_loader():
    with pytest.raises(UserError) as caught:
        data.load("nothing", "unused")
    assert all(name in str(caught.value) for name in DATASETS)


@needs_mnist
def test_mnist_has_its_published_sizes_and_a_validation_split():
    mnist = data.load("mnist", MNIST.parent.parent)
    assert [len(split.labels) for split in mnist[-3:]] == [55000, 5000, 10000]
    assert mnist.shape == (1, 28, 28)
    # the known mean of the test set's pixels
    assert abs(to_unit(mnist.test.images).mean() - 0.1325) < 0.001


def test_missing_mnist_without_a_network_says_what_to_do(tmp_path, no_network):
    with pytest.raises(UserError, match=r"--data-dir .* --dataset digits"):
        data.load("mnist", tmp_path)


@needs_mnist
@pytest.mark.parametrize(
    "name", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"]
)
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


def test_a_folder_for_each_class_is_a_data_set(tmp_path):
    write_folder(tmp_path / "mine", {"ant": 30, "bee": 60, "çapybara": 90})
    dataset = data.load("folder", tmp_path / "mine")
    assert dataset.num_classes == 3 and dataset.shape == (1, 8, 8)
    assert [len(split.labels) for split in dataset[-3:]] == [135, 15, 30]
    for split in dataset[-3:]:
        greys = (to_unit(split.images[:, 0, 0, 0]) * 255).round().long()
        assert torch.equal(greys - 1, split.labels)
        shares = 6 * split.labels.bincount() / len(split.labels)
        assert (shares - torch.tensor([1, 2, 3])).abs().max() < 0.3
    again = data.load("folder", tmp_path / "mine")
    assert torch.equal(dataset.test.labels, again.test.labels)


def test_a_folder_with_train_and_test_keeps_them_apart_and_colour_stays(tmp_path):
    write_folder(tmp_path / "train", {"a": 40, "b": 40}, mode="RGB")
    write_folder(tmp_path / "test", {"a": 3, "b": 5}, mode="RGB")
    dataset = data.load("folder", tmp_path)
    assert dataset.shape == (3, 8, 8) and dataset.test.labels.tolist() == [0] * 3 + [1] * 5
    assert [len(split.labels) for split in dataset[-3:]] == [72, 8, 8]


def test_a_folder_of_unequal_images_is_resized_on_request(tmp_path):
    write_folder(tmp_path / "a", {"x": 20}, side=9)
    write_folder(tmp_path / "b", {"x": 20}, side=12)
    for label in "ab":
        for path in (tmp_path / label / "x").iterdir():
            path.rename(tmp_path / label / path.name)
        (tmp_path / label / "x").rmdir()
    with pytest.raises(UserError, match="--image-size"):
        data.load("folder", tmp_path)
    assert data.load("folder", tmp_path, 10).shape == (1, 10, 10)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3), (3, 8, 8)])
def test_a_file_of_images_and_labels_is_a_data_set(tmp_path, shape):
    images = np.random.default_rng(0).integers(0, 256, (120, *shape), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", images=images, labels=np.arange(120, dtype=np.uint8) % 3)
    dataset = data.load("folder", tmp_path / "mine.npz")
    assert dataset.num_classes == 3 and dataset.shape == (3 if 3 in shape else 1, 8, 8)
    assert [len(split.labels) for split in dataset[-3:]] == [90, 10, 20]
    stored = torch.from_numpy(images).float() / 127.5 - 1
    if len(shape) == 2:
        stored = stored.unsqueeze(1)
    elif shape[2] == 3:
        stored = stored.permute(0, 3, 1, 2)
    for x, label in zip(dataset.test.images, dataset.test.labels, strict=True):
        same = (stored - x).abs().flatten(1).amax(1) < 1e-5
        assert same.sum() == 1 and same.nonzero().item() % 3 == label
    assert data.load("folder", tmp_path / "mine.npz", 6).shape[1:] == (6, 6)


@pytest.fixture(params=["undrawn", pytest.param("drawn", marks=pytest.mark.slow)])
def figures(request, monkeypatch):
    """Draw the figures or, for speed, draw none but the grids of images."""
    if request.param == "undrawn":
        for name in dir(plots):
            if name.startswith("save_") and name != "save_grid":
                monkeypatch.setattr(plots, name, Mock())


def test_a_folder_trains_samples_and_is_evaluated(tmp_path, figures):
    pictures, out = tmp_path / "mine", tmp_path / "run"
    write_folder(pictures, {"a": 60, "b": 60, "c": 60}, mode="RGB", side=12)
    flags = "--dataset folder --image-size 8 --width 4 --depth 1 --batch-size 16 --epochs 1"
    chains = "--pretrain-epochs 1 --buffer-size 100 --long-chains 20 --first-steps 1 --steps 2"
    run("train_jem", *flags.split(), *chains.split(), "--data-dir", pictures, "--out-dir", out)
    checkpoint = ("--checkpoint", out / "jem.pt")
    run("sample", *checkpoint, "--num", 4, "--steps", 2, "--class-label", 0, 2)
    run("evaluate", *checkpoint, "--data-dir", pictures, "--dry-run")
    assert (out / "samples-fresh-class-0-2.png").exists()


def write_idx(raw, stem, pictures, labels):
    raw.mkdir(parents=True, exist_ok=True)
    header = np.array([2051, *pictures.shape], ">i4").tobytes()
    (raw / f"{stem}-images-idx3-ubyte").write_bytes(header + pictures.tobytes())
    header = np.array([2049, len(labels)], ">i4").tobytes()
    (raw / f"{stem}-labels-idx1-ubyte").write_bytes(header + bytes(labels))


@pytest.mark.parametrize(
    "name, folder, first",
    [
        ("fashion-mnist", "FashionMNIST", 0),
        ("kmnist", "KMNIST", 0),
        ("emnist-letters", "EMNIST", 1),
    ],
)
def test_mnists_kin_are_read_with_their_labels_and_the_right_way_up(tmp_path, name, folder, first):
    labels = [first + number % 10 for number in range(200)]
    picture = np.zeros((200, 28, 28), np.uint8)
    picture[:, :7] = 255  # a bar at the top
    stored, stems = picture, ("train", "t10k")
    if folder == "EMNIST":
        stored = picture.transpose(0, 2, 1).copy()
        stems = ("emnist-letters-train", "emnist-letters-test")
    for stem in stems:
        write_idx(tmp_path / folder / "raw", stem, stored, labels)
    dataset = data.load(name, tmp_path)
    assert (dataset.num_classes, dataset.shape) == (10, (1, 28, 28))
    assert [len(split.labels) for split in dataset[-3:]] == [180, 20, 200]
    assert dataset.test.labels.tolist() == [number % 10 for number in range(200)]
    assert dataset.test.images[:, :, :7].min() == 1 and dataset.test.images[:, :, 7:].max() == -1


@pytest.mark.parametrize("name, classes", [("cifar10", 10), ("cifar100", 100)])
def test_cifar_is_read_with_its_labels_and_colours(tmp_path, monkeypatch, name, classes):
    from torchvision.datasets import CIFAR10, CIFAR100, cifar

    # the files are not the real ones
    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)
    kind = CIFAR10 if name == "cifar10" else CIFAR100
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    labels = [number % classes for number in range(20 * classes)]
    pixels = np.zeros((len(labels), 3, 1024), np.uint8)
    pixels[:, 0] = 255  # red
    key = "labels" if name == "cifar10" else "fine_labels"
    batch = {"data": pixels.reshape(len(labels), -1), key: labels}
    for file, _ in (*kind.train_list, *kind.test_list):
        (folder / file).write_bytes(pickle.dumps(batch))
    names = {kind.meta["key"]: list(map(str, range(classes)))}
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps(names))
    dataset = data.load(name, tmp_path)
    assert (dataset.num_classes, dataset.shape) == (classes, (3, 32, 32))
    assert dataset.test.labels.tolist() == labels
    assert dataset.train.images[:, 0].min() == 1 and dataset.train.images[:, 1:].max() == -1


def test_svhn_is_read_with_its_labels_and_colours(tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision.datasets import svhn

    monkeypatch.setattr(svhn, "check_integrity", lambda *_: True)
    # its zeros are tens
    labels = np.array([number % 10 or 10 for number in range(200)], np.uint8)[:, None]
    pixels = np.zeros((32, 32, 3, 200), np.uint8)
    pixels[:, :, 2] = 255  # blue
    for part in ("train", "test"):
        savemat(tmp_path / f"{part}_32x32.mat", {"X": pixels, "y": labels})
    dataset = data.load("svhn", tmp_path)
    assert (dataset.num_classes, dataset.shape) == (10, (3, 32, 32))
    assert dataset.test.labels.tolist() == [number % 10 for number in range(200)]
    assert dataset.train.images[:, 2].min() == 1 and dataset.train.images[:, :2].max() == -1


@pytest.mark.parametrize("name", ["fashion-mnist", "svhn", "cifar100"])
def test_a_set_that_cannot_be_downloaded_says_what_to_do(tmp_path, no_network, name):
    with pytest.raises(UserError, match=rf"{name} is not under .*--data-dir"):
        data.load(name, tmp_path)
