"""Folders of classes and labels in arrays: read as they are meant, or refused in a sentence."""

import itertools
import os
import unicodedata
import zipfile

import numpy as np
import pytest
import torch
from conftest import write_folder
from PIL import Image

from sgld_nrg import sample
from sgld_nrg.support import data
from sgld_nrg.support.commands import parse
from sgld_nrg.support.errors import UserError
from sgld_nrg.support.pixels import to_unit
from sgld_nrg.support.report.detection import ood_sets

COUNT = 60
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8), dtype=np.uint8)
THREE = np.arange(COUNT) % 3


def sizes(*names, count=20):
    return dict.fromkeys(names, count)


def greys(split):
    """Return the grey of each picture that write_folder wrote."""
    return (to_unit(split.images[:, 0, 0, 0]) * 255).round().long().tolist()


def refusal(root, *rest):
    """Return the sentence that a data set is refused with."""
    with pytest.raises(UserError) as caught:
        data.load("folder", root, *rest)
    sentence = str(caught.value)
    assert sentence and "\n" not in sentence
    return sentence


NUMBERS = [str(number) for number in range(12)]


@pytest.mark.parametrize(
    "names",
    [
        NUMBERS,
        ["3", "5", "10"],
        ["class9", "class10", "class11"],
        ["a", "a2", "a10", "b1"],
        ["001", "01", "1", "2"],
        ["2", "²", "②"],  # digits that are no decimal ones
        ["1 x 9", "1 x 10", "2 x 1"],
    ],
)
def test_numbers_in_the_names_of_classes_sort_as_numbers(tmp_path, names):
    write_folder(tmp_path / "mine", sizes(*names))
    dataset = data.load("folder", tmp_path / "mine")
    assert list(dataset.classes) == dataset.origin["classes"] == names
    for split in dataset[-3:]:
        assert [grey - 1 for grey in greys(split)] == split.labels.tolist()
    labels = np.array(names[::-1])[np.arange(COUNT) % len(names)]
    np.savez(tmp_path / "mine.npz", images=IMAGES, labels=labels)
    assert list(data.load("folder", tmp_path / "mine.npz").classes) == names


@pytest.mark.parametrize(
    "names, words, labels",
    [
        (NUMBERS, "2 10", [2, 10]),
        (["3", "5", "10"], "10 3", [2, 0]),
        (["3", "5", "10"], "2", "--class-label 2: the model has the classes"),
        (["3", "5", "10"], "0", "--class-label 0: the model has the classes"),
        (["ant", "bee", "3"], "2", "--class-label 2: the model has the classes"),
        (["ant", "bee", "3"], "3", [2]),
        (["ant", "golden bee"], "'golden bee' ant", [1, 0]),
        (["ant", "bee"], "1", [1]),
        (["ant", "bee"], "Ant", "the model has the classes 0 ant, 1 bee"),
        (["ant", "bee"], "2", "the model has the classes 0 ant, 1 bee"),
        (["ant", "bee"], "-1", "the model has the classes 0 ant, 1 bee"),
        (NUMBERS, "12", "the model has the classes 0 to 11"),
        (NUMBERS, "02", "the model has the classes 0 to 11"),
        (None, "9", [9]),  # a checkpoint of version 0.1.0
        (None, "10", "the model has the classes 0 to 9"),
    ],
)
def test_a_class_is_asked_for_by_its_name_or_by_its_number_if_no_name_is_one(names, words, labels):
    checkpoint = {"model_config": {"num_classes": len(names or NUMBERS[:10])}, "conditional": True}
    if names:
        checkpoint["origin"] = {"classes": names}
    args = parse("sample", ["--class-label", *words.replace("'golden bee'", "golden_bee").split()])
    args.class_label = [word.replace("_", " ") for word in args.class_label]
    if isinstance(labels, str):
        with pytest.raises(UserError) as caught:
            sample.check_against_checkpoint(args, checkpoint)
        assert labels in str(caught.value)
    else:
        sample.check_against_checkpoint(args, checkpoint)
        assert args.class_label == labels


