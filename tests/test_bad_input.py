"""What users get wrong, script by script: one sentence, exit code 2, nothing lost."""

import hashlib
import importlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image

import runs

CASES = [
    ("train_jem", ["--dataset", "mnist", "--data-dir", "{empty}"], "download failed"),
    ("train_jem", ["--out-dir", "{run}"], "--resume"),
    ("train_jem", ["--out-dir", "{empty}", "--resume"], "nothing to resume"),
    ("train_jem", ["--out-dir", "{run}", "--resume", "--lr", "0.5"], "contradicts"),
    ("train_jem", ["--out-dir", "{empty}", "--classifier", "{run}/no.pt"], "no checkpoint"),
    ("train_jem", ["--out-dir", "{empty}", "--classifier", "{run}/jem.pt"], "holds a jem"),
    ("train_jem", ["--out-dir", "{empty}", "--classifier", "{run}/metrics.csv"], "damaged or no checkpoint"),
    ("train_jem", ["--out-dir", "{empty}", "--classifier", "{run}/classifier.pt", "--width", "9"], "--width"),
    ("train_jem", ["--out-dir", "{empty}", "--device", "cuda:63"], "--device cpu"),
    ("train_jem", ["--out-dir", "{empty}", "--device", "abacus"], "--device cpu"),
    ("train_jem", ["--out-dir", "{empty}", "--depth", "4"], "lower depth"),
    ("train_jem", ["--out-dir", "{empty}", "--arch", "wide-resnet", "--depth", "11"], "6n + 4"),
    ("train_jem", ["--out-dir", "{empty}", "--batch-size", "1500"], "lower it"),
    ("train_jem", ["--out-dir", "{run}/metrics.csv"], "--out-dir"),
    ("train_classifier", ["--out-dir", "{run}"], "--overwrite"),
    ("train_classifier", ["--out-dir", "{empty}", "--resume"], "nothing to resume"),
    ("train_classifier", ["--dataset", "mnist", "--data-dir", "{empty}", "--out-dir", "{empty}"], "download failed"),
    ("sample", ["--checkpoint", "{empty}/jem.pt"], "train_jem.py"),
    ("sample", ["--checkpoint", "{run}/classifier.pt"], "holds a classifier"),
    ("sample", ["--checkpoint", "{run}/config.json"], "no checkpoint"),
    ("sample", ["--checkpoint", "{run}/jem.pt", "--class-label", "10"], "classes 0 to 9"),
    ("sample", ["--checkpoint", "{run}/jem.pt", "--class-label", "3", "3"], "twice"),
    ("sample", ["--checkpoint", "{run}/jem.pt", "--class-label", "3", "4", "--num", "1"], "--num"),
    ("sample", ["--checkpoint", "{run}/jem.pt", "--source", "buffer", "--num", "201"], "has 200"),
    ("sample", ["--checkpoint", "{run}/jem.pt", "--source", "buffer", "--class-label", "1"], "--source fresh"),
    ("sample", ["--checkpoint", "{run}/jem.pt", "--save-array", "images.npy"], ".npz"),
    (
        "sample",
        ["--checkpoint", "{run}/jem.pt", "--save-array", "{empty}/no/folder.npz", "--out-dir", "{empty}"],
        "--save-array",
    ),
    ("sample", ["--checkpoint", "{run}/jem.pt", "--out-dir", "{run}/jem.pt/below"], "--out-dir"),
    ("evaluate", ["--checkpoint", "{empty}/jem.pt"], "train_jem.py"),
    ("evaluate", ["--checkpoint", "{run}/classifier.pt"], "holds a classifier"),
    ("evaluate", ["--checkpoint", "{run}/jem.pt", "--classifier", "{run}/jem.pt"], "holds a jem"),
    ("evaluate", ["--checkpoint", "{run}/jem.pt", "--attacks", "none", "l2"], "--attacks"),
    ("evaluate", ["--checkpoint", "{run}/jem.pt", "--out-dir", "{empty}", "--ood", "no-such-set"], "--ood"),
    # numbers that are zero, negative, huge or none
    ("train_jem", ["--out-dir", "{empty}", "--lr", "-1"], "--lr"),
    ("train_jem", ["--out-dir", "{empty}", "--batch-size", "0"], "--batch-size"),
    ("train_jem", ["--out-dir", "{empty}", "--steps", "2.5"], "--steps"),
    ("train_jem", ["--out-dir", "{empty}", "--noise-std", "nan"], "--noise-std"),
    ("train_jem", ["--out-dir", "{empty}", "--step-size", "1e400"], "--step-size"),
    ("train_jem", ["--out-dir", "{empty}", "--reinit-prob", "1.5"], "--reinit-prob"),
    ("train_jem", ["--out-dir", "{empty}", "--seed", "4294967296"], "--seed"),
    ("train_jem", ["--out-dir", "{empty}", "--from-scratch", "--buffer-size", "1000000000000"], "not enough memory"),
    ("train_classifier", ["--out-dir", "{empty}", "--width", "10000000"], "not enough memory"),
    ("train_classifier", ["--out-dir", "{empty}", "--augment", "-0.1"], "--augment"),
    ("sample", ["--checkpoint", "{run}/jem.pt", "--num", "0"], "--num"),
    ("sample", ["--checkpoint", "{run}/jem.pt", "--class-label", "-1"], "--class-label"),
    ("sample", ["--checkpoint", "{run}/jem.pt", "--chunk-size", "many"], "--chunk-size"),
    ("evaluate", ["--checkpoint", "{run}/jem.pt", "--device", "cuda:0"], "--device cpu"),
    # flags that contradict each other or do not exist
    ("train_jem", ["--out-dir", "{empty}", "--p-x-weight", "0"], "train_classifier.py"),
    ("train_jem", ["--out-dir", "{empty}", "--p-x-weight", "1", "--p-xy-weight", "1"], "--p-xy-weight"),
    ("train_jem", ["--out-dir", "{empty}", "--from-scratch", "--classifier", "a.pt"], "not allowed with"),
    ("train_jem", ["--out-dir", "{empty}", "--image-size", "16"], "--image-size"),
    ("train_jem", ["--out-dir", "{empty}", "--step-sizes", "1"], "did you mean --step-size?"),
    ("time_to_quality", ["--kmnist", "{empty}/none.npz", "--out-dir", "{empty}"], "--kmnist"),
    ("time_to_quality", ["--dataset", "mnust"], "--dataset"),
    ("costs", ["--checkpoint", "{empty}/none.pt", "--out-dir", "{empty}"], "--checkpoint"),
    ("sgld_speed", ["--batches", "-64"], "--batches"),
    ("sgld_speed", ["--cuda-graph", "--device", "cpu", "--out-dir", "{empty}/speed"], "--device"),
    ("two_moons", ["--out", "{empty}/none/moons.png"], "--out"),
    ("sample", ["--checkpoint", "{run}/jem.pt", "--inpaint", "left"], "--from-images"),
    ("sample", ["--checkpoint", "{run}/jem.pt", "--from-images", "{bad}/nowhere.png"], "there is no"),
    ("sample", ["--checkpoint", "{run}/jem.pt", "--from-images", "{bad}/broken picture/a.png"], "cannot be read"),
    ("sample", ["--checkpoint", "{run}/jem.pt", "--from-images", "{bad}/nan.npz"], "finite"),
    ("sample", ["--checkpoint", "{run}/jem.pt", "--mixture", "1", "10"], "classes 0 to 9"),
    ("sample", ["--checkpoint", "{run}/jem.pt", "--interpolate", "2", "2"], "twice"),
    ("sample", ["--checkpoint", "{run}/jem.pt", "--by-energy"], "--source buffer"),
    # checkpoints that are not what they seem
    ("train_jem", ["--out-dir", "{empty}", "--classifier", "{bad}/pickle.pt"], "damaged or no checkpoint"),
    ("sample", ["--checkpoint", "{bad}/pickle.pt"], "damaged or no checkpoint"),
    ("sample", ["--checkpoint", "{bad}/truncated.pt"], "damaged or no checkpoint"),
    ("sample", ["--checkpoint", "{bad}/empty file.pt"], "damaged or no checkpoint"),
    ("sample", ["--checkpoint", "{bad}/incomplete.pt"], "lacks"),
    ("evaluate", ["--checkpoint", "{bad}/foreign.pt"], "no checkpoint of this project"),
    ("evaluate", ["--checkpoint", "{bad}/other weights.pt", "--out-dir", "{empty}"], "do not fit"),
    ("train_classifier", ["--out-dir", "{bad}/broken run", "--resume"], "damaged or no checkpoint"),
    # images that are none
    *[
        (
            "evaluate",
            ["--checkpoint", "{run}/jem.pt", "--out-dir", "{empty}", "--attacks", "none", "--ood", f"{{bad}}/{name}"],
            says,
        )
        for name, says in (
            ("nan.npz", "finite"),
            ("no images.npz", "finite"),
            ("objects.npy", "no .npz or .npy"),
            ("flat.npy", "shape"),
            ("half an archive.npz", "no .npz or .npy"),
            ("text.npz", "no .npz or .npy"),
            ("bright.npy", "pixels from"),
            ("no pictures", "no image files"),
            ("broken picture", "cannot be read"),
        )
    ],
    # data to train on
    *[
        (script, ["--dataset", "folder", "--data-dir", f"{{bad}}/{name}", "--out-dir", "{empty}"], says)
        for script in ("train_classifier", "train_jem")
        for name, says in (
            ("nowhere", "--data-dir"),
            ("no pictures", "0 class folders"),
            ("one class", "1 class folders"),
            ("unequal sizes", "--image-size"),
            ("broken class", "cannot be read"),
            ("strange test", "not in train"),
            ("one picture each", "add images"),
            ("half an archive.npz", "no .npz or .npy"),
            ("whole.npz", "must hold 'labels'"),
            ("pickled labels.npz", "must hold 'labels'"),
            ("labels with a gap.npz", "without gaps"),
            ("too few labels.npz", "for each of its 50 images"),
            ("oblong.npz", "not square (9x8)"),
        )
    ],
    *[
        ("train_jem", ["--dataset", "mnist", "--data-dir", f"{{bad}}/mnist {name}", "--out-dir", "{empty}"], "damaged")
        for name in ("labels out of range", "one class", "cut short", "unequal numbers")
    ],
    # two at once
    ("train_jem", ["--out-dir", "{locked}"], "another training"),
    ("train_classifier", ["--out-dir", "{locked}"], "another training"),
]


