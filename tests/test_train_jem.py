"""The replay buffer, the energy loss, and the training end to end."""

import re

import pytest
import torch
from conftest import TINY

import restarts
import runs
import train_classifier
import train_jem
from models import energy, joint_energy
from restarts import GaussianRestart, UniformRestart
from train_jem import ReplayBuffer, energy_loss, energy_regulariser
from training import Training


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def buffer_of(size, reinit_prob=0.0, num_classes=10):
    return ReplayBuffer(size, UniformRestart((1, 2, 2), num_classes), reinit_prob, generator=generator())


def test_chains_are_written_back_to_their_slots_and_no_other_slot_changes():
    buffer = buffer_of(50)
    before = buffer.images.clone()
    slots, images, labels = buffer.draw(20, generator(1))
    assert len(slots.unique()) == 20
    assert torch.equal(images, before[slots]) and torch.equal(labels, buffer.labels[slots])
    buffer.put(slots, images + 1, steps=7)
    untouched = torch.ones(50, dtype=torch.bool).index_fill(0, slots, False)
    assert torch.equal(buffer.images[slots], before[slots] + 1) and torch.equal(buffer.images[untouched], before[untouched])
    assert (buffer.ages[slots] == 7).all() and (buffer.ages[untouched] == 0).all()


def test_what_is_drawn_is_a_copy():
    buffer = buffer_of(10)
    before = buffer.images.clone()
    buffer.draw(10, generator())[1].zero_()
    assert torch.equal(buffer.images, before)


@pytest.mark.parametrize("reinit_prob", [0.0, 0.3, 1.0])
def test_chains_restart_at_the_given_rate_and_start_again_at_age_zero(reinit_prob):
    buffer, count, draws = buffer_of(400, reinit_prob), 200, 50
    restarted = 0
    for draw in range(draws):
        buffer.images.fill_(5.0)  # no restart gives this
        buffer.ages.fill_(3)
        slots, images, _ = buffer.draw(count, generator(draw))
        new = (images != 5).flatten(1).any(1)
        assert (buffer.ages[slots] == torch.where(new, 0, 3)).all()
        restarted += int(new.sum())
    deviation = (reinit_prob * (1 - reinit_prob) * count * draws) ** 0.5
    assert abs(restarted - reinit_prob * count * draws) <= 5 * deviation


def test_long_chains_fill_their_share_of_a_draw_and_never_restart():
    buffer = ReplayBuffer(50, UniformRestart((1, 2, 2), 10), 1.0, generator=generator(), long_chains=10, long_share=0.25)
    buffer.images.fill_(5.0)  # no restart gives this
    slots, images, _ = buffer.draw(20, generator(1))
    assert len(slots.unique()) == 20 and (slots >= 40).sum() == 5
    assert torch.equal((images == 5).flatten(1).all(1), slots >= 40)


@pytest.mark.parametrize("count", [47, 44])
def test_more_chains_of_either_kind_than_the_buffer_has_are_refused(count):
    settings = {"generator": generator(), "long_chains": 10, "long_share": 0.25 if count == 44 else 0.1}
    with pytest.raises(ValueError, match=r"\d+ \+ \d+ chains were asked of a replay buffer of 40 \+ 10"):
        ReplayBuffer(50, UniformRestart((1, 2, 2), 10), 0.0, **settings).draw(count)


def test_restarts_come_from_the_class_of_the_chain():
    means = torch.linspace(-0.9, 0.9, 10)[:, None].expand(10, 4)
    restart = GaussianRestart(means, torch.zeros(10, 4, 1), (1, 2, 2))
    buffer = ReplayBuffer(100, restart, 1.0, generator=generator())
    assert torch.equal(buffer.labels, restart.labels(torch.arange(100)))
    assert set(buffer.labels.bincount(minlength=10).tolist()) <= {9, 10, 11}
    _, images, labels = buffer.draw(100, generator(1))
    assert torch.equal(images.flatten(1), means[labels])


def test_more_chains_than_the_buffer_has_are_refused():
    with pytest.raises(ValueError, match="11 \\+ 0 chains"):
        buffer_of(10).draw(11)


