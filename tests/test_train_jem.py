"""The replay buffer, the energy loss, and the training end to end."""

import re

import pytest
import torch
from conftest import TINY, generator, run, training
from torch.nn.functional import cross_entropy

from sgld_nrg import train_classifier, train_jem
from sgld_nrg.models import build_model, energy_of, joint_energy, load_model, marginal_energy
from sgld_nrg.sgld import Langevin, run_chains
from sgld_nrg.support.checkpoints import langevin_from, load_checkpoint
from sgld_nrg.support.commands import parse
from sgld_nrg.support.log import read_metrics
from sgld_nrg.support.restarts import GaussianRestart, UniformRestart, restart_from_flags
from sgld_nrg.train_jem import ReplayBuffer, energy_loss, energy_regulariser

pytestmark = pytest.mark.usefixtures("no_curves")

SHORT = [*TINY, "--batch-size", "314", "--epochs", "1"]  # four iterations
# as the preset of the digits has it
LANGEVIN = Langevin(0.1, 0.08, False, 1.0, (-1.0, 1.0))


def buffer_of(size, reinit_prob=0.0, **settings):
    restart = UniformRestart((1, 2, 2), 10)
    return ReplayBuffer(size, restart, reinit_prob, generator=generator(), **settings)


def test_chains_are_written_back_to_their_slots_and_no_other_slot_changes():
    buffer = buffer_of(50)
    before = buffer.images.clone()
    slots, images, labels = buffer.draw(20, generator(1))
    assert len(slots.unique()) == 20
    assert torch.equal(images, before[slots]) and torch.equal(labels, buffer.labels[slots])
    buffer.put(slots, images + 1, steps=7)
    untouched = torch.ones(50, dtype=torch.bool).index_fill(0, slots, False)
    assert torch.equal(buffer.images[slots], before[slots] + 1)
    assert torch.equal(buffer.images[untouched], before[untouched])
    assert (buffer.ages[slots] == 7).all() and (buffer.ages[untouched] == 0).all()
    assert buffer.ages.dtype == buffer.labels.dtype == torch.int64


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
    buffer = buffer_of(50, 1.0, long_chains=10, long_share=0.25)
    buffer.images.fill_(5.0)  # no restart gives this
    slots, images, _ = buffer.draw(20, generator(1))
    assert len(slots.unique()) == 20 and (slots >= 40).sum() == 5
    assert torch.equal((images == 5).flatten(1).all(1), slots >= 40)


@pytest.mark.parametrize(
    "size, long_chains, long_share, count, says",
    [
        (50, 10, 0.1, 47, "42 + 5 chains were asked of a replay buffer of 40 + 10"),
        (50, 10, 0.25, 44, "33 + 11 chains were asked of a replay buffer of 40 + 10"),
        (10, 0, 0.0, 11, "11 + 0 chains were asked of a replay buffer of 10 + 0"),
    ],
)
def test_more_chains_of_either_kind_than_the_buffer_has_are_refused(
    size, long_chains, long_share, count, says
):
    buffer = buffer_of(size, long_chains=long_chains, long_share=long_share)
    with pytest.raises(ValueError, match=re.escape(says)):
        buffer.draw(count)


def test_restarts_come_from_the_class_of_the_chain():
    means = torch.linspace(-0.9, 0.9, 10)[:, None].expand(10, 4)
    restart = GaussianRestart(means, torch.zeros(10, 4, 1), (1, 2, 2))
    buffer = ReplayBuffer(100, restart, 1.0, generator=generator())
    assert torch.equal(buffer.labels, restart.labels(torch.arange(100)))
    assert set(buffer.labels.bincount(minlength=10).tolist()) <= {9, 10, 11}
    _, images, labels = buffer.draw(100, generator(1))
    assert torch.equal(images.flatten(1), means[labels])


