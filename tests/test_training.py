"""The plumbing of a training: order of the data, schedule, budget, averaging, files."""

import time
from argparse import Namespace
from itertools import islice

import pytest
import torch
from conftest import TINY, generator, run, training

from sgld_nrg.models import SmallCNN
from sgld_nrg.support import journal, plots
from sgld_nrg.support.augment import add_noise, augmented
from sgld_nrg.support.checkpoints import load_checkpoint
from sgld_nrg.support.commands import parse
from sgld_nrg.support.devices import pick_precision
from sgld_nrg.support.journal import Journal
from sgld_nrg.support.log import MetricsLog
from sgld_nrg.support.parallel import Alone
from sgld_nrg.support.schedule import Budget, epoch_order, learning_rate


def test_an_epoch_visits_every_image_once_in_an_order_of_its_own():
    first, second = epoch_order(50, 0, 0), epoch_order(50, 0, 1)
    assert first.sort().values.tolist() == list(range(50)) and not torch.equal(first, second)
    assert torch.equal(first, epoch_order(50, 0, 0))
    assert not torch.equal(first, epoch_order(50, 1, 0))


def test_the_learning_rate_rises_then_falls_to_its_floor_on_a_half_cosine():
    args = Namespace(lr=2.0, warmup_iterations=4, lr_floor=0.0)
    assert [learning_rate(args, number, 0) for number in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert learning_rate(args, 9, 0.5) == pytest.approx(1.0)
    assert learning_rate(args, 9, 1) == pytest.approx(0)
    with_floor = Namespace(lr=2.0, warmup_iterations=0, lr_floor=0.2)
    rates = [learning_rate(with_floor, 0, progress) for progress in (0, 0.5, 1)]
    assert rates == pytest.approx([2.0, 1.2, 0.4])


def test_batches_come_in_epochs_with_noise_of_the_given_size(tmp_path, digits):
    flags = "--epochs 1 --input-noise 0.5 --batch-size 100"
    job = training(digits, tmp_path, *flags.split())
    seen, noise = [], []
    for images, labels in job.batches():
        order = epoch_order(1257, 0, 0)[job.iteration * 100 : (job.iteration + 1) * 100]
        assert torch.equal(labels, digits.train.labels[order])
        seen.append(order)
        assert torch.equal(images, digits.train.images[order])
        noise.append(add_noise(images, job.args.input_noise, job.generator) - images)
        job.backward(job.model(images).sum() * 0)
        job.update({})
    assert len(seen) == 12 and len(torch.cat(seen).unique()) == 1200
    noise = torch.cat(noise)
    assert abs(noise.std() / 0.5 - 1) < 5 * (2 * noise.numel()) ** -0.5


def test_the_cross_entropy_sees_images_that_are_augmented_and_then_noisy(digits):
    args = parse("train_jem", ["--augment", "0", "--input-noise", "0"])
    images, source = digits.train.images[:100], generator()
    assert torch.equal(augmented(images, args, source), images)
    args.augment, args.input_noise = 1, 0.5
    moved = augmented(images, args, source) - images
    assert moved.std() > 0.51  # more than the noise alone
    assert moved.abs().max() > 2  # noise on top: nothing clamps it


def test_a_budget_of_minutes_ends_a_run_with_the_schedule_complete(tmp_path, digits, monkeypatch):
    clock = iter(range(10_000))
    job = training(digits, tmp_path, "--max-minutes", "10", max_minutes=10)
    monkeypatch.setattr(job.budget, "minutes", lambda: next(clock) / 2)
    rates = []
    for images, _ in job.batches():
        job.backward(job.model(images).square().mean())
        job.update({})
        rates.append(job.lr)
    assert len(rates) == 20 and rates[-1] < 0.05 * max(rates) and job.progress == 1


@pytest.mark.usefixtures("no_curves")
def test_a_budget_that_is_spent_before_the_first_iteration_still_gives_a_checkpoint(tmp_path):
    run("train_jem", *TINY, "--max-minutes", "0.0001", "--out-dir", tmp_path)
    for phase in ("classifier", "jem"):
        checkpoint = load_checkpoint(tmp_path / f"{phase}.pt", phase)
        assert checkpoint["finished"] and checkpoint["training"]["iteration"] == 1


def test_checkpoints_are_written_between_the_ends_of_epochs_too(tmp_path, monkeypatch):
    saved = []

    def save(self, checkpoint):
        saved.append(checkpoint["training"]["iteration"])

    monkeypatch.setattr(Journal, "save", save)
    flags = "--from-scratch --epochs 1 --steps 1 --save-minutes 1e-9"
    run("train_jem", *TINY, *flags.split(), "--out-dir", tmp_path)
    assert saved == list(range(1, 20))


def test_epochs_and_minutes_together_end_with_whichever_comes_first(tmp_path, digits):
    flags = "--epochs 2 --max-minutes 1000"
    job = training(digits, tmp_path, *flags.split(), max_minutes=1000)
    assert job.budget.progress(job.epoch_iterations) == 0.5
    job.budget.minutes_before = 750
    assert job.budget.progress(job.epoch_iterations) == pytest.approx(0.75, abs=0.01)
    assert parse("train_jem", ["--max-minutes", "3"]).epochs is None


def test_the_minutes_of_a_run_count_from_the_scripts_start_and_go_on_when_it_is_resumed():
    budget = Budget(None, 10, time.perf_counter() - 90)
    assert budget.minutes() == pytest.approx(1.5, abs=0.1)
    budget.minutes_before = 3
    assert budget.minutes() == pytest.approx(4.5, abs=0.1)
    assert budget.progress(7) == pytest.approx(0.45, abs=0.01)


def test_a_row_has_the_iterations_a_second_that_the_loop_makes(tmp_path, digits):
    job = training(digits, tmp_path, "--epochs", "1")
    job.open()
    began = time.perf_counter()
    for _ in islice(job.batches(), 5):
        time.sleep(0.01)
        job.backward(job.model.head.bias.sum())
        job.update({})
    rate = job.write_row()["iterations_per_second"]
    assert 5 / (time.perf_counter() - began) < rate < 1 / 0.01


def test_averaged_weights_follow_the_closed_form(tmp_path, digits):
    flags = "--ema-decay 0.3 --epochs 1 --lr 0.1 --warmup-iterations 0"  # far apart
    job = training(digits, tmp_path, *flags.split())
    bias, expected = job.model.head.bias, 0
    decays = (0, 2 / 11, 3 / 12, 0.3, 0.3)  # it begins with the first weights
    for decay, _ in zip(decays, job.batches(), strict=False):
        job.backward(bias.sum())
        job.update({})
        expected = decay * expected + (1 - decay) * bias.detach()
        torch.testing.assert_close(job.averaged.head.bias.detach(), expected)
    without = training(digits, tmp_path, "--ema-decay", "0")
    assert without.averaged is without.model and isinstance(without.model, SmallCNN)


def test_every_rollback_to_a_state_goes_on_with_noise_of_its_own(tmp_path, digits):
    job = training(digits, tmp_path)
    job.open()
    state = job.state_dict()

    def draw():
        return torch.rand(4, generator=job.generator).tolist()

    draws = [draw()]
    for rollbacks in (1, 2, 3):
        job.roll_back(state, rollbacks)
        draws.append(draw())
    job.roll_back(state, 1)
    assert len(set(map(tuple, draws))) == 4 and draw() == draws[1]


def test_the_norm_of_the_weight_gradient_is_clipped(tmp_path, digits):
    job = training(digits, tmp_path, "--max-grad-norm", "0.5")
    job.backward(1000 * job.model(digits.train.images[:64]).square().sum())
    norm = sum(parameter.grad.square().sum() for parameter in job.model.parameters()) ** 0.5
    assert norm == pytest.approx(0.5, rel=1e-4)


def test_nothing_is_written_before_a_training_is_opened(tmp_path, digits):
    job = training(digits, tmp_path, "--tensorboard")
    MetricsLog("jem")
    Journal("jem", Alone())
    assert not list(tmp_path.iterdir())
    job.args.tensorboard = False
    job.open()
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.csv", "config.json"}


def test_a_checkpoint_before_the_first_row_draws_no_curves_and_goes_through(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "SECONDS_BETWEEN_CURVES", 0)
    draw, curves, drawn = plots.save_curves, tmp_path / "curves.png", []

    def save_curves(rows, path):
        draw(rows, path)
        drawn.append((len(rows), curves.exists()))

    monkeypatch.setattr(plots, "save_curves", save_curves)
    flags = "--dataset digits --width 8 --epochs 1 --save-iterations 5"
    run("train_classifier", *flags.split(), "--out-dir", tmp_path)
    assert drawn == [(0, False)] * 3 + [(1, True)]  # iterations 5, 10, 15 and 19
    assert load_checkpoint(tmp_path / "classifier.pt", "classifier")["finished"]


@pytest.mark.usefixtures("no_curves")
def test_tensorboard_gets_scalars_grids_and_histograms(tmp_path, monkeypatch):
    class Board:
        """Remembers what is written to it."""

        def __init__(self):
            self.names = set()

        def add_scalar(self, name, value, iteration):
            self.names.add(name)

        add_images = add_histogram = add_scalar

    board = Board()
    open_board = lambda args, folder: board if args.tensorboard else None  # noqa: E731
    monkeypatch.setattr(journal, "open_board", open_board)
    flags = "--from-scratch --epochs 1 --batch-size 314 --tensorboard"
    run("train_jem", *TINY, *flags.split(), "--out-dir", tmp_path)
    scalars = {"jem/energy_gap", "jem/val_accuracy"}
    pictures = {"buffer", "chain age [steps]", "energy of chains", "energy of validation images"}
    assert scalars | pictures <= board.names


@pytest.mark.parametrize("matrix_units, wanted", [(True, "bf16"), (False, "float32")])
def test_a_processor_computes_in_bf16_if_it_has_matrix_units(monkeypatch, matrix_units, wanted):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: matrix_units, raising=False)
    assert pick_precision("auto", torch.device("cpu")) == wanted
    assert pick_precision("float32", torch.device("cpu")) == "float32"
    assert pick_precision("bf16", torch.device("cpu")) == "bf16"
