"""A checkpoint knows its data: names, place and fingerprint are kept, other data are refused."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run, write_folder
from PIL import Image

from sgld_nrg.support import data, plots
from sgld_nrg.support.checkpoints import load_checkpoint
from sgld_nrg.support.commands import SHIPPED, parse
from sgld_nrg.support.errors import UserError
from sgld_nrg.support.flags import DATA_DIR
from sgld_nrg.support.origin import check_same_data, class_names, data_dir_of, dataset_of
from sgld_nrg.support.reading import Reading
from sgld_nrg.support.report import study

pytestmark = pytest.mark.usefixtures("no_curves")

NAMES = ["ant", "golden bee", "10"]
SMALL = "--width 4 --depth 1 --batch-size 16 --epochs 1 --buffer-size 100 --long-chains 20"
SMALL = [*SMALL.split(), "--steps", 2]
PRETRAINED = [*SMALL, "--pretrain-epochs", 1]
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of a user's: the pictures in mine, the run in run. Not to be written to."""
    root = tmp_path_factory.mktemp("origin")
    write_folder(root / "mine", dict.fromkeys(NAMES, 30))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save_curves", lambda rows, path: None)
        patch.chdir(root)
        flags = ("--dataset", "folder", "--data-dir", "mine", "--out-dir", "run")
        run("train_jem", *PRETRAINED, *flags)
    return root


@pytest.fixture
def place(trained, tmp_path):
    """A copy of the pictures and the run that may be changed; the checkpoint names the former."""
    shutil.copytree(trained, tmp_path / "place")
    return tmp_path / "place"


