"""A training that is stopped, by whatever signal and wherever, goes on as if it had never been."""

import os
import random
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, run

from sgld_nrg import train_classifier, train_jem
from sgld_nrg.support import signals
from sgld_nrg.support.checkpoints import load_checkpoint
from sgld_nrg.support.log import MetricsLog, read_metrics

pytestmark = pytest.mark.usefixtures("no_curves")

FLAGS = [*TINY, "--from-scratch", "--log-every", "7", "--save-iterations", "5"]
FLAGS += ["--first-steps", "2", "--steps", "6"]
SHORT = [*FLAGS, "--batch-size", "314", "--epochs", "1"]  # four iterations
CLOCK = ("minutes", "iterations_per_second")
KILLED = """
import os, signal, sys
from sgld_nrg import train_jem
from sgld_nrg.support.commands import parse
iteration, stop_at = train_jem.iteration, int(sys.argv[1])
def die(run, *rest):
    if run.iteration == stop_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return iteration(run, *rest)
train_jem.iteration = die
train_jem.main(parse("train_jem", sys.argv[2:]))
"""


def rows(folder):
    found = read_metrics(folder / "metrics.csv")
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in found]


def assert_the_same(phase, whole, stopped):
    """Check that two folders hold finished trainings that differ in the clock alone."""
    one, other = (load_checkpoint(folder / f"{phase}.pt", phase) for folder in (whole, stopped))
    assert one["finished"] and other["finished"]
    pairs = [(one["model"], other["model"])]
    pairs += [(one["training"]["model"], other["training"]["model"])]
    pairs += [(one["buffer"], other["buffer"])] if phase == "jem" else []
    for wanted, found in pairs:
        assert wanted.keys() == found.keys()
        assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    assert rows(whole) == rows(stopped)


