"""Divergence is found where it happens, healthy training is left alone, and a run that is taken back recovers."""

import math
import random
import re
from collections import deque

import pytest
import torch
from conftest import TINY

import runs
import train_jem
from guard import GAP, ROWS, SETTLED_ROWS, SNAPSHOT_ROWS, Diverged, Guard, largest_gap, remedied, roll_back, snapshot

HEALTHY = {"energy_gap": 0.3, "energy_positive": -1.0, "accuracy": 0.95, "chain_saturated": 0.6}


def settled():
    guard = Guard()
    for _ in range(SETTLED_ROWS):
        guard.judge(HEALTHY)
    return guard


def test_healthy_rows_raise_no_alarm_from_a_rough_start_on():
    guard, noise = Guard(), random.Random(0)
    kept = []
    for step in range(1000):
        start = 60 * math.exp(-step / 5)  # the first hundreds of iterations of a pretrained classifier look like this
        row = {
            "energy_gap": 0.7 * start + noise.gauss(0, 0.5), "energy_positive": -1.4 * start + noise.gauss(0, 2),
            "accuracy": 0.6 + 0.35 * (1 - math.exp(-step / 20)), "chain_saturated": noise.uniform(0.1, 0.7),
        }  # fmt: skip
        kept.append(guard.judge(row))
    assert 90 <= sum(kept) <= 1000 / SNAPSHOT_ROWS and not any(kept[:SNAPSHOT_ROWS])


@pytest.mark.parametrize(
    "change, says",
    [({"energy_gap": 9.0}, "energy gap 9"), ({"energy_gap": -9.0}, "energy gap -9"),
     ({"energy_positive": 80.0}, "energy level"),
     ({"accuracy": 0.4}, "accuracy 0.4 after 0.95"), ({"chain_saturated": 0.99}, "saturated chains 0.99")],
)  # fmt: skip
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
        assert not guard.judge({**HEALTHY, "energy_gap": 0 if row % SETTLED_ROWS == 0 else 5 * GAP})


def test_the_memory_survives_its_state_dict():
    guard, other = settled(), Guard()
    guard.judge({**HEALTHY, "energy_gap": 20})
    other.load_state_dict(guard.state_dict())
    assert vars(other) == vars(guard) and other.out == 1


def test_the_remedies_escalate_and_leave_the_flags_alone():
    args = train_jem.parse_args([*TINY, "--first-steps", "4", "--steps", "10"])
    changed = [remedied(args, n) for n in range(1, 5)]
    table = [(now.lr / args.lr, now.first_steps, now.steps, now.energy_reg) for now in changed]
    assert table == [(1 / 2, 4, 10, 0.001), (1 / 4, 8, 20, 0.001), (1 / 8, 8, 20, 0.01), (1 / 16, 8, 20, 0.01)]
    assert args.lr == 1e-3 and args.steps == 10


def nan_weights(run, buffer, images):
    run.model.head.weight.data[0] = math.nan


def poisoned_chains(run, buffer, images):
    buffer.images[::3] = math.nan


def test_a_gap_at_the_regularisers_limit_is_an_alarm_though_it_never_was_small():
    args = train_jem.parse_args(["--p-x-weight", "0.15", "--energy-reg", "1e-4"])
    limit, guard = largest_gap(args), Guard()
    energies = torch.zeros(2, requires_grad=True)
    with torch.enable_grad():  # there the loss is stationary
        at = energies + torch.tensor([-limit / 2, limit / 2])
        loss = 0.15 * train_jem.energy_loss(at[:1], at[1:]) + 1e-4 * train_jem.energy_regulariser(at[:1], at[1:])
    torch.testing.assert_close(torch.autograd.grad(loss, energies)[0], torch.zeros(2), atol=1e-6, rtol=0)
    assert largest_gap(train_jem.parse_args(["--energy-reg", "0"])) == math.inf
    for _ in range(2 * ROWS):
        guard.judge({**HEALTHY, "energy_gap": 0.65 * limit}, limit)  # chains from uniform noise may stay as far
        guard.judge({**HEALTHY, "energy_gap": 0.97 * GAP}, GAP / 2)  # a strong regulariser is no fault
    for _ in range(ROWS - 1):
        guard.judge({**HEALTHY, "energy_gap": 0.97 * limit}, limit)
    with pytest.raises(Diverged, match="as large as the regulariser allows"):
        guard.judge({**HEALTHY, "energy_gap": 0.97 * limit}, limit)