@pytest.mark.parametrize("flag", ["--mixture", "--interpolate"])
def test_names_stand_for_classes_wherever_classes_are_asked_for(flag):
    checkpoint = {"model_config": {"num_classes": 3}, "origin": {"classes": ["3", "5", "10"]}}
    args = parse("sample", [flag, "10", "5"])
    sample.check_against_checkpoint(args, checkpoint)
    assert getattr(args, flag.removeprefix("--")) == [2, 1]
    with pytest.raises(UserError, match=f"{flag} 1: the model has"):
        sample.check_against_checkpoint(parse("sample", [flag, "10", "1"]), checkpoint)


def test_hidden_folders_are_no_classes_and_what_is_left_out_is_told(tmp_path, capsys):
    write_folder(tmp_path, sizes("ant", "bee", ".ipynb_checkpoints", "__MACOSX"))
    write_folder(tmp_path / "ant", sizes(".ipynb_checkpoints", count=3))
    (tmp_path / "bee" / "IMG.heic").write_bytes(b"")
    (tmp_path / "bee" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "labels.csv").write_text("")
    Image.new("L", (8, 8)).save(tmp_path / "stray.png")
    dataset = data.load("folder", tmp_path)
    assert dataset.classes == ("ant", "bee") and dataset.shape == (1, 8, 8)
    out = capsys.readouterr().out
    assert f"{tmp_path}: 40 images (grey; 8x8) as 1x8x8; ant 20, bee 20" in out
    skipped = out.splitlines()[-1]
    assert skipped.startswith("skipped: .ipynb_checkpoints (hidden), __MACOSX (hidden), ")
    assert "3 other files in ant (hidden), 2 other files in bee (.heic, links)" in skipped
    assert "and 1 more" in skipped  # five are told


def test_the_pictures_of_a_class_may_have_any_known_format_and_lie_deeper(tmp_path):
    formats = {"jfif": "JPEG", "pgm": "PPM", "ppm": "PPM", "JPG": "JPEG", "tif": "TIFF"}
    formats |= {"bmp": "BMP", "webp": "WEBP", "gif": "GIF"}
    for number, (name, suffix) in enumerate(itertools.product("ab", formats)):
        for where in ("", "monday/morning"):
            folder = tmp_path / name / where
            folder.mkdir(parents=True, exist_ok=True)
            mode = "RGB" if suffix == "ppm" else "L"
            picture = Image.new(mode, (8, 8))
            picture.paste(Image.new("L", (4, 4), number))
            picture.save(folder / f"x.{suffix}", formats[suffix])
    dataset = data.load("folder", tmp_path)
    assert sum(len(split.labels) for split in dataset[-3:]) == 2 * 2 * len(formats)


@pytest.mark.parametrize(
    "train, val, test",
    [
        ("train", "val", "test"),
        ("train", "valid", "test"),
        ("train", "validation", "TEST"),
        ("Train", "Val", "Test"),
        ("training", "val", "testing"),
        ("training_set", "val", "test_set"),
    ],
)
def test_the_folders_of_the_splits_are_used_under_each_of_their_names(
    tmp_path, train, val, test, capsys
):
    write_folder(tmp_path / train, sizes("ant", "bee", count=12))
    write_folder(tmp_path / val, sizes("ant", "bee", count=3))
    write_folder(tmp_path / test, {"ant": 4, "bee": 5})
    write_folder(tmp_path / "unlabelled", sizes("x", count=2))
    dataset = data.load("folder", tmp_path)
    assert [len(split.labels) for split in dataset[-3:]] == [24, 6, 9]
    assert dataset.test.labels.tolist() == [0] * 4 + [1] * 5
    out = capsys.readouterr().out
    for name, told in ((train, "ant 12, bee 12"), (val, "ant 3, bee 3"), (test, "ant 4, bee 5")):
        assert any(f"{tmp_path / name}: " in line and told in line for line in out.splitlines())
    assert f"skipped: unlabelled (beside {train}/)" in out