def test_the_buffer_survives_its_state_dict():
    buffer, other = buffer_of(20), buffer_of(5)
    buffer.put(torch.arange(20), buffer.images * 2, 3)
    other.load_state_dict(buffer.state_dict())
    for name, value in buffer.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_the_energy_loss_has_the_value_and_the_sign_computed_by_hand():
    positive = torch.tensor([1.0, 3.0], requires_grad=True)
    negative = torch.tensor([-1.0, 2.0], requires_grad=True)
    loss = energy_loss(positive, negative)
    loss.backward()
    assert loss.item() == 1.5  # 2 - 0.5
    # descent lowers the energy of data and raises that of the chains
    assert (positive.grad > 0).all() and (negative.grad < 0).all()
    assert energy_regulariser(positive, negative).item() == 5 + 2.5


def test_the_energy_of_the_chains_is_float32_and_with_labels_the_joint_one():
    model = build_model("small-cnn", 3, 1, 8, 2, 1)
    energy, x = energy_of(model, "float32"), torch.randn(4, 1, 8, 8)
    labels = torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(energy(x), -model(x).logsumexp(1))
    torch.testing.assert_close(energy(x, labels), -model(x)[range(4), labels])
    assert energy_of(model, "bf16")(x).dtype == torch.float32


HARD = ["--adversarial-eps", "0.1", "--clean-share", "0.3", "--attack-share"]
OUTLIERS = ["--outlier-weight", "0.3", "--outlier-share", "0.5", "--outlier-margin", "2"]


@pytest.mark.parametrize(
    "more",
    [
        [],
        [*HARD, "1"],
        [*HARD, "0.25", "--chain-batch-size", "8", "--buffer-size", "8"],
        OUTLIERS,
        [*HARD, "1", *OUTLIERS],
    ],
)
@pytest.mark.parametrize("density, conditional", [("--p-x-weight", False), ("--p-xy-weight", True)])
def test_an_iteration_descends_the_loss_computed_by_hand(
    tmp_path, digits, monkeypatch, density, conditional, more
):
    flags = "--batch-size 16 --chain-batch-size 16 --buffer-size 16 --energy-reg 0.02"
    flags += " --p-y-given-x-weight 0.4 --input-noise 0 --augment 0 --adversarial-eps 0 --clamp 0.9"
    job = training(digits, tmp_path, *flags.split(), density, 0.7, *more)
    args, losses = job.args, []
    restart = restart_from_flags(args, digits, job.device)
    buffer = ReplayBuffer(args.buffer_size, restart, 0.0, generator=generator())
    monkeypatch.setattr(job, "backward", losses.append)
    before, noiseless = buffer.images.clone(), LANGEVIN._replace(noise_std=0)
    images, labels = digits.train.images[:16], digits.train.labels[:16]

    def shaded(logits_of, x, labels, *_, **__):
        return x * labels.view(-1, 1, 1, 1) / 10

    monkeypatch.setattr(train_jem, "single_step", shaded)
    monkeypatch.setattr(train_jem, "recast", lambda x, source: -x)
    logged = train_jem.iteration(job, buffer, noiseless, args.steps, images, labels)

    assert not torch.equal(before, buffer.images) and (buffer.ages == args.steps).all()
    classes = buffer.labels if conditional else None
    ends = run_chains(job.energy, before, args.steps, noiseless, labels=classes)
    torch.testing.assert_close(buffer.images, ends, atol=1e-4, rtol=0)
    logits = job.model(images.clamp(-0.9, 0.9))  # as far as the flags let chains go
    chain_logits = job.model(buffer.images)  # the whole buffer was drawn
    gap = marginal_energy(logits).mean() - marginal_energy(chain_logits).mean()
    density_gap = gap
    if conditional:
        on_chains = joint_energy(chain_logits, buffer.labels)
        density_gap = joint_energy(logits, labels).mean() - on_chains.mean()
    cross = -logits.log_softmax(1)[range(16), labels].mean()
    if args.clean_share < 1:  # the density's terms see the images as they are
        count = round(16 * args.attack_share)
        attacked = torch.cat([shaded(None, images[:count], labels[:count]), images[count:]])
        hard_cross = -job.model(attacked).log_softmax(1)[range(16), labels].mean()
        cross = 0.3 * cross + 0.7 * hard_cross
    energies = marginal_energy(logits), marginal_energy(chain_logits)
    squares = energies[0].square().mean() + energies[1].square().mean()
    expected = 0.4 * cross + 0.7 * density_gap + 0.02 * squares
    on_outliers = marginal_energy(job.model(-images.clamp(-0.9, 0.9)[:8]))
    if args.outlier_weight:
        odds = on_outliers - 2 - energies[0].mean()
        expected = expected - 0.3 * odds.sigmoid().log().mean()
    (loss,) = losses
    torch.testing.assert_close(loss, expected)
    wanted = {
        "cross_entropy": cross,
        "accuracy": (logits.argmax(1) == labels).float().mean(),
        "energy_positive": energies[0].mean(),
        "energy_negative": energies[1].mean(),
        "energy_gap": -gap,
        "chain_displacement": (buffer.images - before).flatten(1).norm(dim=1).mean(),
        "chain_saturated": (buffer.images.abs() == 1).float().mean(),
        "chain_age": torch.tensor(float(args.steps)),
    }
    if args.outlier_weight:
        wanted["energy_outliers"] = on_outliers.mean()
    assert logged.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(logged[name], value.detach())