def test_the_buffer_survives_its_state_dict():
    buffer, other = buffer_of(20), buffer_of(5)
    buffer.put(torch.arange(20), buffer.images * 2, 3)
    other.load_state_dict(buffer.state_dict())
    for name, value in buffer.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_the_energy_loss_has_the_value_and_the_sign_computed_by_hand():
    positive, negative = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([-1.0, 2.0], requires_grad=True)
    loss = energy_loss(positive, negative)
    loss.backward()
    assert loss.item() == 1.5  # 2 - 0.5
    assert (positive.grad > 0).all() and (negative.grad < 0).all()  # descent lowers data's energy and raises the chains'
    assert energy_regulariser(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 2.0])).item() == 5 + 2.5


HARD = ["--adversarial-eps", "0.1", "--clean-share", "0.3", "--attack-share"]


@pytest.mark.parametrize("hard", [[], [*HARD, "1"], [*HARD, "0.25", "--chain-batch-size", "8", "--buffer-size", "8"]])
@pytest.mark.parametrize("flags, conditional", [(["--p-x-weight", "0.7"], False), (["--p-xy-weight", "0.7"], True)])
def test_an_iteration_descends_the_loss_computed_by_hand(tmp_path, digits, monkeypatch, flags, conditional, hard):
    args = train_jem.parse_args(
        [*TINY, *flags, "--batch-size", "16", "--chain-batch-size", "16", "--buffer-size", "16", "--energy-reg", "0.02",
         "--p-y-given-x-weight", "0.4", "--precision", "float32", "--input-noise", "0", "--augment", "0",
         "--adversarial-eps", "0", *hard]
    )  # fmt: skip
    run = Training(args, digits, tmp_path, "jem", torch.device("cpu"))
    buffer = ReplayBuffer(args.buffer_size, restarts.from_flags(args, digits, "cpu"), 0.0, generator=generator())
    logged = {}

    def gradients(objective):
        loss, values = objective()
        logged.update(values, loss=loss)

    monkeypatch.setattr(run, "gradients", gradients)
    monkeypatch.setattr(run, "update", lambda values: None)
    before = buffer.images.clone()
    images, labels = digits.train.images[:16], digits.train.labels[:16]
    if hard:
        monkeypatch.setattr(train_jem, "single_step", lambda logits_of, images, *rest, **settings: images.flip(3))
    train_jem.iterate(run, buffer, images, labels)

    assert not torch.equal(before, buffer.images) and (buffer.ages == args.steps).all()
    logits, chain_logits = run.model(images), run.model(buffer.images)  # the whole buffer was drawn
    if conditional:
        gap = joint_energy(logits, labels).mean() - joint_energy(chain_logits, buffer.labels).mean()
    else:
        gap = energy(logits).mean() - energy(chain_logits).mean()
    cross = -logits.log_softmax(1)[range(16), labels].mean()
    if hard:  # the density's terms see the images as they are
        attacked = round(16 * args.attack_share)
        augmented = torch.cat([images[:attacked].flip(3), images[attacked:]])
        cross = 0.3 * cross - 0.7 * run.model(augmented).log_softmax(1)[range(16), labels].mean()
    squares = energy(logits).square().mean() + energy(chain_logits).square().mean()
    torch.testing.assert_close(logged["loss"], 0.4 * cross + 0.7 * gap + 0.02 * squares)
    torch.testing.assert_close(logged["energy_gap"], energy(chain_logits).mean() - energy(logits).mean())
    torch.testing.assert_close(logged["chain_displacement"], (buffer.images - before).flatten(1).norm(dim=1).mean())


def test_the_steps_go_evenly_from_the_first_to_the_last_and_given_alone_stay():
    args = train_jem.parse_args(["--first-steps", "3", "--steps", "6"])
    assert [train_jem.steps_now(args, progress) for progress in (0, 0.1, 0.3, 0.6, 0.9, 1)] == [3, 3, 4, 5, 6, 6]
    alone = train_jem.parse_args(["--dataset", "mnist", "--steps", "7"])
    assert {train_jem.steps_now(alone, progress) for progress in (0, 0.5, 1)} == {7}