def test_validation_images_are_held_out_of_the_training_images_if_they_have_no_folder(tmp_path):
    write_folder(tmp_path / "train", sizes("ant", "bee"))
    write_folder(tmp_path / "test", sizes("ant", "bee", count=5))
    dataset = data.load("folder", tmp_path)
    assert [len(split.labels) for split in dataset[-3:]] == [36, 4, 10]


@pytest.mark.parametrize(
    "layout, says",
    [
        ({"": "ant bee", "c/": ""}, "class folder '{root}/c' holds no image files: add images"),
        ({"": "ant bee", "c/x.heic": ""}, "c' holds no image files, only others (.heic)"),
        ({"": "ant bee", "c/.hidden/x.png": ""}, "c' holds no image files, only others (hidden)"),
        ({"": "ant"}, "'{root}' has 1 class folders with images (ant): two at least"),
        ({"data": "ant bee"}, "'{root}' has 1 class folders with images (data): two at least"),
        ({"data/train": "ant bee"}, "'{root}' has 1 class folders with images (data)"),
        ({"none/": ""}, "class folder '{root}/none' holds no image files"),
        ({"x.txt": ""}, "'{root}' has 0 class folders with images (none)"),
        ({"1.png": ""}, "'{root}' has 1 images and no class folders"),
        ({"": "ant bee test"}, "'{root}' has test/ but no train/"),
        ({"val": "ant bee", "test": "ant bee"}, "'{root}' has test/ but no train/"),
        ({"train": "a b", "Training": "a b"}, "has both Training/ and train/"),
        ({"train": "a b", "val": "a b", "valid": "a b"}, "has both val/ and valid/"),
        ({"train": "a b", "test": "a b", "testing": "a b"}, "has both test/ and testing/"),
        ({"train": "a b", "test/1.png": ""}, "'{root}/test' has 1 images and no class folders"),
        ({"train": "a b", "val/1.png": ""}, "'{root}/val' has 1 images and no class folders"),
        ({"train": "a b", "test/": ""}, "'{root}/test' holds no class folders"),
        ({"train": "a b", "test/x.csv": ""}, "'{root}/test' holds no class folders"),
        ({"train": "a b", "test": "a b c"}, "'{root}/test' has classes that are not in train/: c"),
        ({"train": "a b", "val": "a B"}, "'{root}/val' has classes that are not in train/: B"),
        ({"train": "a b", "test": "a b", "test/c/": ""}, "'{root}/test/c' holds no image files"),
        ({"train": "a", "test": "a b"}, "'{root}/train' has 1 class folders with images (a)"),
        ({"train/1.png": "", "test": "a b"}, "'{root}/train' has 1 images and no class folders"),
    ],
)
def test_a_folder_that_may_mean_something_else_is_refused_with_what_was_found(
    tmp_path, layout, says
):
    root = tmp_path / "mine"
    for place, names in layout.items():
        if names:
            write_folder(root / place, sizes(*names.split(), count=12))
        elif place.endswith("/"):
            (root / place).mkdir(parents=True)
        else:
            (root / place).parent.mkdir(parents=True, exist_ok=True)
            (root / place).write_bytes(b"")
    assert says.format(root=root) in refusal(root)


@pytest.mark.parametrize(
    "name, says",
    [
        ("nowhere", "there is no folder"),
        ("pictures.zip", "is neither a folder nor an .npz file"),
        ("images.npy", "is neither a folder nor an .npz file"),
        ("folder.npz", "is no .npz or .npy file of images"),
    ],
)
def test_a_path_that_is_no_data_set_is_refused(tmp_path, name, says):
    (tmp_path / "pictures.zip").write_bytes(b"PK")
    np.save(tmp_path / "images.npy", IMAGES)
    (tmp_path / "folder.npz").mkdir()
    sentence = refusal(tmp_path / name)
    assert says in sentence and name in sentence