def refused(capsys, script, *flags):
    """Run a script that refuses its flags; returns its sentence."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(script, *flags)
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
    return message


def sampled(folder, *flags):
    checkpoint = ("--checkpoint", folder / "run" / "jem.pt", "--out-dir", folder / "drawn")
    run("sample", *checkpoint, "--num", 4, "--steps", 1, *flags)


def test_both_checkpoints_hold_the_names_the_place_and_what_was_in_each_split(trained):
    dataset = data.load("folder", trained / "mine")
    for phase in ("classifier", "jem"):
        checkpoint = load_checkpoint(trained / "run" / f"{phase}.pt", phase)
        assert checkpoint["origin"] == dataset.origin
        assert class_names(checkpoint) == ["10", "ant", "golden bee"] == list(dataset.classes)
        assert checkpoint["origin"]["data_dir"] == str((trained / "mine").resolve())
        told = [checkpoint["origin"]["fingerprint"][split] for split in SPLITS]
        for split, words in zip(dataset[-3:], told, strict=True):
            assert words.startswith(f"{len(split.labels)} images, ")


def test_the_names_of_the_classes_stand_under_their_rows(place, capsys):
    sampled(place, "--class-label", "golden bee", "10")
    with Image.open(place / "drawn" / "samples-fresh-class-2-0.png") as grid:
        assert grid.size == (2 * 34 + 2, 2 * (34 + 12) + 2)  # a strip below each row
        rows = np.asarray(grid.convert("L"))
    for top in (35, 35 + 46):
        strip = rows[top : top + 12]
        assert (strip == 255).mean() > 0.5 and (strip < 128).any()  # black on white
    path = place / "run" / "jem.pt"
    message = refused(capsys, "sample", "--checkpoint", path, "--class-label", "bee")
    assert "the model has the classes" in message and "golden bee" in message


def test_the_report_holds_the_names_and_tells_sets_of_one_file_name_apart(
    place, monkeypatch, tmp_path
):
    for name in dir(plots):
        if name.startswith("save_") and name != "save_grid":
            monkeypatch.setattr(plots, name, lambda *_: None)
    monkeypatch.setattr(study, "QUICK", study.DRY_RUN)
    sets = [tmp_path / name / "set.npy" for name in "ab"]
    for path in sets:
        path.parent.mkdir()
        np.save(path, np.full((5, 8, 8), 200, np.uint8))
    flags = ["--quick", "--attacks", "none", "--ood", *sets, "--judges", tmp_path / "judges"]
    flags += ["--out-dir", tmp_path / "report"]
    run("evaluate", "--checkpoint", place / "run" / "jem.pt", *flags)
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert found["protocol"]["classes"] == ["10", "ant", "golden bee"]
    assert list(found["out_of_distribution"]["sets"]) == list(map(str, sets))
    assert list(found["out_of_distribution"]["results"]["jem"]) == list(map(str, sets))


def add(pictures):
    for number in range(7):
        Image.new("L", (8, 8), 200 + number).save(pictures / "ant" / f"new {number}.png")


def remove(pictures):
    (pictures / "ant" / "3.png").unlink()


def move(pictures):
    for number in range(30):
        (pictures / "ant" / f"{number}.png").rename(pictures / "t")
        (pictures / "10" / f"{number}.png").rename(pictures / "ant" / f"{number}.png")
        (pictures / "t").rename(pictures / "10" / f"{number}.png")


def repaint(pictures):
    for path in pictures.rglob("*.png"):
        Image.new("L", (8, 8), 77).save(path)


def rename(pictures):
    (pictures / "ant").rename(pictures / "aunt")


CHANGES = [
    (add, "train was 68 images, "),
    (remove, "train was 68 images, "),
    (move, "train was 68 images, "),
    (repaint, "test was 15 images, "),
    (rename, "the classes were 10, ant, golden bee and are 10, aunt, golden bee"),
]


@pytest.mark.parametrize("change, says", CHANGES)
def test_pictures_that_changed_since_the_training_are_refused_by_all_who_would_use_them(
    place, capsys, change, says
):
    mine, path = place / "mine", place / "run" / "jem.pt"
    change(mine)
    there = ("--data-dir", mine)
    new = [*SMALL, "--dataset", "folder", *there, "--out-dir", place / "new"]
    before = {name: path.with_name(name).read_bytes() for name in ("jem.pt", "classifier.pt")}
    commands = [
        ("sample", "--checkpoint", path, "--from-images", "test", *there),
        ("evaluate", "--checkpoint", path, "--dry-run", *there),
        ("train_jem", "--resume", "--epochs", 2, "--out-dir", place / "run", *there),
        ("train_jem", *new, "--classifier", path.with_name("classifier.pt")),
        ("train_classifier", "--resume", "--epochs", 2, "--out-dir", place / "run", *there),
    ]
    for command in commands:
        message = refused(capsys, *command)
        assert f"the data under '{mine}' are not those that" in message and says in message
        assert "--data-dir" in message and "--other-data" in message
    assert before == {name: path.with_name(name).read_bytes() for name in before}
    assert not (place / "new" / "jem.pt").exists()
    for command in commands[:1] + commands[2:]:
        few = ("--num", 4, "--steps", 1) if command[0] == "sample" else ()
        run(*command, "--other-data", *few)
        out = capsys.readouterr().out
        assert says in out and "going on, as --other-data says" in out
    now = data.load("folder", mine).origin
    assert load_checkpoint(path, "jem")["origin"] == now  # what it went on with


def test_the_report_goes_on_with_other_data_too(place, capsys):
    remove(place / "mine")
    checkpoint = load_checkpoint(place / "run" / "jem.pt", "jem")
    args = parse("evaluate", ["--data-dir", str(place / "mine"), "--other-data"])
    dataset = dataset_of(checkpoint, args)
    assert sum(len(split.labels) for split in dataset[-3:]) == 89
    assert "going on, as --other-data says" in capsys.readouterr().out


def more_classes(pictures):
    write_folder(pictures, {"cow": 30})


def fewer_classes(pictures):
    shutil.rmtree(pictures / "ant")


def colour(pictures):
    Image.new("RGB", (8, 8), "red").save(pictures / "ant" / "3.png")


@pytest.mark.parametrize("change", [more_classes, fewer_classes, colour])
@pytest.mark.parametrize("with_origin", [True, False])
def test_data_that_the_network_cannot_take_are_refused_whatever_the_flags(
    place, capsys, change, with_origin
):
    change(place / "mine")
    path = place / "run" / "jem.pt"
    if not with_origin:
        torch.save(without_origin(path), path)
    flags = ("--data-dir", place / "mine", "--other-data")
    for command in (
        ("sample", "--checkpoint", path, "--from-images", "test"),
        ("evaluate", "--checkpoint", path, "--dry-run"),
        ("train_jem", "--resume", "--epochs", 2, "--out-dir", place / "run"),
    ):
        message = refused(capsys, *command, *flags)
        assert "the images were 1x8x8 of 3 classes and are" in message
        assert "--other-data" not in message


def test_a_folder_that_has_moved_is_found_with_data_dir(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, moved = place / "run" / "jem.pt", tmp_path / "moved"
    state = torch.load(path, weights_only=True)
    state["origin"]["data_dir"] = gone = str(tmp_path / "gone")
    torch.save(state, path)
    (place / "mine").rename(moved)
    for command in (
        ("sample", "--checkpoint", path, "--from-images", "test"),
        ("evaluate", "--checkpoint", path, "--dry-run"),
        ("train_jem", "--resume", "--epochs", 2, "--out-dir", place / "run"),
    ):
        message = refused(capsys, *command)
        assert gone in message and "--data-dir" in message
    sampled(place, "--from-images", "test", "--data-dir", "moved")
    run("train_jem", "--resume", "--epochs", 2, "--out-dir", place / "run", "--data-dir", "moved")
    assert load_checkpoint(path, "jem")["origin"]["data_dir"] == str(moved.resolve())
    sampled(place, "--from-images", "test")  # from now on


def write_fashion(folder):
    """Write files as those of Fashion-MNIST, with 200 images to train on and 50 to test with."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for stem, count in (("train", 200), ("t10k", 50)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = np.array([2051, count, 28, 28], ">i4").tobytes()
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = np.array([2049, count], ">i4").tobytes()
        labels = bytes(number % 10 for number in range(count))
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(header + labels)


