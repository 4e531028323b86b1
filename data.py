"""Data sets, held in memory as tensors; their splits; pixel scaling and its inverse; out-of-distribution sets.

A batch costs one index and no worker process. Pixels are float32 on [-1, 1] everywhere inside the project and on
[0, 1] in files that leave it.

- digits: the 1,797 real 8x8 handwritten digits that scikit-learn bundles (the test part of UCI's "Optical Recognition
  of Handwritten Digits"); they have no official split, so 360 are held out for the test and 180 for validation.
- mnist: 28x28, through torchvision; 5,000 of the 60,000 training images are held out for validation.
- fashion-mnist, kmnist, emnist-letters, svhn, cifar10, cifar100: through torchvision; a tenth of the training images, 5,000 at
  most, is held out for validation.
- folder: your own, a folder of image files for each class, below train/ and test/ or by themselves, or an .npz file of
  images and labels; without test/ a sixth of each class is held out for the test; a tenth of the rest is for validation.

The splits are drawn once with a fixed seed, stratified by class: --seed does not move them, so that runs compare.
"""

from __future__ import annotations

import functools
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import affine_grid, grid_sample, interpolate

from cli import UserError, first_line

SPLIT_SEED = 0


class Split(NamedTuple):
    """images: (N, C, H, W) float32, pixels in [-1, 1]; labels: (N,) int64."""

    images: torch.Tensor
    labels: torch.Tensor

    def to(self, device):
        """Return the split on a device."""
        return Split(self.images.to(device), self.labels.to(device))


class Dataset(NamedTuple):
    """A data set with its three splits; every image of it has the same square shape."""

    name: str
    num_classes: int
    train: Split
    val: Split
    test: Split

    @property
    def shape(self):
        """(C, H, W) of one image."""
        return tuple(self.train.images.shape[1:])


def to_model(pixels):
    """Scale pixels in [0, 1] to the model's [-1, 1]; float tensor of any shape."""
    return pixels * 2 - 1


def from_bytes(pixels):
    """Scale pixels 0..255 to the model's [-1, 1]; uint8 tensor of any shape."""
    return pixels.div(255).mul_(2).sub_(1)  # in place, for fresh memory costs more than the arithmetic


def to_unit(x):
    """Scale the model's pixels in [-1, 1] to [0, 1], clamping what a chain left outside; float tensor of any shape."""
    return ((x + 1) / 2).clamp(0, 1)


def augment(images, strength, generator=None, flip_prob=0.0):
    """Turn, zoom, shear and shift each image by amounts of its own, and mirror some.

    images: (N, C, H, W) float, pixels in [-1, 1]; what comes in from outside is background, -1, or for colour the image
    reflected. strength: >= 0; at 1 the rotation is uniform within 0.2 rad, the zoom within 10 %, the shear within 0.15 and
    each shift within a fourteenth of the side (2 pixels of 28), 0 changes nothing. flip_prob: probability that an image is
    mirrored left to right, 0..1. generator: torch.Generator on the images' device. Returns images of the same shape,
    bilinearly interpolated.
    """
    draws = (2 * torch.rand((5, len(images)), device=images.device, generator=generator) - 1) * strength
    angle, zoom, shear, right, down = draws * _largest(images.device)
    zoom = 1 + zoom
    first = torch.stack([zoom * angle.cos(), shear - zoom * angle.sin(), right], dim=1)
    second = torch.stack([zoom * angle.sin(), zoom * angle.cos(), down], dim=1)
    if flip_prob:
        mirrored = torch.rand(len(images), device=images.device, generator=generator) < flip_prob
        first = torch.where(mirrored[:, None], -first, first)
    grid = affine_grid(torch.stack([first, second], dim=1), images.shape, align_corners=False)
    if images.shape[1] == 3:
        return grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    return grid_sample(images + 1, grid, align_corners=False) - 1


@functools.cache
def _largest(device):
    """Return the largest angle, zoom, shear and shifts (half-sides) of `augment`, (5, 1), kept where a GPU needs them."""
    return torch.tensor([0.2, 0.1, 0.15, 1 / 7, 1 / 7], device=device)[:, None]


