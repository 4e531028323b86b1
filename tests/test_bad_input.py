"""What users get wrong, script by script: one sentence, exit code 2, nothing lost."""

import importlib
import os
import pickle
import shlex
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, Bomb, run
from PIL import Image

from sgld_nrg.support import checkpoints

# What stands before the flags of a case, unless it names another.
USUAL = {
    "train_jem": "--out-dir {empty}",
    "train_classifier": "--out-dir {empty}",
    "sample": "--checkpoint {run}/jem.pt",
    "evaluate": "--checkpoint {run}/jem.pt",
}
SCRIPTS = tuple(USUAL)
CASES = [
    # numbers that are zero, negative, huge or none
    ("train_jem", "--lr 0", "--lr: 0 is not a number above 0"),
    ("train_jem", "--lr nan", "--lr: nan is not a number above 0"),
    ("train_jem", "--lr -1", "--lr: -1 is not a number above 0"),
    ("train_jem", "--lr much", "--lr: 'much' is not a number above 0"),
    ("train_jem", "--epochs 0", "--epochs: 0 is not a whole number from 1 up"),
    ("train_jem", "--epochs 1.5", "--epochs: '1.5' is not a whole number from 1 up"),
    ("train_jem", "--batch-size 0", "--batch-size"),
    ("train_jem", "--batch-size -3", "--batch-size"),
    ("train_jem", "--batch-size 1500", "lower it"),
    ("train_jem", "--max-minutes 0", "--max-minutes"),
    ("train_jem", "--steps 2.5", "--steps"),
    ("train_jem", "--noise-std nan", "--noise-std"),
    ("train_jem", "--noise-std inf", "--noise-std"),
    ("train_jem", "--step-size 1e400", "--step-size"),
    ("train_jem", "--reinit-prob 1.5", "--reinit-prob"),
    ("train_jem", "--ema-decay 1", "--ema-decay"),
    ("train_jem", "--seed -1", "--seed"),
    ("train_jem", "--seed 4294967296", "--seed"),
    ("train_jem", "--depth 4", "lower depth"),
    ("train_jem", "--arch wide-resnet --depth 11", "6n + 4"),
    ("train_jem", "--from-scratch --buffer-size 1000000000000", "not enough memory"),
    ("train_classifier", "--width 10000000", "not enough memory"),
    ("train_classifier", "--augment -0.1", "--augment"),
    ("sample", "--num 0", "--num"),
    ("sample", "--class-label -1", "--class-label"),
    ("sample", "--chunk-size many", "--chunk-size"),
    ("sgld_speed", "--batches -64", "--batches"),
    # words that are none of the choices, flags that do not exist or are cut short
    ("train_jem", "--dataset imagenet", "--dataset: invalid choice"),
    ("train_jem", "--restart laplace", "--restart: invalid choice"),
    ("train_jem", "--device cuda:63", "--device cpu"),
    ("train_jem", "--device abacus", "--device cpu"),
    ("evaluate", "--device cuda:0", "--device cpu"),
    ("time_to_quality", "--dataset mnust", "--dataset"),
    ("train_jem", "stray", "unrecognized arguments: stray"),
    ("train_jem", "--step-sise 1", "did you mean --step-size?"),
    ("train_jem", "--step-sizes 1", "did you mean --step-size?"),
    ("train_jem", "--sede=3", "did you mean --seed?"),
    ("train_jem", "--zzzzzz", "unrecognized arguments: --zzzzzz (see"),  # and no suggestion
    *[(script, "--see 3", "unrecognized arguments: --see") for script in SCRIPTS],
    # flags that contradict each other
    ("train_jem", "--augment 1 --shift 2", "--shift"),
    ("train_classifier", "--augment 1 --shift 2", "--shift"),
    ("train_jem", "--shift 8", "--shift 8 moves images of 8 pixels"),
    ("train_jem", "--p-x-weight 1 --p-xy-weight 1", "--p-xy-weight"),
    ("train_jem", "--from-scratch --classifier a.pt", "not allowed with"),
    ("train_jem", "--from-scratch --pretrain-epochs 3", "--pretrain-epochs has no effect"),
    ("train_jem", "--classifier a.pt --pretrain-lr 1", "--pretrain-lr has no effect"),
    ("train_jem", "--resume --overwrite", "not allowed with"),
    ("train_jem", "--dry-run --resume", "nothing for --resume to continue"),
    ("train_jem", "--chain-batch-size 100 --buffer-size 50", "--buffer-size"),
    ("train_jem", "--image-size 16", "--image-size"),
    ("evaluate", "--attacks none l2", "--attacks"),
    ("time_to_quality", "--variant a: --variant 'a:--lr 1'", "one name"),
    ("time_to_quality", "--seeds 1 1", "a seed is given twice"),
    ("sgld_speed", "--cuda-graph --device cpu --out-dir {empty}/speed", "--device"),
    # chains that cannot be drawn
    ("sample", "--class-label 10", "classes 0 to 9"),
    ("sample", "--class-label 3 3", "twice"),
    ("sample", "--class-label 3 4 --num 1", "--num"),
    ("sample", "--mixture 1 10", "classes 0 to 9"),
    ("sample", "--interpolate 2 2", "twice"),
    ("sample", "--source buffer --num 201", "has 200"),
    ("sample", "--source buffer --class-label 1", "--source fresh"),
    ("sample", "--by-energy", "--source buffer"),
    ("sample", "--inpaint left", "--from-images"),
    ("sample", "--from-images {bad}/nowhere.png", "there is no"),
    ("sample", "--from-images '{bad}/broken picture/a.png'", "no image of a known kind"),
    ("sample", "--from-images '{bad}/cut short.png'", "cannot be read"),
    ("sample", "--from-images '{bad}/stray pixel.npy'", "from 0 to 1.02: what is black"),
    ("sample", "--from-images '{bad}/stray pixel.npy' --pixel-range 0 1", "not within"),
    ("sample", "--from-images '{bad}/stray pixel.npy' --pixel-range 1 0", "--pixel-range 1 0"),
    ("sample", "--from-images '{bad}/stray pixel.npy' --pixel-range 1", "--pixel-range"),
    ("sample", "--from-images '{bad}/by itself.npy'", "--channel-axis last"),
    ("sample", "--from-images '{bad}/by itself.npy' --channel-axis middle", "--channel-axis"),
    ("sample", "--from-images test --background grey", "--background"),
    *[
        ("sample", f"--from-images test --inpaint '{{bad}}/{name}'", says)
        for name, says in (
            ("nowhere.png", "there is no"),
            ("broken picture/a.png", "no image of a known kind"),
            ("white on paper.png", "nothing to hold"),
            ("by itself.npy", "--channel-axis last"),
            ("bits.npy", "uint8 of shape (1, 8, 8), from 0 to 1"),
        )
    ],
    ("sample", "--from-images {bad}/nan.npz", "finite"),
    # places that cannot be written to, or would be replaced
    ("train_jem", "--out-dir {run}", "--resume"),
    ("train_jem", "--out-dir {run} --resume --lr 0.5", "contradicts"),
    ("train_jem", "--out-dir {run}/metrics.csv", "--out-dir"),
    ("train_jem", "--resume", "nothing to resume"),
    ("train_jem", "--out-dir {locked}", "another training"),
    ("train_classifier", "--out-dir {run}", "--overwrite"),
    ("train_classifier", "--resume", "nothing to resume"),
    ("train_classifier", "--out-dir {locked}", "another training"),
    ("sample", "--out-dir {run}/jem.pt/below", "--out-dir"),
    ("sample", "--save-array images.npy", ".npz"),
    ("sample", "--save-array {empty}/no/folder.npz --out-dir {empty}", "--save-array"),
    ("two_moons", "--out {empty}/none/moons.png", "--out"),
    # checkpoints that are missing, or not what they seem
    ("train_jem", "--classifier {run}/no.pt", "no checkpoint"),
    ("train_jem", "--classifier {run}/jem.pt", "holds a jem"),
    ("train_jem", "--classifier {run}/metrics.csv", "damaged or no checkpoint"),
    ("train_jem", "--classifier {run}/classifier.pt --width 9", "--width"),
    ("train_jem", "--classifier {bad}/pickle.pt", "damaged or no checkpoint"),
    ("train_classifier", "--out-dir '{bad}/broken run' --resume", "damaged or no checkpoint"),
    ("sample", "--checkpoint {empty}/jem.pt", "train_jem.py"),
    ("sample", "--checkpoint {run}/classifier.pt", "holds a classifier"),
    ("sample", "--checkpoint {run}/config.json", "no checkpoint"),
    ("sample", "--checkpoint {bad}/pickle.pt", "damaged or no checkpoint"),
    ("sample", "--checkpoint {bad}/truncated.pt", "damaged or no checkpoint"),
    ("sample", "--checkpoint '{bad}/empty file.pt'", "damaged or no checkpoint"),
    ("sample", "--checkpoint {bad}/incomplete.pt", "lacks"),
    ("evaluate", "--checkpoint {empty}/jem.pt", "train_jem.py"),
    ("evaluate", "--checkpoint {run}/classifier.pt", "holds a classifier"),
    ("evaluate", "--checkpoint {bad}/foreign.pt", "no checkpoint of this project"),
    ("evaluate", "--checkpoint '{bad}/other weights.pt' --out-dir {empty}", "do not fit"),
    ("evaluate", "--classifier {run}/jem.pt", "holds a jem"),
    # images that are none
    ("evaluate", "--out-dir {empty} --ood no-such-set", "--ood"),
    *[
        ("evaluate", f"--out-dir {{empty}} --attacks none --ood '{{bad}}/{name}'", says)
        for name, says in (
            ("nan.npz", "finite"),
            ("no images.npz", "finite"),
            ("objects.npy", "no .npz or .npy"),
            ("flat.npy", "float64 of shape (3, 4)"),
            ("half an archive.npz", "no .npz or .npy"),
            ("text.npz", "no .npz or .npy"),
            ("bright.npy", "float64 of shape (5, 8, 8), from 300 to 300: what is black"),
            ("stray pixel.npy", "float64 of shape (20, 8, 8), from 0 to 1.02: what is black"),
            ("by itself.npy", "float64 of shape (8, 8, 3), from 0 to 1: one picture of 3"),
            ("either axis.npy", "axis 1 or 3 may be the channels"),
            ("bits.npy", "--pixel-range"),
            ("too large.png", "cannot be read"),
            ("cut short.png", "cannot be read"),
            ("postscript.png", "no image of a known kind"),
            ("no pictures", "no image files"),
            ("broken picture", "no image of a known kind"),
        )
    ],
    # data to train on
    *[
        (script, f"--dataset folder --data-dir '{{bad}}/{name}'", says)
        for script in ("train_classifier", "train_jem")
        for name, says in (
            ("nowhere", "--data-dir"),
            ("no pictures", "holds no image files"),
            ("one class", "1 class folders with images (a)"),
            ("unequal sizes", "--image-size"),
            ("broken class", "no image of a known kind"),
            ("strange test", "not in train"),
            ("flat test", "1 images and no class folders"),
            ("one picture each", "add images"),
            ("half an archive.npz", "no .npz or .npy"),
            ("whole.npz", "no array 'labels'"),
            ("pickled labels.npz", "are Python objects"),
            ("labels with a gap.npz", "without gaps"),
            ("too few labels.npz", "for each of the 50 images"),
            ("oblong.npz", "not of one square size (9x8)"),
        )
    ],
    ("train_jem", "--dataset mnist --data-dir {empty}", "download failed"),
    ("train_classifier", "--dataset mnist --data-dir {empty}", "download failed"),
    *[
        ("train_jem", f"--dataset mnist --data-dir '{{bad}}/mnist {name}'", "damaged")
        for name in ("labels out of range", "one class", "cut short", "unequal numbers")
    ],
    ("time_to_quality", "--kmnist {empty}/none.npz --out-dir {empty}", "--kmnist"),
]