def signalled(phase, script, flags, at, *numbers):
    """Run a training that gets signals in an iteration of a phase; returns its exit code."""
    jem = phase == "jem"
    module, name = (train_jem, "iteration") if jem else (train_classifier, "cross_entropy")
    function, calls = getattr(module, name), iter(range(1000))

    def send(*rest):
        iteration = rest[0].iteration if jem else next(calls)
        for number in numbers if iteration == at else ():
            os.kill(os.getpid(), number)
        return function(*rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(module, name, send)
        run(script, *flags)
    return caught.value.code


def given_up(flags, at):
    """Run a training that a second signal ends within an iteration, without a save."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signals, "ECHO", -1)  # the second comes at once
        assert signalled("jem", "train_jem", flags, at, signal.SIGINT, signal.SIGINT) == 130


def killed(flags, at):
    """Run a training that is killed within an iteration, in a process of its own."""
    command = [sys.executable, "-c", KILLED, str(at), *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    "epochs, count, unsaved",
    [(2, 4, given_up), pytest.param(4, 10, killed, marks=pytest.mark.slow)],
)
def test_a_run_that_is_stopped_at_random_points_ends_with_the_same_weights_chains_and_metrics(
    tmp_path, capsys, epochs, count, unsaved
):
    flags, whole, folder = [*FLAGS, "--epochs", epochs], tmp_path / "whole", tmp_path / "stopped"
    run("train_jem", *flags, "--out-dir", whole)
    points = sorted(random.Random(0).sample(range(1, 19 * epochs - 1), count))
    for number, point in enumerate(points):
        command = [*flags, "--out-dir", folder]
        if number % 4 == 1:
            unsaved(command, point)
            assert "and saved" not in capsys.readouterr().err
        else:
            kind = signal.SIGTERM if number % 2 else signal.SIGINT
            assert signalled("jem", "train_jem", command, point, kind) == 128 + kind
            message = capsys.readouterr().err
            assert f"stopped at iteration {point + 1} and saved" in message
            assert f"python train_jem.py --resume --out-dir {folder}" in message
            flags = ["--resume"]
    run("train_jem", "--resume", "--out-dir", folder)
    assert_the_same("jem", whole, folder)
    assert not list(folder.glob("jem.pt.*"))  # a finished run keeps one checkpoint


def test_a_classifier_that_is_stopped_within_an_epoch_goes_on_with_resume(tmp_path, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = ["--dataset", "digits", "--width", "8", "--warmup-iterations", "20", "--epochs", "3"]
    run("train_classifier", *flags, "--out-dir", whole)
    command = [*flags, "--out-dir", stopped]
    code = signalled("classifier", "train_classifier", command, 25, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert f"python train_classifier.py --resume --out-dir {stopped}" in capsys.readouterr().err
    run("train_classifier", "--resume", "--out-dir", stopped)
    assert_the_same("classifier", whole, stopped)


def test_pretraining_that_is_stopped_within_an_epoch_goes_on_with_the_same_command(
    tmp_path, capsys
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = [*TINY, "--pretrain-epochs", 3, "--epochs", 1, "--steps", 1]
    run("train_jem", *flags, "--out-dir", whole)
    command = [*flags, "--out-dir", stopped]
    code = signalled("classifier", "train_jem", command, 25, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert "the same command again" in capsys.readouterr().err
    run("train_jem", *command)
    for phase in ("classifier", "jem"):
        assert_the_same(phase, whole, stopped)


def test_a_finished_run_that_is_resumed_with_more_epochs_goes_on(tmp_path):
    run("train_jem", *SHORT, "--out-dir", tmp_path)
    run("train_jem", "--resume", "--epochs", 2, "--out-dir", tmp_path)
    assert load_checkpoint(tmp_path / "jem.pt", "jem")["training"]["iteration"] == 2 * 4
    assert [row["iteration"] for row in rows(tmp_path)] == ["4", "7", "8"]


def test_a_run_of_a_version_without_a_flag_is_refused_and_left_as_it_is(tmp_path, capsys):
    run("train_jem", *SHORT, "--out-dir", tmp_path)
    path = tmp_path / "jem.pt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["args"]["lr_floor"]
    torch.save(checkpoint, path)
    before = path.read_bytes()
    with pytest.raises(SystemExit) as caught:
        run("train_jem", "--resume", "--epochs", 2, "--out-dir", tmp_path)
    assert caught.value.code == 2
    assert "begun by another version, without --lr-floor" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_a_second_signal_does_not_wait(tmp_path, monkeypatch, capsys):
    def hang(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second signal was not heard")

    monkeypatch.setattr(train_jem, "iteration", hang)
    monkeypatch.setattr(signals, "ECHO", -1)
    with pytest.raises(SystemExit) as caught:
        run("train_jem", *FLAGS, "--out-dir", tmp_path)
    assert caught.value.code == 130 and "interrupted" in capsys.readouterr().err


def test_a_signal_that_comes_twice_at_once_is_one(tmp_path, capsys):
    command = [*FLAGS, "--out-dir", tmp_path]
    number = signal.SIGTERM
    assert signalled("jem", "train_jem", command, 3, number, number) == 128 + number
    assert "stopped at iteration 4 and saved" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "jem.pt", "jem")["training"]["iteration"] == 4


def test_a_disk_that_is_full_ends_a_run_with_one_sentence_and_the_last_checkpoint(
    tmp_path, monkeypatch, capsys
):
    write = MetricsLog.write

    def full(log, iteration, **values):
        if iteration > 20:
            raise OSError(28, "No space left on device", str(log.path))
        return write(log, iteration, **values)

    monkeypatch.setattr(MetricsLog, "write", full)
    with pytest.raises(SystemExit) as caught:
        run("train_jem", *FLAGS, "--out-dir", tmp_path)
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.strip().count("\n") == 0
    assert "No space left on device" in message and "--resume" in message
    assert load_checkpoint(tmp_path / "jem.pt", "jem")["training"]["iteration"] == 20
