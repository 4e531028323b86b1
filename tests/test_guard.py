"""Divergence is found where it happens, healthy runs are left alone, one taken back recovers."""

import math
import random
import re
import signal

import pytest
import torch
from conftest import TINY, run, training

from sgld_nrg import train_jem
from sgld_nrg.support.checkpoints import load_checkpoint
from sgld_nrg.support.commands import parse
from sgld_nrg.support.guard import (
    GAP,
    ROWS,
    SETTLED_ROWS,
    SNAPSHOT_ROWS,
    Diverged,
    Guard,
    Healthy,
    largest_gap,
    remedied,
)
from sgld_nrg.support.log import read_metrics
from sgld_nrg.support.restarts import UniformRestart
from sgld_nrg.train_jem import ReplayBuffer

pytestmark = pytest.mark.usefixtures("no_curves")

HEALTHY = {"energy_gap": 0.3, "energy_positive": -1.0, "accuracy": 0.95, "chain_saturated": 0.6}
DIVERGING = [*TINY, "--from-scratch", "--lr", "1e30", "--warmup-iterations", "0"]


def settled():
    guard = Guard()
    for _ in range(SETTLED_ROWS):
        guard.judge(HEALTHY)
    return guard


def test_healthy_rows_raise_no_alarm_from_a_rough_start_on():
    guard, noise = Guard(), random.Random(0)
    kept = []
    for number in range(1000):
        # the first hundreds of iterations of a pretrained classifier look like this
        start = 60 * math.exp(-number / 5)
        row = {
            "energy_gap": 0.7 * start + noise.gauss(0, 0.5),
            "energy_positive": -1.4 * start + noise.gauss(0, 2),
            "accuracy": 0.6 + 0.35 * (1 - math.exp(-number / 20)),
            "chain_saturated": noise.uniform(0.1, 0.7),
        }
        kept.append(guard.judge(row))
    assert 90 <= sum(kept) <= 1000 / SNAPSHOT_ROWS and not any(kept[:SNAPSHOT_ROWS])


@pytest.mark.parametrize(
    "change, says",
    [
        ({"energy_gap": 9.0}, "energy gap 9"),
        ({"energy_gap": -9.0}, "energy gap -9"),
        ({"energy_positive": 80.0}, "energy level 80"),
        ({"energy_positive": -80.0}, "energy level -80"),
        ({"accuracy": 0.4}, "accuracy 0.4 after 0.95"),
        ({"chain_saturated": 0.99}, "saturated chains 0.99"),
    ],
)
def test_each_way_out_of_the_healthy_range_is_an_alarm_when_it_lasts(change, says):
    guard = settled()
    for _ in range(10):  # now and then a row is no alarm
        assert not guard.judge({**HEALTHY, **change})
        guard.judge(HEALTHY)
    for _ in range(ROWS - 1):
        assert not guard.judge({**HEALTHY, **change})
    with pytest.raises(Diverged, match=says):
        guard.judge({**HEALTHY, **change})


def test_a_gap_that_has_not_stayed_near_zero_yet_is_no_alarm():
    guard = Guard()
    for row in range(50):
        gap = 0 if row % SETTLED_ROWS == 0 else 5 * GAP
        assert not guard.judge({**HEALTHY, "energy_gap": gap})


def test_a_gap_at_the_regularisers_limit_is_an_alarm_though_it_never_was_small():
    args = parse("train_jem", ["--p-x-weight", "0.15", "--energy-reg", "1e-4"])
    limit, guard = largest_gap(args), Guard()
    energies = torch.zeros(2, requires_grad=True)
    with torch.enable_grad():  # there the loss is stationary
        at = energies + torch.tensor([-limit / 2, limit / 2])
        loss = 0.15 * train_jem.energy_loss(at[:1], at[1:])
        loss = loss + 1e-4 * train_jem.energy_regulariser(at[:1], at[1:])
    slope = torch.autograd.grad(loss, energies)[0]
    torch.testing.assert_close(slope, torch.zeros(2), atol=1e-6, rtol=0)
    assert largest_gap(parse("train_jem", ["--energy-reg", "0"])) == math.inf
    for _ in range(2 * ROWS):
        # chains from uniform noise may stay as far
        guard.judge({**HEALTHY, "energy_gap": 0.65 * limit}, limit)
        # a strong regulariser is no fault
        guard.judge({**HEALTHY, "energy_gap": 0.97 * GAP}, GAP / 2)
    for _ in range(ROWS - 1):
        guard.judge({**HEALTHY, "energy_gap": 0.97 * limit}, limit)
    with pytest.raises(Diverged, match="as large as the regulariser allows"):
        guard.judge({**HEALTHY, "energy_gap": 0.97 * limit}, limit)


def test_the_memory_survives_its_state_dict():
    guard, other = settled(), Guard()
    guard.judge({**HEALTHY, "energy_gap": 20})
    other.load_state_dict(guard.state_dict())
    assert vars(other) == vars(guard) and other.out == 1