@pytest.mark.parametrize("name", ["folder", "fashion-mnist"])
def test_the_commands_that_the_training_prints_work_from_another_folder(
    tmp_path, monkeypatch, capsys, name
):
    monkeypatch.chdir(tmp_path)
    if name == "folder":
        write_folder(Path("my data"), dict.fromkeys(NAMES, 30))
    else:
        write_fashion(Path("my data"))
    where = ["--dataset", name, "--data-dir", "my data", "--out-dir", tmp_path / "my run"]
    run("train_jem", *SMALL, "--from-scratch", *where)
    printed = capsys.readouterr().out.split("next: ")[1].splitlines()
    commands = [shlex.split(line)[1:] for line in printed]
    assert [script for script, *_ in commands] == ["sample.py", "evaluate.py"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run("sample", *commands[0][1:], "--from-images", "test", "--num", 4, "--steps", 1)
    args = parse("evaluate", commands[1][1:])
    checkpoint = load_checkpoint(args.checkpoint, "jem")
    assert data_dir_of(checkpoint, args.data_dir) == str((tmp_path / "my data").resolve())
    assert dataset_of(checkpoint, args).origin == checkpoint["origin"]
    run("train_jem", "--resume", "--epochs", 2, "--out-dir", tmp_path / "my run")


def without_origin(path):
    """Return a checkpoint as version 0.1.0 wrote it."""
    state = torch.load(path, weights_only=True)
    del state["origin"]
    for name in ("pixel_range", "channel_axis", "background", "other_data"):
        del state["args"][name]
    return state


def test_a_checkpoint_without_origin_draws_is_evaluated_and_goes_on(place, capsys):
    path, there = place / "run" / "jem.pt", ("--data-dir", place / "mine")
    torch.save(without_origin(path), path)
    assert class_names(load_checkpoint(path, "jem")) == ["0", "1", "2"]
    sampled(place, "--class-label", 2, 0)
    sampled(place, "--from-images", "test", *there)
    args = parse("evaluate", list(map(str, there)))
    assert dataset_of(load_checkpoint(path, "jem"), args).classes == ("10", "ant", "golden bee")
    run("train_jem", "--resume", "--epochs", 2, "--out-dir", place / "run", *there)
    assert load_checkpoint(path, "jem")["origin"]["classes"] == ["10", "ant", "golden bee"]


def test_the_flags_of_the_reading_count_for_a_checkpoint_that_keeps_none(trained, tmp_path):
    images = np.random.default_rng(0).random((60, 8, 8)) * 40  # black and white are unclear
    np.savez(tmp_path / "mine.npz", images=images, labels=np.arange(60) % 3)
    checkpoint = without_origin(trained / "run" / "jem.pt")
    flags = ["--data-dir", str(tmp_path / "mine.npz")]
    with pytest.raises(UserError, match="--pixel-range"):
        dataset_of(checkpoint, parse("evaluate", flags))
    args = parse("evaluate", [*flags, "--pixel-range", "0", "40"])
    assert dataset_of(checkpoint, args).train.images.max() > 0.9


def test_the_checkpoint_that_ships_has_the_digits_for_its_classes(tmp_path):
    assert class_names(load_checkpoint(SHIPPED, "jem")) == list("0123456789")
    flags = ("--class-label", 3, 8, "--num", 4, "--steps", 1, "--out-dir", tmp_path)
    run("sample", "--checkpoint", SHIPPED, *flags)
    assert (tmp_path / "samples-fresh-class-3-8.png").exists()


def fingerprint(root, *rest):
    return data.load("folder", root, *rest).origin["fingerprint"]


@pytest.fixture
def parts(tmp_path):
    """A folder of pictures that is split into train, val and test."""
    for split, count in zip(SPLITS, (12, 4, 5), strict=True):
        write_folder(tmp_path / "parts" / split, dict.fromkeys(("ant", "bee"), count))
    return tmp_path / "parts"


def test_the_fingerprint_does_not_depend_on_the_order_of_files_or_on_where_they_lie(
    parts, tmp_path
):
    before = fingerprint(parts)
    for number, path in enumerate(sorted(parts.rglob("*.png"), reverse=True)):
        path.rename(path.with_name(f"x{number:03}.png"))
    (parts / "train" / "ant" / "notes.txt").write_text("no picture")
    assert fingerprint(parts.rename(tmp_path / "moved")) == before


def test_the_fingerprint_changes_with_one_pixel_or_one_label_in_its_split_alone(parts):
    before = fingerprint(parts)
    for split in SPLITS:
        path = parts / split / "ant" / "2.png"
        whole = path.read_bytes()
        with Image.open(path) as picture:
            picture.load()
        picture.putpixel((4, 4), 99)
        picture.save(path)
        changed = fingerprint(parts)
        assert [name for name in SPLITS if changed[name] != before[name]] == [split]
        path.write_bytes(whole)
        assert fingerprint(parts) == before
        path.rename(parts / split / "bee" / "moved.png")
        changed = fingerprint(parts)
        assert [name for name in SPLITS if changed[name] != before[name]] == [split]
        (parts / split / "bee" / "moved.png").rename(path)


def test_the_fingerprint_of_an_array_changes_with_one_pixel_or_one_label(tmp_path):
    path, labels = tmp_path / "mine.npz", np.arange(60) % 3
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    np.savez(path, images=images, labels=labels)
    before = fingerprint(path)
    np.savez_compressed(path, images=images, labels=labels.astype(np.uint8))
    assert fingerprint(path) == before
    images[5, 4, 4] ^= 1
    np.savez(path, images=images, labels=labels)
    assert sum(fingerprint(path)[split] != before[split] for split in SPLITS) == 1
    images[5, 4, 4] ^= 1
    labels[5], labels[6] = labels[6], labels[5]
    np.savez(path, images=images, labels=labels)
    assert fingerprint(path) != before


def test_pictures_that_are_read_in_another_way_are_other_data(trained, capsys):
    mine = trained / "mine"
    dark = data.load("folder", mine, None, Reading(background="black"))
    checkpoint = load_checkpoint(trained / "run" / "classifier.pt", "classifier")
    args = parse("train_jem", ["--dataset", "folder"])
    check_same_data(checkpoint, data.load("folder", mine), args, "it")
    with pytest.raises(UserError, match="--background was white, and is black"):
        check_same_data(checkpoint, dark, args, "it")
    args.other_data = True
    check_same_data(checkpoint, dark, args, "it")
    assert "--background was white, and is black; going on" in capsys.readouterr().out


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("change", [add, more_classes])
def test_a_pretraining_goes_on_with_its_own_data_alone_and_overwrite_replaces_it(
    place, capsys, change, finished
):
    path = place / "run" / "classifier.pt"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "finished": finished}, path)
    (place / "run" / "jem.pt").unlink()
    before = path.read_bytes()
    change(place / "mine")
    flags = ("--dataset", "folder", "--data-dir", place / "mine", "--out-dir", place / "run")
    assert "was trained on" in refused(capsys, "train_jem", *PRETRAINED, *flags)
    assert path.read_bytes() == before
    run("train_jem", *PRETRAINED, *flags, "--overwrite")
    assert "it is replaced" in capsys.readouterr().out
    now = data.load("folder", place / "mine").origin
    assert load_checkpoint(path, "classifier")["origin"] == now


