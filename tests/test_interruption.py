"""A training that is stopped, by whatever signal and wherever, goes on as if it had never been."""

import os
import random
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY

import runs
import train_classifier
import train_jem

FLAGS = [*TINY, "--from-scratch", "--log-every", "7", "--save-steps", "5"]
CLOCK = ("minutes", "iterations_per_second")
KILLED = """
import os, signal, sys
import train_jem
iterate, stop_at = train_jem.iterate, int(sys.argv.pop(1))
def die(run, *rest):
    if run.step == stop_at:
        os.kill(os.getpid(), signal.SIGKILL)
    iterate(run, *rest)
train_jem.iterate = die
train_jem.main()
"""


def rows(folder):
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in runs.read_metrics(folder / "metrics.csv")]


def signalled(monkeypatch, module, name, step, number):
    """Make a function of a script that takes a training first send a signal to this process in one of its iterations."""
    function = getattr(module, name)

    def send(run, *rest):
        if run.step == step:
            os.kill(os.getpid(), number)
        return function(run, *rest)

    monkeypatch.setattr(module, name, send)


def test_a_run_that_is_stopped_at_ten_random_points_ends_with_the_same_weights_chains_and_metrics(tmp_path, capsys):
    train_jem.main([*FLAGS, "--out-dir", str(tmp_path / "whole")])
    folder, flags = tmp_path / "stopped", FLAGS
    points = sorted(random.Random(0).sample(range(1, 75), 10))
    for count, point in enumerate(points):
        command = [*flags, "--out-dir", str(folder)]
        if count % 4 == 1:
            killed = subprocess.run([sys.executable, "-c", KILLED, str(point), *command], cwd=ROOT, capture_output=True)
            assert killed.returncode == -signal.SIGKILL
        else:
            number = signal.SIGTERM if count % 2 else signal.SIGINT
            with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
                signalled(patch, train_jem, "iterate", point, number)
                train_jem.main(command)
            assert caught.value.code == 128 + number
            message = capsys.readouterr().err
            assert f"stopped at iteration {point + 1} and saved" in message
            assert f"python train_jem.py --resume --out-dir {folder}" in message
            flags = ["--resume"]
    train_jem.main(["--resume", "--out-dir", str(folder)])
    whole, stopped = (runs.load_checkpoint(place / "jem.pt", "jem") for place in (tmp_path / "whole", folder))
    for part in ("model", "buffer"):
        assert all(torch.equal(value, stopped[part][name]) for name, value in whole[part].items()), part
    for name, value in whole["training"]["model"].items():
        assert torch.equal(value, stopped["training"]["model"][name])
    assert rows(tmp_path / "whole") == rows(folder)
    assert not list(folder.glob("jem.pt.*"))  # a finished run keeps one checkpoint


def test_pretraining_that_is_stopped_within_an_epoch_goes_on_with_the_same_command(tmp_path, monkeypatch, capsys):
    flags = [*TINY, "--pretrain-epochs", "3", "--epochs", "1"]
    train_jem.main([*flags, "--out-dir", str(tmp_path / "whole")])
    steps = iter(range(1000))
    loss = train_classifier.cross_entropy

    def stop_once(*rest):
        if next(steps) == 25:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*rest)

    monkeypatch.setattr(train_classifier, "cross_entropy", stop_once)
    command = [*flags, "--out-dir", str(tmp_path / "stopped")]
    with pytest.raises(SystemExit) as caught:
        train_jem.main(command)
    assert caught.value.code == 128 + signal.SIGTERM and "the same command again" in capsys.readouterr().err
    train_jem.main(command)
    for kind in ("classifier", "jem"):
        whole, stopped = (runs.load_checkpoint(tmp_path / name / f"{kind}.pt", kind) for name in ("whole", "stopped"))
        assert all(torch.equal(value, stopped["model"][name]) for name, value in whole["model"].items())


def test_a_run_of_a_version_without_a_flag_is_refused_and_left_as_it_is(tmp_path, capsys):
    train_jem.main([*FLAGS, "--epochs", "1", "--out-dir", str(tmp_path)])
    path = tmp_path / "jem.pt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["args"]["lr_floor"]
    torch.save(checkpoint, path)
    before = path.read_bytes()
    with pytest.raises(SystemExit) as caught:
        train_jem.main(["--resume", "--epochs", "2", "--out-dir", str(tmp_path)])
    assert caught.value.code == 2 and "older version, without --lr-floor" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_a_second_signal_does_not_wait(tmp_path, monkeypatch):
    def hang(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second signal was not heard")

    monkeypatch.setattr(train_jem, "iterate", hang)
    with pytest.raises(SystemExit) as caught:
        train_jem.main([*FLAGS, "--out-dir", str(tmp_path)])
    assert caught.value.code == 130


def test_a_disk_that_is_full_ends_a_run_with_one_sentence_and_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    def full(log, step, *rest, **values):
        if step > 20:
            raise OSError(28, "No space left on device", str(log.path))
        return write(log, step, *rest, **values)

    write = runs.MetricsLog.write
    monkeypatch.setattr(runs.MetricsLog, "write", full)
    with pytest.raises(SystemExit) as caught:
        train_jem.main([*FLAGS, "--out-dir", str(tmp_path)])
    message = capsys.readouterr().err
    assert caught.value.code == 2 and "No space left on device" in message and "--resume" in message
    assert message.strip().count("\n") == 0
    assert runs.load_checkpoint(tmp_path / "jem.pt", "jem")["training"]["step"] == 20