def test_the_remedies_escalate_and_leave_the_flags_alone():
    args = parse("train_jem", [*TINY, "--first-steps", "4", "--steps", "10"])
    changed = [remedied(args, number) for number in range(1, 5)]
    assert [(now.lr / args.lr, now.first_steps, now.steps, now.energy_reg) for now in changed] == [
        (1 / 2, 4, 10, 0.001),
        (1 / 4, 8, 20, 0.001),
        (1 / 8, 8, 20, 0.01),
        (1 / 16, 8, 20, 0.01),
    ]
    assert args.lr == 1e-3 and args.steps == 10


def nan_weights(job, buffer, images):
    job.model.head.weight.data[0] = math.nan


def poisoned_chains(job, buffer, images):
    buffer.images[::3] = math.nan


def hostile_batch(job, buffer, images):
    images.fill_(math.nan)


def exploding_step(job, buffer, images):
    for parameter in job.model.parameters():
        parameter.data *= 1e6


SABOTAGED = [*TINY, "--from-scratch", "--lr", "6e-3", "--steps", "2", "--log-every", "2"]
SABOTAGED += ["--chain-batch-size", "16"]


def sabotage(patch, damage, at=50):
    """Do damage once, in an iteration of the training to come; returns a list: when it was done."""
    iteration, done = train_jem.iteration, []

    def sabotaged(job, buffer, langevin, steps, images, labels):
        if job.iteration == at and not done:
            done.append(at)
            damage(job, buffer, images)
        return iteration(job, buffer, langevin, steps, images, labels)

    patch.setattr(train_jem, "iteration", sabotaged)
    return done


@pytest.mark.parametrize("damage", [nan_weights, poisoned_chains, hostile_batch, exploding_step])
def test_a_run_that_is_damaged_once_recovers_and_records_it(tmp_path, monkeypatch, capsys, damage):
    damaged = sabotage(monkeypatch, damage)
    run("train_jem", *SABOTAGED, "--out-dir", tmp_path)
    told = capsys.readouterr()
    assert damaged and "training left its healthy range at iteration" in told.err
    assert "rollback 1 of 4: lr 0.003, steps 2" in told.err
    checkpoint = load_checkpoint(tmp_path / "jem.pt", "jem")
    assert checkpoint["finished"] and checkpoint["training"]["rollbacks"] >= 1
    assert all(torch.isfinite(value).all() for value in checkpoint["model"].values())
    assert torch.isfinite(checkpoint["buffer"]["images"]).all()
    assert float(re.search(r"test accuracy: ([\d.]+) %", told.out)[1]) > 80
    rows = read_metrics(tmp_path / "metrics.csv")
    iterations = [int(row["iteration"]) for row in rows]
    assert iterations == sorted(set(iterations))
    assert {"0", "1"} <= {row["rollbacks"] for row in rows}
    assert not list(tmp_path.glob("healthy-*"))  # a finished run goes back to none


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch, capsys):
    iteration = train_jem.iteration

    def poisoned(job, *rest):
        values = iteration(job, *rest)
        if job.iteration == 2 and not job.rollbacks:
            job.model.head.bias.grad[0] = math.nan
        return values

    monkeypatch.setattr(train_jem, "iteration", poisoned)
    flags = "--from-scratch --steps 1 --batch-size 314 --epochs 1 --save-iterations 1"
    run("train_jem", *TINY, *flags.split(), "--out-dir", tmp_path / "jem")
    assert "iteration 3: weight head.bias is not finite" in capsys.readouterr().err
    checkpoint = load_checkpoint(tmp_path / "jem" / "jem.pt", "jem")
    assert checkpoint["finished"] and checkpoint["training"]["rollbacks"] == 1

    flags = "--dataset digits --width 8 --lr 1e30 --warmup-iterations 0 --save-iterations 1"
    with pytest.raises(SystemExit) as caught:
        run("train_classifier", *flags.split(), "--out-dir", tmp_path)
    message = capsys.readouterr().err
    assert caught.value.code == 1 and re.search(r"^error: weight \S+ is not finite", message)
    saved = load_checkpoint(tmp_path / "classifier.pt", "classifier")["training"]["model"]
    assert all(torch.isfinite(value).all() for value in saved.values())


def test_a_signal_in_an_iteration_that_diverges_finds_the_run_saved(tmp_path, monkeypatch, capsys):
    iteration = train_jem.iteration

    def both_at_once(job, *rest):
        if job.iteration == 2:
            job.signals.pending = signal.SIGTERM
            raise FloatingPointError("damage")
        return iteration(job, *rest)

    monkeypatch.setattr(train_jem, "iteration", both_at_once)
    with pytest.raises(SystemExit) as caught:
        run("train_jem", *TINY, "--from-scratch", "--steps", 1, "--out-dir", tmp_path)
    message = capsys.readouterr().err
    assert caught.value.code == 128 + signal.SIGTERM
    step = int(re.search(r"stopped at iteration (\d+) and saved", message)[1])
    training_state = load_checkpoint(tmp_path / "jem.pt", "jem")["training"]
    assert (training_state["iteration"], training_state["rollbacks"]) == (step, 1)