EVERY_CLASS = bytes(range(10)) * 6000


def write_idx(path, magic, shape, content=b""):
    """Write a file of MNIST's format; without content it is a hole, which reads as zeros."""
    header = np.array([magic, *shape], ">i4").tobytes()
    path.write_bytes(header + content)
    if not content:
        os.truncate(path, len(header) + int(np.prod(shape)))


def write_mnist(folder, labels, pixels=b""):
    """Write MNIST's four files: blank images, these labels to train on, a test part in order."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count, classes in (("train", 60_000, labels), ("t10k", 10_000, EVERY_CLASS[:10_000])):
        shape, blank = (count, 28, 28), pixels if part == "train" else b""
        write_idx(raw / f"{part}-images-idx3-ubyte", 2051, shape, blank)
        write_idx(raw / f"{part}-labels-idx1-ubyte", 2049, [len(classes)], classes)


def write_pictures(folder, count, side=8):
    """Write PNGs of noise into a folder."""
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (side, side), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def bad(tiny_run, tmp_path_factory):
    """A folder of files that lie about what they are; its name has a blank and is beyond ASCII."""
    bad = tmp_path_factory.mktemp("hostile") / "böse Dateien 数"
    bad.mkdir()
    whole = (tiny_run / "jem.pt").read_bytes()
    state = torch.load(tiny_run / "jem.pt", weights_only=True)
    ours = {"format": checkpoints.FORMATS[-1], "kind": "jem"}
    (bad / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (bad / "empty file.pt").write_bytes(b"")
    (bad / "pickle.pt").write_bytes(pickle.dumps({**ours, "model": Bomb()}))
    torch.save({"state_dict": {}}, bad / "foreign.pt")
    torch.save({**ours, "model": {}}, bad / "incomplete.pt")
    wider = {**state["model_config"], "width": 9}
    torch.save({**state, "model_config": wider}, bad / "other weights.pt")
    (bad / "broken run").mkdir()
    (bad / "broken run" / "classifier.pt").write_bytes(whole[:1000])
    np.savez(bad / "nan.npz", images=np.full((3, 8, 8), np.nan))
    np.savez(bad / "no images.npz", images=np.zeros((0, 8, 8)))
    np.save(bad / "objects.npy", np.array([Bomb(), Bomb()]), allow_pickle=True)
    np.save(bad / "flat.npy", np.zeros((3, 4)))
    np.save(bad / "bright.npy", np.full((5, 8, 8), 300.0))
    np.save(bad / "bits.npy", np.eye(8, dtype=np.uint8)[None])
    np.save(bad / "by itself.npy", np.linspace(0, 1, 8 * 8 * 3).reshape(8, 8, 3))
    np.save(bad / "either axis.npy", np.zeros((5, 3, 9, 3)))
    stray = np.linspace(0, 1, 20 * 8 * 8).reshape(20, 8, 8)
    stray[3, 4, 5] = 1.02
    np.save(bad / "stray pixel.npy", stray)
    paper = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    paper.paste((255, 255, 255, 255), (2, 2, 6, 6))
    paper.save(bad / "white on paper.png")
    (bad / "postscript.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    whole = (bad / "white on paper.png").read_bytes()
    (bad / "cut short.png").write_bytes(whole[:50])
    size = whole.index(b"IHDR") + 4
    header = whole[size - 4 : size] + np.array([20_000, 20_000], ">i4").tobytes()
    header += whole[size + 8 : size + 13]
    header += np.array(zlib.crc32(header), ">u4").tobytes()
    (bad / "too large.png").write_bytes(whole[: size - 4] + header + whole[size + 17 :])
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
        write_pictures(bad / "flat test" / "train" / label, 30)
        write_pictures(bad / "one picture each" / label, 1)
    (bad / "broken class" / "b" / "7.png").write_bytes(b"no image")
    write_pictures(bad / "strange test" / "test" / "c", 3)
    write_pictures(bad / "flat test" / "test", 1)
    write_mnist(bad / "mnist labels out of range", bytes([12]) + EVERY_CLASS[1:])
    write_mnist(bad / "mnist one class", bytes(60_000))
    write_mnist(bad / "mnist cut short", EVERY_CLASS, pixels=bytes(784 * 500))
    write_mnist(bad / "mnist unequal numbers", EVERY_CLASS[:100])
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
    """Return what changes for each file of a folder whenever anything writes or replaces it."""
    found = {path: path.stat() for path in sorted(Path(folder).rglob("*")) if path.is_file()}
    return {path: (s.st_ino, s.st_size, s.st_mtime_ns) for path, s in found.items()}


def call(script, flags):
    """Run a script, of the top floor or not, in this process."""
    if script in SCRIPTS:
        return run(script, *flags)
    module = importlib.import_module(script)
    return module.main(module.parse(flags))


@pytest.mark.parametrize(
    "script, flags, says", CASES, ids=[f"{script} {flags}" for script, flags, _ in CASES]
)
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
    places = {"run": tiny_run, "empty": tmp_path / "an empty folder", "bad": bad, "locked": locked}
    places["empty"].mkdir()
    words = [word.format(**places) for word in shlex.split(flags)]
    usual = [word.format(**places) for word in USUAL.get(script, "").split()]
    if script == "train_jem" and not {"mnist", "folder", "--resume"} & set(words):
        usual += TINY
    with pytest.raises(SystemExit) as caught:
        call(script, [*usual, *words])
    message = capsys.readouterr().err
    assert caught.value.code == 2
    assert message.startswith("error: ") and message.count("\n") == 1 and says in message
    assert (fingerprint(tiny_run), fingerprint(bad)) == before
    assert not (tmp_path / "exploded").exists()
    written = places["empty"].rglob("*")
    assert not [path for path in written if path.suffix in (".pt", ".npz", ".tmp")]


def test_a_folder_without_the_right_to_write_is_refused(tmp_path, capsys, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    # the tests may run as root, whom no folder refuses
    monkeypatch.setattr(checkpoints.tempfile, "TemporaryFile", denied)
    with pytest.raises(SystemExit) as caught:
        run("train_classifier", "--out-dir", tmp_path)
    assert caught.value.code == 2 and "Permission denied" in capsys.readouterr().err
    assert not os.listdir(tmp_path)