def test_the_density_sees_data_with_noise_and_the_hard_images_are_moved_too(
    tmp_path, digits, monkeypatch
):
    flags = "--batch-size 16 --chain-batch-size 16 --buffer-size 16 --clamp 0 --clean-share 0.5"
    images, labels = digits.train.images[:16], digits.train.labels[:16]
    restart = UniformRestart(digits.shape, 10)

    def data_and_hard(*more):
        job = training(digits, tmp_path, *flags.split(), "--adversarial-eps", 0, *more)
        seen, logits = [], job.logits_for_loss
        monkeypatch.setattr(job, "logits_for_loss", lambda x: logits(seen.append(x) or x))
        train_jem.iteration(job, ReplayBuffer(16, restart, 0.0), LANGEVIN, 1, images, labels)
        return seen[0][:16], seen[0][32:48]  # the chains lie between

    data, hard = data_and_hard("--augment", 1, "--input-noise", 0)
    assert torch.equal(data, images) and (hard != images).flatten(1).any(1).all()
    noise = [part - images for part in data_and_hard("--augment", 0, "--input-noise", 0.2)]
    assert not torch.equal(*noise)
    for part in noise:
        assert abs(part.std() / 0.2 - 1) < 5 * (2 * part.numel()) ** -0.5


def test_the_steps_go_evenly_from_the_first_to_the_last_and_given_alone_stay():
    args = parse("train_jem", ["--first-steps", "3", "--steps", "6"])
    steps = [train_jem.steps_now(args, progress) for progress in (0, 0.1, 0.3, 0.6, 0.9, 1)]
    assert steps == [3, 3, 4, 5, 6, 6]
    alone = parse("train_jem", ["--dataset", "mnist", "--steps", "7"])
    assert {train_jem.steps_now(alone, progress) for progress in (0, 0.5, 1)} == {7}


def test_a_chain_is_run_for_the_steps_of_the_moment_with_the_settings_of_the_flags(
    tmp_path, monkeypatch
):
    iteration, seen = train_jem.iteration, []

    def watched(job, buffer, langevin, *rest):
        before = int(buffer.ages.sum())
        values = iteration(job, buffer, langevin, *rest)
        seen.append((job.iteration, int(buffer.ages.sum()) - before, langevin))
        return values

    monkeypatch.setattr(train_jem, "iteration", watched)
    flags = "--first-steps 1 --steps 5 --reinit-prob 0 --noise-std 0.02"
    run("train_jem", *SHORT, "--from-scratch", *flags.split(), "--out-dir", tmp_path)
    langevin = LANGEVIN._replace(noise_std=0.02)
    assert seen == [(number, 64 * (number + 1), langevin) for number in range(4)]  # 64 chains each


