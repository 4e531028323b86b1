"""Outliers, whole-pixel shifts, standardised filters, and the control without a density."""

import math

import pytest
import torch
from conftest import TINY, generator, run

from sgld_nrg import train_jem
from sgld_nrg.models import build_model, marginal_energy, predict
from sgld_nrg.support.augment import recast, shifted
from sgld_nrg.support.checkpoints import load_checkpoint
from sgld_nrg.support.log import read_metrics

BRIEF = ["--epochs", "1", "--pretrain-epochs", "1"]


def test_the_outlier_loss_is_the_log_loss_of_telling_outliers_from_data():
    data, outliers = torch.tensor([-4.0, -2.0]), torch.tensor([17.0, 0.0], requires_grad=True)
    loss = train_jem.outlier_loss(data, outliers, margin=20.0)
    by_hand = [-math.log(1 / (1 + math.exp(-(e - (-3 + 20))))) for e in (17.0, 0.0)]
    assert loss.item() == pytest.approx(sum(by_hand) / 2, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, outliers)
    assert (gradient < 0).all()  # descending the loss raises their energy
    far = train_jem.outlier_loss(data, torch.tensor([200.0]), margin=20.0)
    assert far == 0  # and stops once they are above the margin


def test_recast_images_are_a_x_plus_b_with_one_contrast_and_a_brightness_for_each_channel():
    x = torch.rand(500, 3, 4, 4, generator=generator()) * 0.2 - 0.1  # nothing here is clamped far
    seen = recast(x, generator(1))
    assert seen.shape == x.shape and seen.abs().max() <= 1
    free = (seen.abs() < 1).flatten(1).all(1)
    flat, to = x[free].flatten(2), seen[free].flatten(2)
    centred, moved = flat - flat.mean(2, keepdim=True), to - to.mean(2, keepdim=True)
    slopes = (centred * moved).sum(2) / centred.square().sum(2)  # (n, 3)
    assert torch.allclose(slopes, slopes[:, :1].expand(-1, 3), atol=1e-4)
    assert torch.allclose(moved, slopes[:, :, None] * centred, atol=1e-5)
    assert slopes.min() < -0.9 and slopes.max() > 0.9 and abs(slopes.mean()) < 0.15
    levels = to.mean(2)
    assert levels.std(1).mean() > 0.3  # colours of all kinds


def test_shifts_by_whole_pixels_interpolate_nothing_and_reach_every_place():
    x = torch.zeros(4000, 1, 5, 5) - 1
    x[:, :, 2, 1] = 0.3
    seen = shifted(x, 1, generator(), flip_prob=0.5)
    assert set(seen.unique().tolist()) == set(x.unique().tolist())
    place = seen.flatten(1).argmax(1)
    rows, columns = place // 5, place % 5
    assert set(rows.tolist()) == {1, 2, 3}
    assert set(columns.tolist()) == {0, 1, 2, 3, 4}  # 0, 1, 2 and their mirror images
    shares = torch.bincount(rows).float()[1:] / 4000
    assert (shares - 1 / 3).abs().max() < 5 * (2 / 9 / 4000) ** 0.5
    assert abs((columns >= 3).float().mean() - 1 / 3) < 0.04


def test_colour_comes_in_from_outside_as_a_reflection_and_grey_as_background():
    ramp = torch.arange(4.0).expand(4, 4) / 4
    colour = shifted(ramp.expand(200, 3, 4, 4), 1, generator())
    first = colour[:, 0, 0, 0].unique()
    assert set(first.tolist()) == {0.0, 0.25}  # columns 1 | 0 1 2 3 | 2
    grey = shifted(ramp.expand(200, 1, 4, 4), 1, generator())
    assert -1 in grey[:, 0, 0, 0]


def test_without_a_density_a_training_runs_no_chain_and_trains_the_cross_entropy_alone(
    tmp_path, no_curves, monkeypatch
):
    def never(*args, **rest):
        raise AssertionError("a chain ran")

    monkeypatch.setattr(train_jem.ReplayBuffer, "draw", never)
    hard = ["--clean-share", "0.5", "--adversarial-eps", "0.1", "--energy-reg", "1", "--augment"]
    flags = [*TINY, *BRIEF, *hard, "1", "--p-x-weight", "0", "--outlier-weight", "1"]
    run("train_jem", *flags, "--out-dir", tmp_path)
    checkpoint = load_checkpoint(tmp_path / "jem.pt", "jem")
    assert checkpoint["finished"] and int(checkpoint["buffer"]["ages"].max()) == 0
    rows = [row for row in read_metrics(tmp_path / "metrics.csv") if row["phase"] == "jem"]
    assert rows and all(row["energy_negative"] == "" and row["cross_entropy"] for row in rows)


def test_outliers_end_up_above_the_data_when_they_are_asked_for(tmp_path, no_curves, digits):
    gaps = {}
    for weight in (0, 1):
        folder = tmp_path / str(weight)
        more = ["--epochs", 4, "--pretrain-epochs", 4, "--outlier-weight", weight, "--out-dir"]
        run("train_jem", *TINY, *more, folder)
        checkpoint = load_checkpoint(folder / "jem.pt", "jem")
        model = build_model(**checkpoint["model_config"])
        model.load_state_dict(checkpoint["model"])
        data, outliers = digits.val.images, recast(digits.val.images, generator())
        energies = [marginal_energy(predict(model, x)).mean() for x in (data, outliers)]
        gaps[weight] = float(energies[1] - energies[0])
        logged = read_metrics(folder / "metrics.csv")[-1]["energy_outliers"]
        assert bool(logged) == bool(weight)
    assert gaps[1] > gaps[0] + 2