def test_names_are_the_same_on_every_file_system_and_can_be_printed(tmp_path):
    composed, apart = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    try:
        write_folder(tmp_path / "train", sizes(apart, os.fsdecode(b"caf\xe9")))
        write_folder(tmp_path / "test", sizes(composed, os.fsdecode(b"caf\xe9"), count=3))
    except (OSError, UnicodeError):
        pytest.skip("this file system takes no such names")
    dataset = data.load("folder", tmp_path)
    assert dataset.classes == ("caf\\xe9", composed)
    assert " ".join(dataset.classes).encode()  # so that they can be printed
    write_folder(tmp_path / "train", sizes(composed))
    if len(os.listdir(tmp_path / "train")) == 3:  # to some file systems the two are one
        assert "two folders" in refusal(tmp_path)


def one_hot(labels, classes=3):
    return np.eye(classes)[labels]


@pytest.mark.parametrize(
    "labels, names",
    [
        (THREE, "0 1 2"),
        (THREE.astype(np.uint8), "0 1 2"),
        (THREE.astype(np.float32), "0 1 2"),
        (THREE[:, None], "0 1 2"),
        (THREE[:, None].astype(float), "0 1 2"),
        (one_hot(THREE), "0 1 2"),
        (one_hot(THREE).astype(bool), "0 1 2"),
        (one_hot(THREE).astype(np.uint8), "0 1 2"),
        (np.array(["ant", "bee", "cat"])[THREE], "ant bee cat"),
        (np.array(["ant", "bee", "cat"])[THREE][:, None], "ant bee cat"),
        (np.array([b"ant", b"bee", "çat".encode()])[THREE], "ant bee çat"),
        (np.array(["9", "10", "11"])[THREE], "9 10 11"),
    ],
)
def test_labels_of_every_kind_that_has_one_meaning_are_read(tmp_path, labels, names):
    np.savez(tmp_path / "mine.NPZ.npz", images=IMAGES, labels=labels)
    path = (tmp_path / "mine.NPZ.npz").rename(tmp_path / "mine.NPZ")
    dataset = data.load("folder", path)
    assert dataset.classes == tuple(names.split())
    stored = torch.from_numpy(IMAGES).float() / 127.5 - 1
    for split in dataset[-3:]:
        for image, label in zip(split.images[:, 0], split.labels.tolist(), strict=True):
            (row,) = ((stored - image).abs().flatten(1).amax(1) < 1e-5).nonzero().flatten().tolist()
            assert THREE[row] == label


def test_true_and_false_are_two_classes(tmp_path):
    np.savez(tmp_path / "mine.npz", images=IMAGES, labels=THREE > 0)
    assert data.load("folder", tmp_path / "mine.npz").test.labels.float().mean() > 0.5


ODD_ONE = np.arange(COUNT) == 7


