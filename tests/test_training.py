"""The plumbing of a training: order of the data, schedule, budget, averaging."""

import sys
from argparse import Namespace

import pytest
import torch
from conftest import TINY

import runs
import train_jem
from cli import UserError
from training import Training, epoch_order, learning_rate


def make_run(folder, dataset, *flags, **rest):
    args = train_jem.parse_args([*TINY, "--precision", "float32", *flags])
    return Training(args, dataset, folder, "jem", torch.device("cpu"), **rest)


def test_an_epoch_visits_every_image_once_in_an_order_of_its_own():
    first, second = epoch_order(50, 0, 0), epoch_order(50, 0, 1)
    assert first.sort().values.tolist() == list(range(50)) and not torch.equal(first, second)
    assert torch.equal(first, epoch_order(50, 0, 0)) and not torch.equal(first, epoch_order(50, 1, 0))


def test_the_learning_rate_rises_then_falls_to_its_floor_on_a_half_cosine():
    args = Namespace(lr=2.0, warmup_steps=4, lr_floor=0.0)
    assert [learning_rate(args, step, 0) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert learning_rate(args, 9, 0.5) == pytest.approx(1.0) and learning_rate(args, 9, 1) == pytest.approx(0)
    with_floor = Namespace(lr=2.0, warmup_steps=0, lr_floor=0.2)
    assert [learning_rate(with_floor, 0, progress) for progress in (0, 0.5, 1)] == pytest.approx([2.0, 1.2, 0.4])


def test_batches_come_in_epochs_with_noise_of_the_given_size(tmp_path, digits):
    run = make_run(tmp_path, digits, "--epochs", "1", "--input-noise", "0.5", "--batch-size", "100")
    seen, noise = [], []
    for images, labels in run.batches():
        order = epoch_order(1257, 0, 0)[run.step * 100 : (run.step + 1) * 100]
        assert torch.equal(labels, digits.train.labels[order])
        seen.append(order)
        assert torch.equal(images, digits.train.images[order])
        noise.append(run.noisy(images) - images)
        run.update(run.gradients(lambda: (run.model(images).sum() * 0, {})))  # noqa: B023
    assert len(seen) == 12 and len(torch.cat(seen).unique()) == 1200
    noise = torch.cat(noise)
    assert abs(noise.std() / 0.5 - 1) < 5 * (2 * noise.numel()) ** -0.5


def test_the_cross_entropy_sees_images_that_are_augmented_and_then_noisy(tmp_path, digits):
    run = make_run(tmp_path, digits, "--input-noise", "0", "--augment", "0")
    images = digits.train.images[:100]
    assert torch.equal(run.augmented(images), images)
    run.args.augment, run.args.input_noise = 1, 0.5
    moved = run.augmented(images) - images
    assert moved.std() > 0.51  # more than the noise alone
    assert moved.abs().max() > 2  # noise on top: nothing clamps it


def test_a_budget_of_minutes_ends_a_run_with_the_schedule_complete(tmp_path, digits, monkeypatch):
    clock = iter(range(10_000))
    run = make_run(tmp_path, digits, "--max-minutes", "10", max_minutes=10)
    monkeypatch.setattr(run, "minutes", lambda: next(clock) / 2)
    rates = []
    for images, _ in run.batches():
        run.update(run.gradients(lambda: (run.model(images).square().mean(), {})))  # noqa: B023
        rates.append(run.lr)
    assert len(rates) == 20 and rates[-1] < 0.05 * max(rates) and run.done == 1


def test_a_budget_that_is_spent_before_the_first_iteration_still_gives_a_checkpoint(tmp_path):
    train_jem.main([*TINY, "--max-minutes", "0.0001", "--out-dir", str(tmp_path)])
    for phase in ("classifier", "jem"):
        assert runs.load_checkpoint(tmp_path / f"{phase}.pt", phase)["training"]["step"] == 1


def test_checkpoints_are_written_between_the_ends_of_epochs_too(tmp_path, digits, monkeypatch):
    saved = []
    monkeypatch.setattr(Training, "save", lambda run, checkpoint: saved.append(checkpoint["training"]["step"]))
    train_jem.main([*TINY, "--from-scratch", "--epochs", "1", "--save-minutes", "1e-9", "--out-dir", str(tmp_path)])
    assert saved == list(range(1, 20))


def test_epochs_and_minutes_together_end_with_whichever_comes_first(tmp_path, digits):
    run = make_run(tmp_path, digits, "--epochs", "2", "--max-minutes", "1000", max_minutes=1000)
    run.step = run.epoch_steps
    assert run.progress() == 0.5
    assert train_jem.parse_args(["--max-minutes", "3"]).epochs is None


def test_averaged_weights_follow_the_closed_form(tmp_path, digits):
    run = make_run(tmp_path, digits, "--ema-decay", "0.3", "--epochs", "1")
    bias, expected = run.model.head.bias, 0
    for decay, _ in zip((0, 2 / 11, 3 / 12, 0.3, 0.3), run.batches(), strict=False):  # it begins with the first weights
        run.update(run.gradients(lambda: (bias.sum(), {})))
        expected = decay * expected + (1 - decay) * bias.detach()
    torch.testing.assert_close(run.averaged.head.bias.detach(), expected)
    assert make_run(tmp_path, digits, "--ema-decay", "0").averaged.__class__.__name__ == "SmallCNN"


def test_the_norm_of_the_weight_gradient_is_clipped(tmp_path, digits):
    run = make_run(tmp_path, digits, "--max-grad-norm", "0.5", "--optimizer", "sgd", "--epochs", "1")
    for images, _ in zip(run.batches(), range(1), strict=False):
        run.update(run.gradients(lambda: (1000 * run.model(images[0]).square().sum(), {})))  # noqa: B023
    norm = sum(parameter.grad.square().sum() for parameter in run.model.parameters()) ** 0.5
    assert norm == pytest.approx(0.5, rel=1e-4)


def test_sharpness_aware_steps_follow_the_gradient_found_up_the_loss(tmp_path, digits):
    run = make_run(
        tmp_path, digits, "--sam-rho", "0.5", "--optimizer", "sgd", "--lr", "0.1", "--epochs", "1", "--warmup-steps", "0"
    )
    weight, scale, calls = run.model.head.weight, torch.arange(1.0, 11.0)[:, None], []
    start = weight.detach().clone()
    gradient = scale * start  # of the loss below
    higher = start + 0.5 * gradient / gradient.norm()

    def objective():
        calls.append(weight.detach().clone())
        return (scale * weight.square()).sum() / 2, {"accuracy": torch.tensor(float(len(calls)))}

    for _ in zip(range(1), run.batches(), strict=False):
        run.update(run.gradients(objective))
    torch.testing.assert_close(torch.stack(calls), torch.stack([start, higher]))
    torch.testing.assert_close(weight.detach(), start - run.lr * scale * higher)
    assert run.log.sums["accuracy"] == 1  # what is logged is the loss before the climb


def test_a_batch_larger_than_the_training_set_is_refused(tmp_path, digits):
    with pytest.raises(UserError, match="1257 training images"):
        make_run(tmp_path, digits, "--batch-size", "2000", "--buffer-size", "2000")


def test_tensorboard_gets_scalars_grids_and_histograms(tmp_path, monkeypatch):
    class Board:
        """Remembers what is written to it."""

        def __init__(self):
            self.names = set()

        def add_scalar(self, name, value, step):
            self.names.add(name)

        add_images = add_histogram = add_scalar

    board = Board()
    monkeypatch.setattr(runs, "open_board", lambda args, folder: board if args.tensorboard else None)
    train_jem.main([*TINY, "--from-scratch", "--epochs", "1", "--tensorboard", "--out-dir", str(tmp_path)])
    assert {"jem/energy_gap", "jem/val_accuracy", "buffer", "chain age [steps]", "energy of chains"} <= board.names


def test_tensorboard_without_its_package_is_refused_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        runs.open_board(Namespace(tensorboard=True), tmp_path)