def test_a_chain_is_run_for_the_steps_of_the_moment(tmp_path, digits):
    args = train_jem.parse_args([*TINY, "--first-steps", "1", "--steps", "3", "--batch-size", "8"])
    run = Training(args, digits, tmp_path, "jem", torch.device("cpu"))
    buffer = ReplayBuffer(64, restarts.from_flags(args, digits, "cpu"), 0.0, generator=generator())
    ages = [0]
    for run.done in (0.0, 0.5, 1.0):
        train_jem.iterate(run, buffer, digits.train.images[:8], digits.train.labels[:8])
        ages.append(int(buffer.ages.sum()))
    assert ages == [0, 64, 64 + 128, 64 + 128 + 192]


def test_adversarial_training_attacks_within_its_radius_and_raises_the_loss(tmp_path, digits):
    run = Training(train_jem.parse_args([*TINY, "--adversarial-eps", "0.1"]), digits, tmp_path, "jem", torch.device("cpu"))
    images, labels = digits.train.images[:100], digits.train.labels[:100]
    hard = train_jem.attacked(run, images, labels)
    assert (hard - images).abs().max() <= 0.2 + 1e-6 and hard.abs().max() <= 1
    losses = [torch.nn.functional.cross_entropy(run.model(x), labels).item() for x in (images, hard)]
    assert losses[1] > losses[0]
    run.args.attack_share = 0.3
    some = train_jem.attacked(run, images, labels)
    assert ((some != images).flatten(1).any(1) == (torch.arange(100) < 30)).all()
    run.args.adversarial_eps = 0
    assert train_jem.attacked(run, images, labels) is images


def test_chains_in_training_leave_the_modes_and_the_gradients_of_the_network(tmp_path, digits):
    run = Training(train_jem.parse_args(TINY), digits, tmp_path, "jem", torch.device("cpu"))
    run.model.features[0].eval()
    modes = [part.training for part in run.model.modules()]
    buffer = ReplayBuffer(100, restarts.from_flags(run.args, digits, "cpu"), 0.0, generator=generator())
    for images, labels in zip(digits.train.images.split(64), digits.train.labels.split(64), strict=True):
        run.lr = run.done = run.began = 0
        run.bar = None
        train_jem.iterate(run, buffer, images, labels)
        break
    assert [part.training for part in run.model.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is not None for parameter in run.model.parameters())


def test_the_trained_model_gives_data_lower_energy_than_noise_and_classifies(tiny_run, digits):
    checkpoint = runs.load_checkpoint(tiny_run / "jem.pt", "jem")
    model = runs.load_model(checkpoint, "cpu")
    noise = torch.rand(360, 1, 8, 8, generator=generator()) * 2 - 1
    with torch.no_grad():
        on_data, on_noise = energy(model(digits.test.images)), energy(model(noise))
    assert on_data.mean() < on_noise.mean()
    assert (on_data[:, None] < on_noise[None]).float().mean() > 0.8
    _, accuracy = train_classifier.evaluate(model, digits.test)
    assert accuracy > 0.9


def test_the_run_folder_holds_what_is_promised(tiny_run):
    assert {path.name for path in tiny_run.iterdir()} == {
        "classifier.pt", "jem.pt", "metrics.csv", "curves.png", "samples.png", "config.json", "grids",
    }  # fmt: skip
    assert sorted(path.name for path in (tiny_run / "grids").iterdir()) == [
        f"epoch-{epoch}.png" for epoch in ("000.0", "000.5", "001.0", "002.0", "003.0", "004.0")
    ]
    rows = runs.read_metrics(tiny_run / "metrics.csv")
    assert {row["phase"] for row in rows} == {"classifier", "jem"}
    jem = [row for row in rows if row["phase"] == "jem"]
    ends = [row for row in jem if row["val_accuracy"]]
    assert [float(row["epoch"]) for row in ends] == [1, 2, 3, 4]
    assert all(value for row in ends for value in row.values())
    for row in jem:
        gap = float(row["energy_negative"]) - float(row["energy_positive"])
        assert float(row["energy_gap"]) == pytest.approx(gap, abs=1e-3)


