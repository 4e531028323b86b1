"""Two processes train, sample and evaluate as one does: gloo on the CPU, started by torchrun as a user would."""

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import ROOT

import runs
import train_jem
from restarts import UniformRestart
from train_jem import ReplayBuffer

# No draw of its own is left to a process: the chains of an iteration are all of the buffer, and nothing has noise.
FLAGS = [
    "--dataset", "digits", "--from-scratch", "--width", "8", "--buffer-size", "64", "--reinit-prob", "0", "--noise-std", "0",
    "--input-noise", "0", "--steps", "2", "--precision", "float32", "--optimizer", "sgd", "--lr", "0.05", "--ema-decay", "0",
    "--lr-floor", "1", "--warmup-steps", "0", "--log-every", "10",
]  # fmt: skip
TORCHRUN = [
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "--",
]  # without it torchrun takes --num for one of its own
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(processes, script, *flags):
    """Start a script on so many processes."""
    command = [sys.executable, *(TORCHRUN if processes == 2 else []), script, *map(str, flags)]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def run(processes, script, *flags, code=0):
    """Run a script on so many processes; returns its stdout and stderr."""
    process = start(processes, script, *flags)
    output, errors = process.communicate(timeout=150)
    assert process.returncode == code, errors
    return output, errors


def state(folder):
    """Return a run's weights and chains as one vector each, the chains in the order of the slots."""
    checkpoint = runs.load_checkpoint(folder / "jem.pt", "jem")
    weights = torch.cat([value.flatten() for value in checkpoint["model"].values()])
    return weights, checkpoint["buffer"]["images"], checkpoint


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of two epochs on one process."""
    folder = tmp_path_factory.mktemp("parallel") / "whole"
    run(1, "train_jem.py", *FLAGS, "--epochs", 2, "--out-dir", folder)
    return folder


@pytest.mark.parametrize("processes", [(2, 2), (2, 1), (1, 2)])
def test_a_run_on_two_processes_or_resumed_on_another_number_ends_as_on_one(processes, whole, tmp_path):
    folder = tmp_path / "run"
    first, then = processes
    run(first, "train_jem.py", *FLAGS, "--epochs", 1, "--out-dir", folder)
    output, _ = run(then, "train_jem.py", "--resume", "--epochs", 2, "--out-dir", folder)
    assert output.count("test accuracy") == 1  # rank 0 alone prints
    weights, chains, checkpoint = state(folder)
    expected_weights, expected_chains, expected = state(whole)
    started = runs.build_model(**checkpoint["model_config"])
    torch.manual_seed(0)
    started = torch.cat([value.flatten() for value in runs.build_model(**checkpoint["model_config"]).state_dict().values()])
    assert (weights - started).abs().max() > 0.01  # it has learned something
    assert (weights - expected_weights).abs().max() < 1e-4
    assert (chains - expected_chains).abs().max() < 1e-4
    assert checkpoint["buffer"]["ages"].tolist() == [2 * 2 * 19] * 64 == expected["buffer"]["ages"].tolist()
    assert checkpoint["training"]["generator"].shape[0] == then
    rows, expected_rows = (runs.read_metrics(place / "metrics.csv") for place in (folder, whole))
    assert [row["step"] for row in rows] == [row["step"] for row in expected_rows] == ["10", "19", "20", "30", "38"]
    for row, other in zip(rows, expected_rows, strict=True):
        assert float(row["cross_entropy"]) == pytest.approx(float(other["cross_entropy"]), abs=1e-4)
        assert float(row["accuracy"]) == pytest.approx(float(other["accuracy"]), abs=1e-4)


def test_shares_of_a_buffer_are_disjoint_hold_all_classes_and_are_the_whole_again_together(monkeypatch):
    def fresh():
        generator = torch.Generator().manual_seed(0)
        buffer = ReplayBuffer(
            1003, UniformRestart((1, 4, 4), 10), 0.1, generator=generator, long_chains=101, long_share=0.3
        )  # fmt: skip
        buffer.ages = torch.arange(1003)  # every chain can be told from the others
        return buffer

    whole, shares = fresh(), [fresh() for _ in range(3)]
    for rank, share in enumerate(shares):
        share.keep_share(rank, 3)
        assert share.labels.unique().tolist() == list(range(10))
        slots, _, _ = share.draw(30, torch.Generator().manual_seed(rank))
        assert (slots >= len(share) - share.long_chains).sum() == 9
    assert sorted(torch.cat([share.ages for share in shares]).tolist()) != list(range(1003))  # restarted chains have age 0
    shares = [fresh() for _ in range(3)]
    for rank, share in enumerate(shares):
        share.keep_share(rank, 3)
    owned = [set(share.ages.tolist()) for share in shares]
    assert all(not one & other for one, other in [*pairwise(owned), (owned[0], owned[2])])
    assert set().union(*owned) == set(range(1003))
    assert [share.long_chains for share in shares] == [34, 34, 33]
    states = [(share.long_chains, share.state_dict()) for share in shares]
    monkeypatch.setattr(train_jem.parallel, "gathered_at_first", lambda own: states)
    for name, value in shares[0].whole_state().items():
        assert torch.equal(value, whole.state_dict()[name])


def test_processes_draw_different_noise_and_a_default_run_goes_through_pretraining_to_samples(tmp_path):
    flags = ["--width", 8, "--pretrain-epochs", 1, "--epochs", 1, "--buffer-size", 200, "--steps", 2, "--restart", "uniform"]
    run(2, "train_jem.py", *flags, "--out-dir", tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"classifier.pt", "jem.pt", "samples.png", "curves.png", "metrics.csv", "config.json"} <= names
    checkpoint = runs.load_checkpoint(tmp_path / "jem.pt", "jem")
    generators = checkpoint["training"]["generator"]
    assert len(generators) == 2 and not torch.equal(generators[0], generators[1])
    assert len(checkpoint["buffer"]["labels"]) == 200
    one, two = checkpoint["buffer"]["images"].flatten(1).split(100)
    assert torch.cdist(one, two).min() > 0.1  # no chain of the one is the other's
    steps = [int(row["step"]) for row in runs.read_metrics(tmp_path / "metrics.csv") if row["phase"] == "jem"]
    assert steps == sorted(set(steps))  # every row once


def test_a_signal_ends_all_processes_at_one_iteration_and_the_run_goes_on(tmp_path):
    process = start(2, "train_jem.py", *FLAGS, "--epochs", 10_000, "--save-steps", 5, "--out-dir", tmp_path)
    waited = time.monotonic()
    while not (tmp_path / "jem.pt").exists():
        assert process.poll() is None and time.monotonic() - waited < 120
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode and errors.count("stopped at iteration") == 2
    step = int(errors.split("stopped at iteration ")[1].split()[0])
    assert runs.load_checkpoint(tmp_path / "jem.pt", "jem")["training"]["step"] == step
    run(2, "train_jem.py", "--resume", "--epochs", step // 19 + 1, "--out-dir", tmp_path)
    assert runs.load_checkpoint(tmp_path / "jem.pt", "jem")["finished"]


def test_a_run_in_the_way_a_batch_that_cannot_be_shared_and_a_small_buffer_are_told_once(whole, tmp_path):
    for flags, words in [
        ([*FLAGS, "--out-dir", whole], "holds a finished run"),
        ([*FLAGS, "--batch-size", 63, "--out-dir", tmp_path], "--batch-size 63 cannot be shared equally among 2 processes"),
        ([*FLAGS, "--chain-batch-size", 63, "--out-dir", tmp_path], "--chain-batch-size 63 cannot be shared equally"),
        ([*FLAGS, "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ]:
        _, errors = run(2, "train_jem.py", *flags, code=1)  # torchrun's own exit code
        said = [line for line in errors.splitlines() if line.startswith("error:")]
        assert len(said) == 1 and words in said[0]


def test_two_processes_draw_the_same_images_as_one(tiny_run, tmp_path):
    flags = ["--checkpoint", tiny_run / "jem.pt", "--num", 10, "--chunk-size", 4, "--steps", 3, "--out-dir", tmp_path]
    found = []
    for processes in (1, 2):
        output, _ = run(processes, "sample.py", *flags, "--save-array", tmp_path / f"{processes}.npz")
        assert output.count("wrote") == 1
        found.append(np.load(tmp_path / f"{processes}.npz")["images"])
    assert found[0].shape == (10, 1, 8, 8) and np.array_equal(*found)
    assert len({image.tobytes() for image in found[0]}) == 10  # no block repeats another's noise


def test_two_processes_report_what_one_does(tiny_run):
    flags = ["--checkpoint", tiny_run / "jem.pt", "--dry-run", "--ood", "inverted"]
    found = []
    for processes in (1, 2):
        output, _ = run(processes, "evaluate.py", *flags)
        found.append([line for line in output.splitlines() if "minute" not in line])  # of the feature network's training
    assert "Fréchet" in str(found[0]) and found[0] == found[1]