class Bomb:
    """Unpickling one makes a file in the current folder."""

    def __reduce__(self):
        return open, ("exploded", "w")


def write_mnist(folder, labels, count=60_000, pixels=b""):
    """Write MNIST's four files with the given training labels, blank images and a test part in order."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    blank = pixels or bytes(784) * count
    for part, images, classes in (("train", blank, labels), ("t10k", bytes(784) * 10_000, bytes(range(10)) * 1000)):
        size = count if part == "train" else 10_000
        header = np.array([2051, size, 28, 28], ">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(np.array([2049, len(classes)], ">i4").tobytes() + classes)


def write_pictures(folder, count, side=8):
    """Write PNGs of noise into a folder."""
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (side, side), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def bad(tiny_run, tmp_path_factory):
    """A folder, with a blank and letters beyond ASCII in its name, of files that lie about what they are."""
    bad = tmp_path_factory.mktemp("hostile") / "böse Dateien 数"
    bad.mkdir()
    whole = (tiny_run / "jem.pt").read_bytes()
    state = torch.load(tiny_run / "jem.pt", weights_only=True)
    (bad / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (bad / "empty file.pt").write_bytes(b"")
    (bad / "pickle.pt").write_bytes(pickle.dumps({"format": runs.FORMAT, "kind": "jem", "model": Bomb()}))
    torch.save({"state_dict": {}}, bad / "foreign.pt")
    torch.save({"format": runs.FORMAT, "kind": "jem", "model": {}}, bad / "incomplete.pt")
    torch.save({**state, "model_config": {**state["model_config"], "width": 9}}, bad / "other weights.pt")
    (bad / "broken run").mkdir()
    (bad / "broken run" / "classifier.pt").write_bytes(whole[:1000])
    np.savez(bad / "nan.npz", images=np.full((3, 8, 8), np.nan))
    np.savez(bad / "no images.npz", images=np.zeros((0, 8, 8)))
    np.save(bad / "objects.npy", np.array([Bomb(), Bomb()]), allow_pickle=True)
    np.save(bad / "flat.npy", np.zeros((3, 4)))
    np.save(bad / "bright.npy", np.full((3, 8, 8), 300.0))
    np.savez(bad / "whole.npz", images=np.zeros((50, 8, 8)))
    for name, labels, shape in (
        ("pickled labels", np.array([Bomb()] * 50), (50, 8, 8)),
        ("labels with a gap", np.arange(50) % 2 * 2, (50, 8, 8)),
        ("too few labels", np.arange(40) % 2, (50, 8, 8)),
        ("oblong", np.arange(50) % 2, (50, 8, 9)),
    ):
        np.savez(bad / f"{name}.npz", images=np.zeros(shape), labels=labels)
    (bad / "half an archive.npz").write_bytes((bad / "whole.npz").read_bytes()[:2000])
    (bad / "text.npz").write_text("no archive")
    for name in ("no pictures/a", "no pictures/b", "broken picture"):
        (bad / name).mkdir(parents=True)
    (bad / "broken picture" / "a.png").write_bytes(b"no image")
    write_pictures(bad / "one class" / "a", 30)
    write_pictures(bad / "unequal sizes" / "a", 30)
    write_pictures(bad / "unequal sizes" / "b", 30, side=9)
    for label in "ab":
        write_pictures(bad / "broken class" / label, 30)
        write_pictures(bad / "strange test" / "train" / label, 30)
        write_pictures(bad / "one picture each" / label, 1)
    (bad / "broken class" / "b" / "7.png").write_bytes(b"no image")
    write_pictures(bad / "strange test" / "test" / "c", 3)
    everything = bytes(range(10)) * 6000
    write_mnist(bad / "mnist labels out of range", bytes([12]) + everything[1:])
    write_mnist(bad / "mnist one class", bytes(60_000))
    write_mnist(bad / "mnist cut short", everything, pixels=bytes(784 * 500))
    write_mnist(bad / "mnist unequal numbers", everything[:100])
    return bad


@pytest.fixture
def locked(tmp_path):
    """A folder that another training has to itself."""
    fcntl = pytest.importorskip("fcntl")
    folder = tmp_path / "in use"
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield folder
    os.close(descriptor)


def fingerprint(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.mark.parametrize("script, flags, says", CASES, ids=[f"{script} {' '.join(flags)}" for script, flags, _ in CASES])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # what it warns of is the test
def test_a_mistake_gets_one_sentence_and_loses_nothing(
    script, flags, says, tiny_run, bad, locked, tmp_path, monkeypatch, capsys
):
    def no_network(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    for folder in ("benchmarks", "examples"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    before = fingerprint(tiny_run), fingerprint(bad)
    empty = tmp_path / "ein leerer Ordner"
    empty.mkdir()
    flags = [flag.format(run=tiny_run, empty=empty, bad=bad, locked=locked) for flag in flags]
    own = TINY if script == "train_jem" and not {"mnist", "folder", "--resume"} & set(flags) else []
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(script).main([*own, *flags])
    message = capsys.readouterr().err
    assert caught.value.code == 2
    assert message.startswith("error: ") and message.count("\n") == 1 and says in message
    assert (fingerprint(tiny_run), fingerprint(bad)) == before and not (tmp_path / "exploded").exists()
    assert not [path for path in empty.rglob("*") if path.suffix in (".pt", ".npz", ".tmp")]


def test_a_folder_without_the_right_to_write_is_refused(tmp_path, capsys, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(runs.tempfile, "TemporaryFile", denied)  # the tests may run as root, whom no folder refuses
    with pytest.raises(SystemExit) as caught:
        importlib.import_module("train_classifier").main(["--out-dir", str(tmp_path)])
    assert caught.value.code == 2 and "Permission denied" in capsys.readouterr().err
    assert not os.listdir(tmp_path)