def split_off(split, size):
    """Hold out `size` images, stratified by class and with the same result every time; returns (rest, held out)."""
    from sklearn.model_selection import train_test_split

    rest, held_out = train_test_split(
        torch.arange(len(split.labels)).numpy(), test_size=size, random_state=SPLIT_SEED, stratify=split.labels.numpy()
    )
    return Split(split.images[rest], split.labels[rest]), Split(split.images[held_out], split.labels[held_out])


def load(name, data_dir, image_size=None):
    """Load a data set by its name.

    name: "digits", "mnist", "folder" or a key of TORCHVISION but omniglot. data_dir: where files lie or are downloaded to
    (mnist: MNIST/raw below it; folder: the folder itself). image_size: side in pixels that a folder's images are resized
    to; None: they must have one size.
    Raises UserError for an unknown name, for files that are damaged, and for a download that fails.
    """
    loaders = {"digits": _load_digits, "mnist": _load_mnist, "folder": functools.partial(_load_folder, image_size=image_size)}
    loaders |= {other: functools.partial(_load_torchvision, other) for other in TORCHVISION if other != "omniglot"}
    if name not in loaders:
        raise UserError(f"unknown data set {name!r}; choose from {', '.join(loaders)}")
    return loaders[name](data_dir)


def _load_digits(data_dir):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16  # the set's pixels are counts 0..16
    train, test = split_off(Split(to_model(images), torch.tensor(bunch.target)), 360)
    train, val = split_off(train, 180)
    return Dataset("digits", 10, train, val, test)


def _load_mnist(data_dir):
    splits = (*split_off(_mnist_part(data_dir, train=True), 5000), _mnist_part(data_dir, train=False))
    return Dataset("mnist", 10, *(Split(from_bytes(images), labels) for images, labels in splits))