def test_a_resumed_run_goes_back_to_the_states_of_the_stopped_one(tmp_path, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = [*SABOTAGED, "--epochs", "3"]
    with pytest.MonkeyPatch.context() as patch:
        sabotage(patch, nan_weights)
        run("train_jem", *flags, "--out-dir", whole)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        sabotage(patch, lambda *_: signal.raise_signal(signal.SIGTERM), at=44)
        run("train_jem", *flags, "--out-dir", stopped)
    remembered, seen, judge = load_checkpoint(stopped / "jem.pt", "jem")["guard"], [], Guard.judge

    def watched(guard, *row):
        seen.append(guard.state_dict())
        return judge(guard, *row)

    with pytest.MonkeyPatch.context() as patch:
        sabotage(patch, nan_weights)
        patch.setattr(Guard, "judge", watched)
        run("train_jem", "--resume", "--out-dir", stopped)
    assert seen[0] == remembered != vars(Guard())
    went_back = re.findall(r"back to iteration (\d+)", capsys.readouterr().err)
    assert len(went_back) == 2 and went_back[0] == went_back[1] and int(went_back[0]) > 0
    one, other = (load_checkpoint(folder / "jem.pt", "jem") for folder in (whole, stopped))
    for part in ("model", "buffer"):
        assert all(torch.equal(value, other[part][name]) for name, value in one[part].items())


def test_a_run_that_goes_the_same_way_after_a_rollback_is_found_again(tmp_path, digits):
    job = training(digits, tmp_path)
    job.open()
    guard, buffer = Guard(), ReplayBuffer(64, UniformRestart(digits.shape, 10), 0.0)
    healthy = Healthy(job, buffer, guard)
    healthy.keep()
    guard.load_state_dict(settled().state_dict())
    for rollbacks in (1, 2):
        job.iteration = 100
        healthy.keep()
        for _ in range(ROWS - 1):
            guard.judge({**HEALTHY, "energy_gap": 9.0})
        with pytest.raises(Diverged) as caught:
            guard.judge({**HEALTHY, "energy_gap": 9.0})
        job.iteration = 110
        healthy.roll_back(caught.value)
        assert job.rollbacks == rollbacks and job.iteration == 100
        assert guard.out == 0 and guard.near == SETTLED_ROWS
    healthy.roll_back(Diverged("once more"))
    assert job.iteration == 0 and guard.near == 0  # each state is gone back to once


def test_chains_that_are_broken_in_a_healthy_state_restart_at_a_rollback(tmp_path, digits):
    job = training(digits, tmp_path)
    job.open()
    buffer = ReplayBuffer(64, UniformRestart(digits.shape, 10), 0.0)
    buffer.images[3], buffer.images[40, 0, 0, 0] = math.nan, math.inf
    buffer.ages.fill_(5)
    before = buffer.images.clone()
    healthy = Healthy(job, buffer, Guard())
    healthy.keep()
    healthy.roll_back(Diverged("damage"))
    whole = torch.isfinite(before).flatten(1).all(1)
    assert whole.sum() == 62 and torch.equal(buffer.images[whole], before[whole])
    assert buffer.images.abs().max() <= 1  # no NaN either
    assert buffer.ages.tolist() == torch.where(whole, 5, 0).tolist()


def test_without_the_guard_only_what_is_not_finite_ends_a_run_and_is_named(
    tmp_path, monkeypatch, capsys
):
    def judge(*_):
        raise Diverged("never asked")

    monkeypatch.setattr(Guard, "judge", judge)
    flags = "--epochs 1 --batch-size 314 --no-guard --log-every 2"
    well = [*TINY, "--from-scratch", *flags.split(), "--out-dir", tmp_path / "well"]
    run("train_jem", *well)
    assert load_checkpoint(tmp_path / "well" / "jem.pt", "jem")["finished"]
    with pytest.raises(SystemExit) as caught:
        run("train_jem", *DIVERGING, "--no-guard", "--log-every", 2, "--out-dir", tmp_path / "ill")
    message = capsys.readouterr().err
    assert caught.value.code == 1
    diagnosis = r"^error: training diverged at iteration \d+: .* not finite .*--lr"
    assert re.search(diagnosis, message) and "after 0 rollbacks" in message


def test_a_run_that_diverges_again_and_again_is_given_up_with_a_diagnosis(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run("train_jem", *DIVERGING, "--max-rollbacks", 2, "--out-dir", tmp_path)
    lines = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 1 and len(lines) == 3
    assert "after 2 rollbacks" in lines[2] and "lower --lr" in lines[2]