def test_the_last_line_is_the_test_accuracy_and_the_classifier_found_is_used(tmp_path, tiny_run, capsys):
    flags = [*TINY, "--epochs", "1", "--out-dir", str(tmp_path / "run")]
    train_jem.main([*flags, "--classifier", str(tiny_run / "classifier.pt")])
    out = capsys.readouterr().out.strip()
    assert re.search(r"^test accuracy: \d+\.\d\d %$", out, re.MULTILINE) and "next: python sample.py --checkpoint" in out
    assert "starting from the classifier" in out and str(tmp_path / "run" / "jem.pt") in out
    assert not (tmp_path / "run" / "classifier.pt").exists()


@pytest.mark.parametrize(
    "flags", [["--restart", "uniform"], ["--p-xy-weight", "0.1"], ["--clamp", "0", "--pixel-grad-clip", "0"]]
)
def test_every_way_to_train_goes_through_from_scratch(tmp_path, flags, capsys):
    train_jem.main([*TINY, "--epochs", "1", "--from-scratch", *flags, "--out-dir", str(tmp_path)])
    assert "random weights" in capsys.readouterr().out
    checkpoint = runs.load_checkpoint(tmp_path / "jem.pt", "jem")
    assert checkpoint["finished"] and checkpoint["conditional"] == ("--p-xy-weight" in flags)


def test_a_dry_run_keeps_no_file(tmp_path, capsys):
    train_jem.main([*TINY, "--pretrain-epochs", "1", "--dry-run", "--out-dir", str(tmp_path / "run")])
    assert "dry run" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_the_same_seed_gives_the_same_model_and_another_seed_another(tmp_path):
    flags = [*TINY, "--epochs", "1", "--from-scratch"]
    models = []
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        train_jem.main([*flags, "--seed", seed, "--out-dir", str(tmp_path / name)])
        models.append(runs.load_checkpoint(tmp_path / name / "jem.pt", "jem"))
    same = [torch.equal(models[0]["buffer"]["images"], other["buffer"]["images"]) for other in models[1:]]
    assert same == [True, False]
    assert all(torch.equal(value, models[1]["model"][name]) for name, value in models[0]["model"].items())


def test_a_stopped_run_resumes_to_the_same_weights_buffer_and_metrics(tmp_path, interrupt):
    flags = [*TINY, "--from-scratch", "--log-every", "7", "--first-steps", "2", "--steps", "10"]
    train_jem.main([*flags, "--out-dir", str(tmp_path / "whole")])
    interrupt()
    with pytest.raises(SystemExit) as caught:
        train_jem.main([*flags, "--out-dir", str(tmp_path / "stopped")])
    assert caught.value.code == 130
    train_jem.main(["--resume", "--out-dir", str(tmp_path / "stopped")])
    whole, stopped = (runs.load_checkpoint(tmp_path / name / "jem.pt", "jem") for name in ("whole", "stopped"))
    for part in ("model", "buffer"):
        for name, value in whole[part].items():
            assert torch.equal(value, stopped[part][name]), name
    clock = ("minutes", "iterations_per_second")
    rows = [
        [{k: v for k, v in row.items() if k not in clock} for row in runs.read_metrics(tmp_path / name / "metrics.csv")]
        for name in ("whole", "stopped")
    ]
    assert rows[0] == rows[1]


def test_a_finished_run_resumed_with_more_epochs_goes_on(tmp_path, tiny_run, capsys):
    flags = [*TINY, "--epochs", "1", "--from-scratch", "--out-dir", str(tmp_path)]
    train_jem.main(flags)
    train_jem.main(["--resume", "--epochs", "2", "--out-dir", str(tmp_path)])
    assert runs.load_checkpoint(tmp_path / "jem.pt", "jem")["training"]["step"] == 2 * 19


def test_divergence_is_named_with_its_iteration(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        flags = ["--lr", "1e30", "--warmup-steps", "0", "--max-rollbacks", "0"]
        train_jem.main([*TINY, "--from-scratch", *flags, "--out-dir", str(tmp_path)])
    assert caught.value.code == 1
    assert re.search(r"^error: training diverged at iteration \d+: .* not finite .*--lr", capsys.readouterr().err)