def _load_torchvision(name, data_dir):
    parts = []
    for train in (True, False):
        part = _torchvision_part(name, data_dir, download=True, train=train)
        pixels = torch.tensor(_raw_images(part))
        pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2) if pixels.shape[3] == 3 else pixels
        labels = torch.as_tensor(np.asarray(part.labels if name == "svhn" else part.targets)).long()
        parts.append(Split(from_bytes(pixels), labels - 1 if name == "emnist-letters" else labels))
    train, test = parts
    classes = train.labels.unique().tolist()
    if classes != list(range(len(classes))) or not set(test.labels.tolist()) <= set(classes):
        raise UserError(f"the files of {name} under {str(data_dir)!r} are damaged: delete them there and run again")
    train, val = split_off(train, min(len(train.labels) // 10, 5000))
    return Dataset(name, len(classes), train, val, test)


def _load_folder(data_dir, image_size):
    root = Path(data_dir)
    splits = [_labelled_arrays(root, image_size)] if root.suffix == ".npz" else _class_folders(root, image_size)
    train, test = splits if len(splits) == 2 else _hold_out(splits[0], 6, root)
    train, val = _hold_out(train, 10, root)
    count = len(splits[0].labels.unique())
    if train.labels.bincount(minlength=count).min() < 2:
        raise UserError(f"a class under {str(root)!r} keeps fewer than two training images: add images, or remove the class")
    return Dataset("folder", count, train, val, test)


def _labelled_arrays(path, image_size):
    """Return the images and labels of an .npz as one split."""
    images = _array_file(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            labels = arrays["labels"]
    except (KeyError, ValueError):  # none there, or Python objects
        labels = np.zeros(0)
    classes = np.unique(labels) if labels.dtype.kind in "ui" else ()
    if labels.shape != (len(images),) or len(classes) < 2 or list(classes) != list(range(len(classes))):
        raise UserError(
            f"{str(path)!r} must hold 'labels', a whole number from 0 up for each of its {len(images)} images, "
            "without gaps and of two classes at least"
        )
    *channels, height, width = images.shape[1:] if images.ndim == 3 or images.shape[1] in (1, 3) else images.shape[3:0:-1]
    if height != width and not image_size:
        raise UserError(f"the images in {str(path)!r} are not square ({width}x{height}): give one size with --image-size")
    shape = (3 if channels == [3] else 1, image_size or height, image_size or width)
    return Split(_fit_shape(images, shape)[0], torch.from_numpy(labels.astype(np.int64)))


def _class_folders(root, image_size):
    """Return the images below train/ and test/, or below the folder itself, as two splits or one."""
    parts = [root / part for part in ("train", "test") if (root / part).is_dir()] if (root / "train").is_dir() else [root]
    found = [_class_files(part) for part in parts]
    classes = sorted(found[0])
    if len(classes) < 2:
        raise UserError(
            f"{str(parts[0])!r} has {len(classes)} class folders with images: two at least, one folder for each class"
        )
    if strange := sorted(set(found[-1]) - set(classes)):
        raise UserError(f"{str(parts[-1])!r} has classes that are not in train/: {', '.join(strange)}; rename or remove them")
    pictures = [[_picture(path) for name in classes for path in part.get(name, [])] for part in found]
    labels = [torch.tensor([index for index, name in enumerate(classes) for _ in part.get(name, [])]) for part in found]
    sizes = {picture.size for part in pictures for picture in part}
    if image_size:
        pictures = [
            [picture.resize((image_size, image_size), Image.Resampling.BILINEAR) for picture in part] for part in pictures
        ]
    elif len(sizes) > 1 or any(width != height for width, height in sizes):
        shown = ", ".join(f"{width}x{height}" for width, height in sorted(sizes)[:4])
        raise UserError(f"the images under {str(root)!r} are not of one square size ({shown}): give one with --image-size")
    mode = "RGB" if any(picture.mode == "RGB" for part in pictures for picture in part) else "L"
    splits = []
    for part, classes_of in zip(pictures, labels, strict=True):
        pixels = torch.from_numpy(np.stack([np.asarray(picture.convert(mode)) for picture in part]))
        pixels = pixels.unsqueeze(1) if mode == "L" else pixels.permute(0, 3, 1, 2)
        splits.append(Split(from_bytes(pixels), classes_of))
    return splits


def _class_files(folder):
    """Return {class: [image files]} of a folder's subfolders, those without images left out."""
    try:
        below = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise UserError(
            f"cannot read {str(folder)!r} ({error.strerror}): name your folder of images with --data-dir"
        ) from error
    files = {path.name: sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES) for path in below}
    return {name: paths for name, paths in files.items() if paths}


def _picture(path, mode=None):
    """Read an image file whole, as grey ("L") or colour ("RGB"), by default whichever of them it is."""
    try:
        with Image.open(path) as picture:
            return picture.convert(mode or ("L" if picture.mode in ("1", "L", "LA") else "RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{str(path)!r} cannot be read as an image: remove or replace it") from error


def _hold_out(split, share, root):
    """Hold out one of `share` images of a folder's split. Raises UserError where classes are too small for it."""
    try:
        return split_off(split, max(len(split.labels) // share, len(split.labels.unique())))
    except ValueError as error:
        raise UserError(f"the classes under {str(root)!r} are too small to hold images out of each: add images") from error


def _mnist_part(data_dir, train):
    """Load MNIST's training or test images as bytes, downloading them where they are missing."""
    from torchvision.datasets import MNIST

    raw = Path(data_dir, "MNIST", "raw")
    if not all((raw / name.removesuffix(".gz")).is_file() for name, _ in MNIST.resources):
        try:
            MNIST(data_dir, download=True)
        except (RuntimeError, OSError) as error:
            reason = first_line(error)
            raise UserError(
                f"MNIST is not under {str(data_dir)!r} and its download failed ({reason}): name the folder that holds "
                "MNIST/raw with --data-dir or SGLD_NRG_DATA, or use --dataset digits, which needs no download"
            ) from error
    try:
        part = MNIST(data_dir, train=train)
    except (RuntimeError, AssertionError, ValueError, KeyError, OSError) as error:  # what its reader raises for broken files
        raise _damaged_mnist(data_dir) from error
    count = 60000 if train else 10000
    every_class = part.targets.unique().tolist() == list(range(10))
    if part.data.shape != (count, 28, 28) or part.targets.shape != (count,) or not every_class:
        raise _damaged_mnist(data_dir)
    return Split(part.data.unsqueeze(1), part.targets)


def _damaged_mnist(data_dir):
    return UserError(
        f"the MNIST files under {str(data_dir)!r} are damaged: delete the folder MNIST there and run again to download them"
    )


# Out-of-distribution sets. Each is a tensor of images shaped like the model's, pixels in [-1, 1].

GENERATED = {
    "uniform-noise": lambda images, generator: torch.rand(images.shape, generator=generator) * 2 - 1,
    "gaussian-noise": lambda images, generator: (torch.randn(images.shape, generator=generator) / 2).clamp(-1, 1),
    "constant": lambda images, generator: (torch.rand(len(images), 1, 1, 1, generator=generator) * 2 - 1).expand_as(images),
    "interpolations": lambda images, generator: (images + images[torch.randperm(len(images), generator=generator)]) / 2,
    "rotated": lambda images, generator: images.rot90(1, (2, 3)),
    "inverted": lambda images, generator: -images,
    "permuted": lambda images, generator: permute_pixels(images, generator),
}
# name: (class in torchvision.datasets, its keyword arguments, those that name the training and the test part)
TRAIN_FLAG, SPLIT_NAME = ({"train": True}, {"train": False}), ({"split": "train"}, {"split": "test"})
TORCHVISION = {
    "fashion-mnist": ("FashionMNIST", {}, TRAIN_FLAG),
    "kmnist": ("KMNIST", {}, TRAIN_FLAG),
    "emnist-letters": ("EMNIST", {"split": "letters"}, TRAIN_FLAG),
    "omniglot": ("Omniglot", {}, ({"background": True}, {"background": False})),
    "svhn": ("SVHN", {}, SPLIT_NAME),
    "cifar10": ("CIFAR10", {}, TRAIN_FLAG),
    "cifar100": ("CIFAR100", {}, TRAIN_FLAG),
}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


def permute_pixels(images, generator):
    """Apply one random permutation to the pixels of all images (N, C, H, W)."""
    order = torch.randperm(images[0, 0].numel(), generator=generator)
    return images.flatten(2)[:, :, order].view_as(images)


def load_ood(name, images, data_dir, limit, generator, download=False):
    """Load an out-of-distribution set in the shape of a test set's images.

    name: a key of GENERATED (made from `images`), a key of TORCHVISION (test part, looked for under data_dir), or the
    path of an .npz or .npy file of images or of a folder of image files. images: (N, C, H, W) float, pixels in
    [-1, 1], of the test set. limit: images at most, drawn at random. download: fetch a missing torchvision set.
    Returns (images (n, C, H, W) float in [-1, 1], what was done to them in words). Raises UserError where the name
    means nothing, the data cannot be read, or a torchvision set is missing.
    """
    if name in GENERATED:
        made = GENERATED[name](images, generator)
        return made[torch.randperm(len(made), generator=generator)[:limit]].contiguous(), "made from the test images' shape"
    if name in TORCHVISION:
        part = _torchvision_part(name, data_dir, download)
        arrays = [part[index][0] for index in range(len(part))] if name == "omniglot" else _raw_images(part)
    elif Path(name).exists():
        arrays = _stored_images(Path(name))
    else:
        known = ", ".join([*GENERATED, *TORCHVISION])
        raise UserError(f"--ood {name!r} is neither a file, nor a folder, nor one of {known}")
    chosen = torch.randperm(len(arrays), generator=generator)[:limit].sort().values.tolist()
    return _fit_shape([arrays[index] for index in chosen], images.shape[1:])


def load_images(path, shape, limit):
    """Load the first images, `limit` at most, of an image file, a folder of them, or an .npz or .npy file.

    shape: (C, H, W) that they are brought to. Returns (n, C, H, W) float, pixels in [-1, 1]. Raises UserError where the
    path is not there or cannot be read.
    """
    if not Path(path).exists():
        raise UserError(f"there is no {path!r}: name an image, a folder of images, or an .npz or .npy file of them")
    arrays = _stored_images(Path(path))
    return _fit_shape([arrays[index] for index in range(min(limit, len(arrays)))], shape)[0]


def _stored_images(path):
    """Return a path's images, unread as long as they are files of their own."""
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in IMAGE_SUFFIXES]
        if not files:
            raise UserError(f"the folder {str(path)!r} holds no image files ({', '.join(IMAGE_SUFFIXES)})")
        return files
    return [path] if path.suffix.lower() in IMAGE_SUFFIXES else _array_file(path)


def _torchvision_part(name, data_dir, download, train=False):
    """Return a part of a torchvision data set, downloaded where it is missing. Raises UserError where it cannot be had."""
    import torchvision.datasets

    kind, settings, parts = TORCHVISION[name]
    settings, advice = {**settings, **parts[0 if train else 1]}, "" if download else ", or download it with --download"
    for fetch in (False, True) if download else (False,):
        try:
            return getattr(torchvision.datasets, kind)(data_dir, download=fetch, **settings)
        except Exception as error:  # each of them raises in its own way
            reason, cause = first_line(error), error
    raise UserError(f"{name} is not under {str(data_dir)!r} ({reason}): name its folder with --data-dir{advice}") from cause


def _raw_images(part):
    """Return the images of a torchvision data set as an array, the right way up."""
    images = np.asarray(part.data)
    turned = type(part).__name__ == "EMNIST"  # its files hold columns where MNIST's hold rows
    return images.transpose(0, 2, 1) if turned else images


def _array_file(path):
    """Return the images (N, ...) of an .npz (its `images`, or its only array) or .npy file, without unpickling anything."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            key = "images" if "images" in loaded.files else loaded.files[0] if len(loaded.files) == 1 else None
            if key is None:
                raise UserError(f"{str(path)!r} has the arrays {', '.join(loaded.files)}: call one of them 'images'")
            loaded = loaded[key]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{str(path)!r} is no .npz or .npy file of images ({error}): name another") from error
    if loaded.ndim not in (3, 4) or not len(loaded) or loaded.dtype.kind not in "uif" or not np.isfinite(loaded).all():
        raise UserError(
            f"{str(path)!r} holds {loaded.dtype} of shape {loaded.shape}: images must be finite numbers of shape "
            "(N, H, W), (N, C, H, W) or (N, H, W, C)"
        )
    if loaded.dtype != np.uint8 and not 0 <= loaded.min() <= loaded.max() <= 1:
        if loaded.min() < 0 or loaded.max() > 255:
            raise UserError(f"{str(path)!r} has pixels from {loaded.min()} to {loaded.max()}: bring them to [0, 1] or 0..255")
        loaded = loaded / 255
    return loaded


def _fit_shape(arrays, shape):
    """Bring images (arrays, PIL images or files) to a shape (C, H, W), pixels in [-1, 1]; returns them and what was done."""
    channels, height, width = shape
    done, fitted = set(), []
    for array in arrays:
        if isinstance(array, Path):
            array = np.asarray(_picture(array, "L" if channels == 1 else "RGB"))
            done.add(f"read as {'grey' if channels == 1 else 'colour'}")
        image = torch.as_tensor(np.array(array, copy=True))
        image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
        if image.ndim == 2:
            image = image.unsqueeze(0)
        elif image.shape[2] in (1, 3) and image.shape[0] not in (1, 3):
            image = image.permute(2, 0, 1)
        if image.shape[0] != channels:
            image = image.mean(0, keepdim=True).expand(channels, -1, -1)
            done.add("colour averaged to grey" if channels == 1 else "grey repeated over the channels")
        if image.shape[1:] != (height, width):
            done.add(f"resized from {image.shape[1]}x{image.shape[2]}" if len(done) < 4 else "resized from other sizes")
            image = interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0].clamp(0, 1)
        fitted.append(image)
    return to_model(torch.stack(fitted)), ", ".join(sorted(done)) or "as it is"
