"""Two processes train, sample and evaluate as one does: gloo on the CPU.

The quick test starts two processes by itself, and so does the first of the slow ones; the others
use torchrun, as a user would.
"""

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from itertools import pairwise
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from conftest import ROOT, generator
from torch import distributed

from sgld_nrg.models import build_model
from sgld_nrg.support import errors, parallel
from sgld_nrg.support.checkpoints import load_checkpoint
from sgld_nrg.support.log import read_metrics
from sgld_nrg.support.restarts import UniformRestart
from sgld_nrg.train_jem import ReplayBuffer

# No draw of its own is left to a process: the chains of an iteration are all of the buffer, and
# nothing has noise.
FLAGS = [
    *("--dataset", "digits", "--from-scratch", "--width", "8", "--buffer-size", "64"),
    *("--reinit-prob", "0", "--noise-std", "0", "--input-noise", "0", "--steps", "2"),
    *("--precision", "float32", "--optimizer", "sgd", "--lr", "0.05", "--ema-decay", "0"),
    *("--lr-floor", "1", "--warmup-iterations", "0", "--log-every", "10"),
    *("--chain-batch-size", "64"),  # all of the buffer, so that no draw decides which chains move
]
UNSHARED = ["--batch-size", "63"]
MISTAKES = [  # flags, and what is said
    ([], "holds a finished run"),  # in the folder of one
    (UNSHARED, "--batch-size 63 cannot be shared equally among 2 processes"),
    (["--chain-batch-size", "63"], "--chain-batch-size 63 cannot be shared equally"),
    (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
]
# without the last word torchrun takes --num for one of its own
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]


