"""What users get wrong, script by script: one sentence, exit code 2, nothing lost."""

import hashlib
import importlib
import os
from pathlib import Path

import pytest
import torch
from conftest import TINY

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
    ("train_jem", ["--out-dir", "{empty}", "--batch-size", "1500", "--buffer-size", "1500"], "lower it"),
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
]


def fingerprint(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.mark.parametrize("script, flags, says", CASES, ids=[f"{script} {' '.join(flags)}" for script, flags, _ in CASES])
def test_a_mistake_gets_one_sentence_and_loses_nothing(script, flags, says, tiny_run, tmp_path, monkeypatch, capsys):
    def no_network(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    before = fingerprint(tiny_run)
    empty = tmp_path / "ein leerer Ordner"
    empty.mkdir()
    flags = [flag.format(run=tiny_run, empty=empty) for flag in flags]
    own = TINY if script == "train_jem" and not {"mnist", "--resume"} & set(flags) else []
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(script).main([*own, *flags])
    message = capsys.readouterr().err
    assert caught.value.code == 2
    assert message.startswith("error: ") and message.count("\n") == 1 and says in message
    assert fingerprint(tiny_run) == before
    assert not [path for path in empty.rglob("*") if path.suffix in (".pt", ".npz", ".tmp")]


def test_a_folder_without_the_right_to_write_is_refused(tmp_path, capsys, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(runs.tempfile, "TemporaryFile", denied)  # the tests may run as root, whom no folder refuses
    with pytest.raises(SystemExit) as caught:
        importlib.import_module("train_classifier").main(["--out-dir", str(tmp_path)])
    assert caught.value.code == 2 and "Permission denied" in capsys.readouterr().err
    assert not os.listdir(tmp_path)
