"""The classifier's training, end to end on the digits."""

import torch
from conftest import run

from sgld_nrg import train_classifier
from sgld_nrg.support.checkpoints import load_checkpoint
from sgld_nrg.support.log import read_metrics
from sgld_nrg.support.schedule import epoch_order
from sgld_nrg.support.training import Training

FLAGS = ["--dataset", "digits", "--width", "8", "--warmup-iterations", "20"]


def test_it_learns_the_digits_and_writes_what_it_promises(tmp_path, capsys):
    folder = tmp_path / "run"
    run("train_classifier", *FLAGS, "--epochs", 6, "--lr", 4e-3, "--out-dir", folder)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("test accuracy: ") and float(last.split()[2]) > 90
    written = {"classifier.pt", "metrics.csv", "curves.png", "config.json"}
    assert {path.name for path in folder.iterdir()} == written == set(train_classifier.OUTPUTS)
    rows = read_metrics(folder / "metrics.csv")
    assert [float(row["epoch"]) for row in rows] == list(range(1, 7))
    assert all(row["cross_entropy"] and row["val_accuracy"] for row in rows)


def test_the_checkpoint_keeps_the_epoch_of_the_lowest_validation_cross_entropy(
    tmp_path, monkeypatch, no_curves
):
    losses, judged = (3.0, 1.0, 2.0), []

    def evaluate(model, split):
        judged.append({name: value.clone() for name, value in model.state_dict().items()})
        return (*losses, 0.0)[len(judged) - 1], 0.5  # the last is on the test split

    monkeypatch.setattr(train_classifier, "evaluate", evaluate)
    flags = "--epochs 3 --batch-size 314 --ema-decay 0.5"
    run("train_classifier", *FLAGS, *flags.split(), "--out-dir", tmp_path)
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [float(row["val_cross_entropy"]) for row in rows] == list(losses)
    checkpoint = load_checkpoint(tmp_path / "classifier.pt", "classifier")
    assert checkpoint["val_cross_entropy"] == 1.0
    first, second, third, tested = judged
    for name, kept in checkpoint["model"].items():
        assert torch.equal(kept, second[name]) and torch.equal(kept, tested[name])
        assert not torch.equal(kept, first[name]) and not torch.equal(kept, third[name])


def test_the_network_sees_the_images_of_the_batch_augmented(
    tmp_path, monkeypatch, digits, no_curves
):
    seen, logits = [], Training.logits_for_loss
    monkeypatch.setattr(
        Training, "logits_for_loss", lambda self, x: logits(self, seen.append(x) or x)
    )
    flags = "--augment 1 --input-noise 0 --batch-size 314 --epochs 1"
    run("train_classifier", *FLAGS, *flags.split(), "--out-dir", tmp_path)
    images = digits.train.images[epoch_order(1257, 0, 0)[: 4 * 314]]
    assert (torch.cat(seen) != images).flatten(1).any(1).all()


def test_the_loss_and_the_accuracy_of_a_split_are_those_of_its_logits(digits):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    images, labels = digits.val
    logits = model(images)
    loss, accuracy = train_classifier.evaluate(model, digits.val)
    wanted = -logits.log_softmax(1)[range(len(labels)), labels].mean()
    torch.testing.assert_close(loss, wanted.item())
    assert accuracy == (logits.argmax(1) == labels).float().mean().item()


def test_it_trains_a_wide_residual_network(tmp_path, capsys):
    folder = tmp_path / "none"
    flags = "--arch wide-resnet --width 1 --dry-run"
    run("train_classifier", *flags.split(), "--out-dir", folder)
    assert "dry run" in capsys.readouterr().out and not folder.exists()