def start(script, *flags):
    """Start a script on two processes."""
    command = [sys.executable, *TORCHRUN, f"{script}.py", *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def run(processes, script, *flags):
    """Run a script on one process, this one, or on two; return its stdout."""
    if processes == 2:
        process = start(script, *flags)
        output, said = process.communicate(timeout=150)
        assert process.returncode == 0, said
        return output
    threads, output = torch.get_num_threads(), io.StringIO()
    torch.set_num_threads(1)  # as many as each process of two has
    with redirect_stdout(output):
        conftest.run(script, *flags)
    torch.set_num_threads(threads)
    return output.getvalue()


def meeting_place(port=None):
    """Return the environment, but for the rank, in which two processes find each other."""
    if port is None:
        with socket.socket() as listener:
            listener.bind(("localhost", 0))
            port = listener.getsockname()[1]
    return {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}


def train_and_err(rank, folder, places):
    """Be one of two processes: train for an epoch, then make the mistakes; write what is said."""
    torch.set_num_threads(1)
    errors.SECONDS_TO_SAY_WHY = 0
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    cases = [["--out-dir", folder / "run"], ["--out-dir", folder / "run"]]
    cases += [["--out-dir", folder / "unused", *flags] for flags, _ in MISTAKES[1:]]
    found = []
    for place, flags in zip(places, cases, strict=True):
        os.environ |= place
        output, complaints, code = io.StringIO(), io.StringIO(), 0
        with redirect_stdout(output), redirect_stderr(complaints):
            try:
                conftest.run("train_jem", *FLAGS, "--epochs", 1, *flags)
            except SystemExit as end:
                code = end.code
        if distributed.is_initialized():
            distributed.destroy_process_group()
        found.append((code, output.getvalue(), complaints.getvalue()))
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder of two processes, with a run of one epoch; and what each of them said."""
    folder = tmp_path_factory.mktemp("parallel") / "pair"
    folder.mkdir()
    places = [meeting_place() for _ in range(1 + len(MISTAKES))]
    torch.multiprocessing.spawn(train_and_err, (folder, places), nprocs=2)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of two epochs on one process."""
    folder = tmp_path_factory.mktemp("parallel") / "whole"
    run(1, "train_jem", *FLAGS, "--epochs", 2, "--out-dir", folder)
    return folder


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="nothing is forked here")
def test_a_process_that_is_killed_is_told_and_nothing_waits_for_it(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(MemoryError, match="killed"):
        list(parallel.over_cores(lambda name: os.kill(os.getpid(), 9), "ab", torch.device("cpu")))


LONG_WORK = """
import os, signal, time, torch
from sgld_nrg.support import errors, parallel

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

def work(name):
    os.write(1, b"%d\\n" % os.getpid())  # a line at once, whoever else writes
    time.sleep(60)

@errors.exits_cleanly
def main():
    torch.set_num_threads(2)
    list(parallel.over_cores(work, ["a", "b"], torch.device("cpu")))

main()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="nothing is forked here")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_work_on_all_cores(number, code):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", LONG_WORK], text=True, **pipes)
    workers = [int(process.stdout.readline()) for _ in range(2)]
    assert process.pid not in workers
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == code and "Traceback" not in said
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)


@pytest.mark.parametrize("cores", [1, 2])
def test_work_over_cores_gives_what_it_gives_by_turns(cores, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    images = {
        name: torch.rand(50, 30, generator=generator(len(name))) for name in ["a", "bb", "ccc"]
    }

    def work(name):  # not to be pickled, and with a gradient, which forked processes may not have
        x = images[name].requires_grad_(True)
        (gradient,) = torch.autograd.grad((x @ x.t()).square().sum(), x)
        return {"sum": float(gradient.sum()), "process": os.getpid()}

    by_turns = {name: work(name)["sum"] for name in images}
    found = dict(parallel.over_cores(work, list(images), torch.device("cpu")))
    assert {name: row["sum"] for name, row in found.items()} == pytest.approx(by_turns)
    forked = sys.platform.startswith("linux") and cores > 1
    assert all((row["process"] == os.getpid()) != forked for row in found.values())


def test_an_error_in_work_over_cores_is_the_parents(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def work(name):
        raise errors.UserError(f"no {name}")

    with pytest.raises(errors.UserError, match="no b"):
        list(parallel.over_cores(work, ["b", "b"], torch.device("cpu")))


def test_processes_share_reduce_gather_and_send(tmp_path):
    place, members = meeting_place(), []
    for rank in ("0", "1"):
        environment = {**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, str(Path(__file__).with_name("group_member.py")), str(tmp_path)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        members.append(subprocess.Popen(command, env=environment, text=True, **pipes))
    said = [member.communicate(timeout=60) for member in members]
    assert [member.returncode for member in members] == [0, 0], said
    assert [output for output, _ in said] == ["said once\n", ""]

    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for rank, mine in enumerate(found):
        assert mine["place"] == (rank, 2, rank == 0)
        assert mine["share"] == 32 and mine["no share"][0] == "UserError"
        assert "--batch-size 63 cannot be shared equally among 2 processes" in mine["no share"][1]
        assert mine["largest"] == [1, 0, 0.5]
        assert mine["mean"] == {"rank": 0.5, "one": 1} and mine["mean of nothing"] == {}
        assert mine["gathered"] == [{"rank": 0}, {"rank": 1}]
        assert mine["from first"] == "made by 0"
    at_first = [(rank, state["x"].tolist()) for rank, state in found[0]["gathered at first"]]
    assert at_first == [(0, [0, 0]), (1, [1, 1])]
    assert [rank for rank, _ in found[1]["gathered at first"]] == [1]
    assert [mine["found there"] for mine in found] == [False, True]  # the first alone downloads
    ends = [mine["mistake of the first"] for mine in found]
    assert ends == [("UserError", "a mistake"), ("SystemExit", "2")]


@pytest.mark.slow
def test_a_mistake_is_told_by_the_first_process_and_ends_both(pair):
    _, (first, other) = pair
    for number, (_, words) in enumerate(MISTAKES, start=1):
        (code, _, told), (other_code, _, other_told) = first[number], other[number]
        assert code == other_code == 2
        said = [line for line in (told + other_told).splitlines() if line.startswith("error:")]
        assert len(said) == 1 and words in told and told.count("\n") == 1


@pytest.mark.slow
def test_torchrun_ends_the_other_process_before_it_tells_the_mistake_again(tmp_path):
    process = start("train_jem", *FLAGS, *UNSHARED, "--out-dir", tmp_path)
    _, errors = process.communicate(timeout=150)
    assert process.returncode == 1  # torchrun's own exit code
    said = [line for line in errors.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and "--batch-size 63 cannot be shared equally" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [(2, 2), (2, 1), (1, 2)])
def test_a_run_on_two_processes_or_resumed_on_another_number_ends_as_on_one(
    first, then, pair, whole, tmp_path
):
    folder = tmp_path / "run"
    if first == 2:
        begun, found = pair
        shutil.copytree(begun / "run", folder)
        printed = [output.count("test accuracy") for (_, output, _), *_ in found]
        assert printed == [1, 0]  # rank 0 alone prints
    else:
        run(1, "train_jem", *FLAGS, "--epochs", 1, "--out-dir", folder)
    output = run(then, "train_jem", "--resume", "--epochs", 2, "--out-dir", folder)
    assert output.count("test accuracy") == 1
    expected, checkpoint = (load_checkpoint(each / "jem.pt", "jem") for each in (whole, folder))
    torch.manual_seed(0)
    started = _flat(build_model(**checkpoint["model_config"]).state_dict())
    weights, expected_weights = _flat(checkpoint["model"]), _flat(expected["model"])
    assert (weights - started).abs().max() > 0.01  # it has learned something
    assert (weights - expected_weights).abs().max() < 1e-4
    chains, expected_chains = (each["buffer"]["images"] for each in (checkpoint, expected))
    assert (chains - expected_chains).abs().max() < 1e-4
    ages, expected_ages = (each["buffer"]["ages"].tolist() for each in (checkpoint, expected))
    assert ages == [2 * 2 * 19] * 64 == expected_ages
    assert checkpoint["training"]["generator"].shape[0] == then
    rows, expected_rows = (read_metrics(each / "metrics.csv") for each in (folder, whole))
    iterations, expected_iterations = (
        [row["iteration"] for row in each] for each in (rows, expected_rows)
    )
    assert iterations == expected_iterations == ["10", "19", "20", "30", "38"]
    for row, other in zip(rows, expected_rows, strict=True):
        for name in ("cross_entropy", "accuracy"):
            assert float(row[name]) == pytest.approx(float(other[name]), abs=1e-4)


def _flat(state):
    return torch.cat([value.flatten() for value in state.values()])


class Rank(parallel.Alone):
    """One of several processes of which there is but this one."""

    def __init__(self, rank, count):
        self.rank, self.count = rank, count


def test_shares_of_a_buffer_are_disjoint_hold_all_classes_and_are_the_whole_again_together():
    def fresh():
        restart = UniformRestart((1, 4, 4), 10)
        chains = {"long_chains": 101, "long_share": 0.3}
        buffer = ReplayBuffer(1003, restart, 0.1, generator=generator(), **chains)
        buffer.ages = torch.arange(1003)  # every chain can be told from the others
        return buffer

    whole, shares = fresh(), [fresh() for _ in range(3)]
    ranks = [Rank(rank, 3) for rank in range(3)]
    for rank, share in zip(ranks, shares, strict=True):
        parallel.keep_share(share, rank)
        assert share.labels.unique().tolist() == list(range(10))
    owned = [set(share.ages.tolist()) for share in shares]
    assert all(not one & other for one, other in [*pairwise(owned), (owned[0], owned[2])])
    assert set().union(*owned) == set(range(1003))
    assert [share.long_chains for share in shares] == [34, 34, 33]
    states = [(share.long_chains, share.state_dict()) for share in shares]
    ranks[0].gathered_at_first = lambda own: states
    for name, value in parallel.whole_state(shares[0], ranks[0]).items():
        assert torch.equal(value, whole.state_dict()[name])
    for rank, share in enumerate(shares):
        slots, _, _ = share.draw(30, generator(rank))
        assert (slots >= len(share) - share.long_chains).sum() == 9
    ages = torch.cat([share.ages for share in shares])
    assert sorted(ages.tolist()) != list(range(1003))  # restarted chains have age 0


@pytest.mark.slow
def test_processes_draw_different_noise_and_a_default_run_goes_through_pretraining_to_samples(
    tmp_path,
):
    flags = ["--width", 8, "--pretrain-epochs", 1, "--epochs", 1, "--buffer-size", 200]
    run(2, "train_jem", *flags, "--steps", 2, "--restart", "uniform", "--out-dir", tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    written = {"classifier.pt", "jem.pt", "samples.png", "curves.png", "metrics.csv", "config.json"}
    assert written <= names
    checkpoint = load_checkpoint(tmp_path / "jem.pt", "jem")
    generators = checkpoint["training"]["generator"]
    assert len(generators) == 2 and not torch.equal(generators[0], generators[1])
    assert len(checkpoint["buffer"]["labels"]) == 200
    one, two = checkpoint["buffer"]["images"].flatten(1).split(100)
    assert torch.cdist(one, two).min() > 0.1  # no chain of the one is the other's
    rows = [row for row in read_metrics(tmp_path / "metrics.csv") if row["phase"] == "jem"]
    iterations = [int(row["iteration"]) for row in rows]
    assert iterations == sorted(set(iterations))  # every row once


@pytest.mark.slow
def test_a_signal_ends_all_processes_at_one_iteration_and_the_run_goes_on(tmp_path):
    endless = ["--epochs", 10_000, "--save-iterations", 5, "--out-dir", tmp_path]
    process = start("train_jem", *FLAGS, *endless)
    waited = time.monotonic()
    while not (tmp_path / "jem.pt").exists():
        assert process.poll() is None and time.monotonic() - waited < 120
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode and errors.count("stopped at iteration") == 2
    iteration = int(errors.split("stopped at iteration ")[1].split()[0])
    stopped = load_checkpoint(tmp_path / "jem.pt", "jem")
    assert stopped["training"]["iteration"] == iteration
    run(2, "train_jem", "--resume", "--epochs", iteration // 19 + 1, "--out-dir", tmp_path)
    assert load_checkpoint(tmp_path / "jem.pt", "jem")["finished"]


@pytest.mark.slow
def test_two_processes_draw_the_same_images_as_one(tiny_run, tmp_path):
    flags = ["--checkpoint", tiny_run / "jem.pt", "--num", 10, "--chunk-size", 4, "--steps", 3]
    found = []
    for processes in (1, 2):
        path = tmp_path / f"{processes}.npz"
        output = run(processes, "sample", *flags, "--out-dir", tmp_path, "--save-array", path)
        assert output.count("wrote") == 1
        found.append(np.load(path)["images"])
    assert found[0].shape == (10, 1, 8, 8) and np.array_equal(*found)
    assert len({image.tobytes() for image in found[0]}) == 10  # no block repeats another's noise


@pytest.mark.slow
def test_two_processes_report_what_one_does(tiny_run):
    flags = ["--checkpoint", tiny_run / "jem.pt", "--dry-run", "--ood", "inverted"]
    found = []
    for processes in (1, 2):
        found.append(run(processes, "evaluate", *flags).splitlines())
    assert "Fréchet" in str(found[0]) and found[0] == found[1]