def test_adversarial_training_attacks_within_its_radius_and_raises_the_loss(tmp_path, digits):
    job = training(digits, tmp_path, "--adversarial-eps", "0.1")
    images, labels = digits.train.images[:100], digits.train.labels[:100]
    hard = train_jem.attacked(job, images, labels)
    assert (hard - images).abs().max() <= 0.2 + 1e-6 and hard.abs().max() <= 1
    clean_loss, hard_loss = (cross_entropy(job.model(x), labels) for x in (images, hard))
    assert hard_loss > clean_loss
    job.args.attack_share = 0.3
    some = train_jem.attacked(job, images, labels)
    assert ((some != images).flatten(1).any(1) == (torch.arange(100) < 30)).all()
    job.args.adversarial_eps = 0
    assert train_jem.attacked(job, images, labels) is images


def test_chains_in_training_leave_the_modes_of_the_network_and_it_gets_its_gradients(
    tmp_path, digits
):
    job = training(digits, tmp_path)
    job.model.features[0].eval()
    modes = [part.training for part in job.model.modules()]
    restart = restart_from_flags(job.args, digits, job.device)
    buffer = ReplayBuffer(100, restart, 0.0, generator=generator())
    images, labels = digits.train.images[:64], digits.train.labels[:64]
    train_jem.iteration(job, buffer, LANGEVIN, 2, images, labels)
    assert [part.training for part in job.model.modules()] == modes
    parameters = list(job.model.parameters())
    assert all(each.requires_grad and each.grad is not None for each in parameters)


def test_the_trained_model_gives_data_lower_energy_than_noise_and_classifies(checkpoint, digits):
    model = load_model(checkpoint)
    noise = torch.rand(360, 1, 8, 8, generator=generator()) * 2 - 1
    with torch.no_grad():
        on_data, on_noise = (marginal_energy(model(x)) for x in (digits.test.images, noise))
    assert on_data.mean() < on_noise.mean()
    assert (on_data[:, None] < on_noise[None]).float().mean() > 0.8
    _, accuracy = train_classifier.evaluate(model, digits.test)
    assert accuracy > 0.9


def test_the_run_folder_holds_what_is_promised(tiny_run):
    promised = {*train_jem.OUTPUTS, "classifier.pt"}
    assert {path.name for path in tiny_run.iterdir()} == promised
    assert promised == {
        "classifier.pt",
        "jem.pt",
        "metrics.csv",
        "curves.png",
        "samples.png",
        "config.json",
        "grids",
    }
    assert sorted(path.name for path in (tiny_run / "grids").iterdir()) == [
        f"epoch-{epoch}.png" for epoch in ("000.0", "000.5", "001.0", "002.0", "003.0", "004.0")
    ]
    rows = read_metrics(tiny_run / "metrics.csv")
    assert {row["phase"] for row in rows} == {"classifier", "jem"}
    jem = [row for row in rows if row["phase"] == "jem"]
    ends = [row for row in jem if row["val_accuracy"]]
    assert [float(row["epoch"]) for row in ends] == [1, 2, 3, 4]
    assert {name for row in ends for name, value in row.items() if not value} == {"energy_outliers"}
    for row in jem:
        gap = float(row["energy_negative"]) - float(row["energy_positive"])
        assert float(row["energy_gap"]) == pytest.approx(gap, abs=1e-3)


def test_the_test_accuracy_is_told_and_the_classifier_that_is_named_is_used(
    tmp_path, tiny_run, capsys
):
    folder = tmp_path / "run"
    run("train_jem", *SHORT, "--classifier", tiny_run / "classifier.pt", "--out-dir", folder)
    out = capsys.readouterr().out.strip()
    assert re.search(r"^test accuracy: \d+\.\d\d %$", out, re.MULTILINE)
    assert "next: python sample.py --checkpoint" in out and str(folder / "jem.pt") in out
    assert "starting from the classifier" in out
    assert not (folder / "classifier.pt").exists()