@pytest.mark.parametrize(
    "flag, before, now", [("--background", "white", "black"), ("--batch-size", 16, 8)]
)
def test_a_pretraining_with_other_flags_is_not_taken_for_the_run_s_own(
    flag, before, now, place, capsys
):
    (place / "run" / "jem.pt").unlink()
    flags = ("--dataset", "folder", "--data-dir", place / "mine", "--out-dir", place / "run")
    message = refused(capsys, "train_jem", *PRETRAINED, *flags, flag, now)
    assert f"pretrained with {flag} {before}, and this run has {now}" in message


def test_the_digits_lie_nowhere_so_that_other_sets_are_looked_for_where_they_are(digits):
    assert digits.origin["data_dir"] == ""
    state = {"dataset": "digits", "origin": digits.origin}
    assert data_dir_of(state, None) == DATA_DIR.default


def test_a_class_that_is_named_twice_is_refused_however_it_is_named(place, capsys):
    path = place / "run" / "jem.pt"
    state = torch.load(path, weights_only=True)
    state["origin"]["classes"] = ["ant", "bee", "cat"]
    torch.save(state, path)
    for flag in ("--class-label", "--mixture", "--interpolate"):
        assert "twice" in refused(capsys, "sample", "--checkpoint", path, flag, "ant", 0)