@pytest.mark.parametrize(
    "labels, says",
    [
        (None, "holds images and no array 'labels': add it"),
        (np.array(["ant", 1, None] * 20, object), "are Python objects"),
        (THREE[:40], "are int64 of shape (40,): one for each of the 60 images is wanted"),
        (np.arange(61) % 3, "are int64 of shape (61,): one for each of the 60 images is wanted"),
        (THREE[None], "are int64 of shape (1, 60): one for each"),
        (np.stack([THREE, THREE], 1), "are int64 of shape (60, 2): one for each"),
        (one_hot(THREE) * 0.9, "are float64 of shape (60, 3): one for each"),
        (np.array(3), "are int64 of shape (): one for each"),
        (2 * THREE, "from 0 to 4, but no image has the label 1"),
        (THREE + 1, "from 1 to 3, but no image has the label 0"),
        (one_hot(THREE, 5), "from 0 to 4, but no image has the label 3"),
        (one_hot(2 * THREE, 5), "from 0 to 4, but no image has the label 1"),
        (np.where(ODD_ONE, 2.0**63, THREE), "to 9.22337e+18, but no image has the label 3"),
        (np.where(ODD_ONE, 2**63 + 1, THREE.astype(np.uint64)), "no image has the label 3"),
        (THREE - 1, "and -1 is among them: they are to begin at 0"),
        (np.where(ODD_ONE, -1, THREE), "and -1 is among them: they are to begin at 0"),
        (0 * THREE, "all 0: two classes at least are wanted"),
        (0 * THREE + 5, "all 5: two classes at least are wanted"),
        (THREE > 5, "are bool of shape (60,), all 0: two classes"),
        (np.array(["ant"] * COUNT), "all 'ant': two classes at least are wanted"),
        (THREE / 2, "and 0.5 is among them: whole numbers are wanted"),
        (np.where(ODD_ONE, np.nan, THREE), "and nan is among them: whole numbers are wanted"),
        (np.where(ODD_ONE, np.inf, THREE), "and inf is among them: whole numbers are wanted"),
        (np.array(["", "ant", "bee"])[THREE], "and one of them is blank"),
        (THREE.astype(complex), "are complex128 of shape (60,): whole numbers from 0 up, or names"),
        (THREE.astype("M8[D]"), "are datetime64[D] of shape (60,): whole numbers from 0 up"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_each_mistake_in_the_labels_has_a_sentence_that_says_what_was_found(tmp_path, labels, says):
    arrays = {"images": IMAGES} if labels is None else {"images": IMAGES, "labels": labels}
    np.savez(tmp_path / "mine.npz", **arrays)
    sentence = refusal(tmp_path / "mine.npz")
    assert says in sentence and str(tmp_path / "mine.npz") in sentence


@pytest.mark.parametrize("part", ["images", "labels"])
@pytest.mark.parametrize("damage", ["flipped", "squeezed and flipped", "cut short", "text"])
def test_a_damaged_file_of_arrays_is_refused_by_name(tmp_path, part, damage):
    path = tmp_path / "mine.npz"
    write = np.savez_compressed if "squeezed" in damage else np.savez
    write(path, images=IMAGES, labels=THREE)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
        start = archive.getinfo(f"{part}.npy").header_offset
    if "flipped" in damage:
        content = bytearray(path.read_bytes())
        content[start + 80 : start + 90] = bytes(10)
        path.write_bytes(content)
    else:
        members[f"{part}.npy"] = members[f"{part}.npy"][:60] if damage == "cut short" else b"0\n1\n"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    sentence = refusal(path)
    assert str(path) in sentence and f"no .npz or .npy file of {part}" in sentence


def test_an_array_without_a_name_has_no_labels(tmp_path):
    with (tmp_path / "mine.npz").open("wb") as file:
        np.save(file, IMAGES)
    assert "holds nothing with a name and no array 'labels'" in refusal(tmp_path / "mine.npz")
    np.savez(tmp_path / "mine.npz", x=IMAGES, y=THREE)
    assert "holds x, y and no array 'images'" in refusal(tmp_path / "mine.npz")


def test_what_was_read_of_an_array_is_told(tmp_path, capsys):
    images = np.repeat(IMAGES[..., None], 3, axis=3)
    np.savez(tmp_path / "mine.npz", images=images, labels=np.array(["ant", "bee"])[THREE // 2])
    data.load("folder", tmp_path / "mine.npz", 6)
    told = "60 images (colour, 8x8, uint8 from 0 to 255) as 3x6x6; ant 40, bee 20"
    assert capsys.readouterr().out == f"{tmp_path / 'mine.npz'}: {told}\n"


def found_sets(dataset, *names):
    args = parse("evaluate", ["--ood", *map(str, names)])
    return ood_sets(dataset, args, 100, torch.device("cpu"))


def test_two_sets_of_one_file_name_are_told_apart_by_their_paths(digits, tmp_path):
    paths = [tmp_path / name / "set.npy" for name in "ab"]
    for value, path in enumerate(paths):
        path.parent.mkdir()
        np.save(path, np.full((5, 8, 8), 100 + value, np.uint8))
    other = tmp_path / "inverted.npy"
    np.save(other, np.full((5, 8, 8), 90, np.uint8))
    sets, described, _ = found_sets(digits, *paths, other, "inverted")
    assert list(sets) == list(described) == [*map(str, paths), str(other), "inverted"]
    assert [int((to_unit(sets[str(path)]) * 255).round().mean()) for path in paths] == [100, 101]
    assert list(found_sets(digits, paths[0])[0]) == ["set"]
    with pytest.raises(UserError, match=r"--ood names '.*set\.npy' twice"):
        found_sets(digits, paths[0], paths[1], paths[0])