def test_a_run_to_choose_among_does_not_look_at_the_test_set(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SGLD_NRG_LOOKS", str(tmp_path / "looks.csv"))
    run("train_jem", *SHORT, "--no-test", "--pretrain-epochs", 1, "--out-dir", tmp_path / "run")
    assert "test accuracy" not in capsys.readouterr().out
    assert not (tmp_path / "looks.csv").exists()


def test_a_classifier_that_was_pretrained_serves_runs_of_the_same_flags_alone(tmp_path, capsys):
    command = [*SHORT, "--pretrain-epochs", 1, "--out-dir", tmp_path]
    path, jem = tmp_path / "classifier.pt", tmp_path / "jem.pt"
    run("train_jem", *command)
    before, done = path.read_bytes(), capsys.readouterr().out
    jem.unlink()
    assert "training one first" in done and "starting from the classifier" not in done
    run("train_jem", *command)
    jem.unlink()
    assert f"starting from the classifier {path}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        run("train_jem", *command, "--lr", 0.01)
    assert caught.value.code == 2 and "--pretrain-lr 0.001" in capsys.readouterr().err
    assert path.read_bytes() == before and not jem.exists()
    run("train_jem", *command, "--lr", 0.01, "--pretrain-lr", 0.001)
    assert f"starting from the classifier {path}" in capsys.readouterr().out
    assert load_checkpoint(jem, "jem")["args"]["lr"] == 0.01 and path.read_bytes() == before
    jem.unlink()
    run("train_jem", *command, "--lr", 0.01, "--overwrite")
    assert "it is replaced" in capsys.readouterr().out
    assert load_checkpoint(path, "classifier")["args"]["lr"] == 0.01 and jem.exists()


def test_a_classifier_pretrains_at_a_learning_rate_of_its_own(tmp_path):
    args = parse("train_jem", ["--dataset", "cifar10"])
    assert parse("train_classifier", ["--dataset", "cifar10"]).lr == args.pretrain_lr > args.lr
    run("train_jem", *SHORT, "--pretrain-epochs", 1, "--pretrain-lr", 0.02, "--out-dir", tmp_path)
    rates = {"classifier": [], "jem": []}
    for row in read_metrics(tmp_path / "metrics.csv"):
        rates[row["phase"]].append(float(row["lr"]))
    assert max(rates["classifier"]) == pytest.approx(20 * max(rates["jem"]))  # 0.02 and 0.001


@pytest.mark.parametrize(
    "flags, langevin",
    [
        ("--restart uniform", LANGEVIN),
        ("--p-xy-weight 0.1", LANGEVIN),
        ("--clamp 0 --pixel-grad-clip 0", LANGEVIN._replace(clamp=None, pixel_grad_clip=None)),
        ("--noise-first --step-size 0.2", LANGEVIN._replace(noise_first=True, step_size=0.2)),
    ],
)
def test_every_way_to_train_goes_through_from_scratch(tmp_path, flags, langevin, capsys):
    run("train_jem", *SHORT, "--from-scratch", *flags.split(), "--out-dir", tmp_path)
    assert "random weights" in capsys.readouterr().out
    checkpoint = load_checkpoint(tmp_path / "jem.pt", "jem")
    assert checkpoint["finished"] and checkpoint["conditional"] == ("--p-xy-weight" in flags)
    assert langevin_from(checkpoint) == langevin


def test_a_dry_run_keeps_no_file(tmp_path, capsys):
    folder = tmp_path / "run"
    run("train_jem", *TINY, "--pretrain-epochs", "1", "--dry-run", "--out-dir", folder)
    assert "dry run" in capsys.readouterr().out and not folder.exists()


def test_the_same_seed_gives_the_same_model_and_another_seed_another(tmp_path):
    models = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        flags = ("--from-scratch", "--seed", seed, "--out-dir", tmp_path / name)
        run("train_jem", *SHORT, *flags)
        models.append(load_checkpoint(tmp_path / name / "jem.pt", "jem"))
    one, *others = models
    same = [torch.equal(one["buffer"]["images"], other["buffer"]["images"]) for other in others]
    assert same == [True, False]
    assert all(torch.equal(value, models[1]["model"][name]) for name, value in one["model"].items())