def hostile_batch(run, buffer, images):
    images.fill_(math.nan)


def exploding_step(run, buffer, images):
    for parameter in run.model.parameters():
        parameter.data *= 1e6


@pytest.mark.parametrize("damage", [nan_weights, poisoned_chains, hostile_batch, exploding_step])
def test_a_run_that_is_damaged_once_recovers_and_records_it(tmp_path, monkeypatch, capsys, damage):
    iterate, damaged = train_jem.iterate, []

    def sabotaged(run, buffer, images, labels):
        if run.step == 50 and not damaged:
            damaged.append(True)
            damage(run, buffer, images)
        iterate(run, buffer, images, labels)

    monkeypatch.setattr(train_jem, "iterate", sabotaged)
    train_jem.main([*TINY, "--from-scratch", "--epochs", "12", "--log-every", "2", "--out-dir", str(tmp_path)])
    told = capsys.readouterr()
    assert damaged and "training left its healthy range at iteration" in told.err and "rollback 1 of 4: lr 0.0005" in told.err
    checkpoint = runs.load_checkpoint(tmp_path / "jem.pt", "jem")
    assert checkpoint["finished"] and checkpoint["training"]["rollbacks"] >= 1
    assert all(torch.isfinite(value).all() for value in checkpoint["model"].values())
    assert torch.isfinite(checkpoint["buffer"]["images"]).all()
    assert float(re.search(r"test accuracy: ([\d.]+) %", told.out)[1]) > 80
    rows = runs.read_metrics(tmp_path / "metrics.csv")
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(set(steps)) and {"0", "1"} <= {row["rollbacks"] for row in rows}


def test_a_run_that_goes_the_same_way_after_a_rollback_is_found_again():
    class Part:
        """Stands for a run, or its buffer, of which nothing but the guard matters here."""

        rollbacks, step = 0, 100
        args = settings = train_jem.parse_args(TINY)
        generator = None

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

        restart_broken = load_state_dict

        def roll_back(self, state, rollbacks):
            self.rollbacks = rollbacks

    run, guard = Part(), settled()
    healthy = deque([snapshot(run, run, Guard()), snapshot(run, run, guard)])
    for rollbacks in (1, 2):
        for _ in range(ROWS - 1):
            guard.judge({**HEALTHY, "energy_gap": 9.0})
        with pytest.raises(Diverged) as caught:
            guard.judge({**HEALTHY, "energy_gap": 9.0})
        healthy = deque([healthy[0], snapshot(run, run, settled())])
        roll_back(run, run, guard, healthy, caught.value)
        assert run.rollbacks == rollbacks and guard.out == 0 and guard.near == SETTLED_ROWS


def test_without_the_guard_only_what_is_not_finite_ends_a_run(tmp_path, monkeypatch, capsys):
    def judge(*_):
        raise Diverged("never asked")

    monkeypatch.setattr(Guard, "judge", judge)
    flags = [*TINY, "--from-scratch", "--epochs", "1", "--no-guard", "--log-every", "2"]
    train_jem.main([*flags, "--out-dir", str(tmp_path / "well")])
    with pytest.raises(SystemExit) as caught:
        train_jem.main([*flags, "--lr", "1e30", "--warmup-steps", "0", "--out-dir", str(tmp_path / "ill")])
    assert caught.value.code == 1 and "after 0 rollbacks" in capsys.readouterr().err


def test_a_run_that_diverges_again_and_again_is_given_up_with_a_diagnosis(tmp_path, capsys):
    flags = ["--lr", "1e30", "--warmup-steps", "0", "--max-rollbacks", "2", "--out-dir", str(tmp_path)]
    with pytest.raises(SystemExit) as caught:
        train_jem.main([*TINY, "--from-scratch", *flags])
    lines = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 1 and len(lines) == 3
    assert "after 2 rollbacks" in lines[2] and "lower --lr" in lines[2]
