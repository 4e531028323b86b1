"""The classifier's training, end to end on the digits."""

import pytest
import torch
from conftest import TINY

import runs
import train_classifier

FLAGS = ["--dataset", "digits", "--width", "8", "--warmup-steps", "20"]


def test_it_learns_the_digits_and_writes_what_it_promises(tmp_path, capsys):
    train_classifier.main([*FLAGS, "--epochs", "12", "--out-dir", str(tmp_path / "run")])
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("test accuracy: ") and float(last.split()[2]) > 90
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"classifier.pt", "metrics.csv", "curves.png", "config.json"}
    rows = runs.read_metrics(tmp_path / "run" / "metrics.csv")
    assert [float(row["epoch"]) for row in rows] == list(range(1, 13))
    assert all(row["cross_entropy"] and row["val_accuracy"] for row in rows)


def test_the_checkpoint_keeps_the_epoch_of_the_lowest_validation_cross_entropy(tmp_path, digits):
    flags = ["--epochs", "30", "--lr", "0.03", "--lr-floor", "1", "--ema-decay", "0"]  # it gets worse again
    train_classifier.main([*FLAGS, *flags, "--out-dir", str(tmp_path)])
    losses = [float(row["val_cross_entropy"]) for row in runs.read_metrics(tmp_path / "metrics.csv")]
    assert min(losses) < losses[-1]
    checkpoint = runs.load_checkpoint(tmp_path / "classifier.pt", "classifier")
    loss, _ = train_classifier.evaluate(runs.load_model(checkpoint, "cpu"), digits.val)
    assert loss == pytest.approx(min(losses), rel=1e-4)


def test_it_trains_a_wide_residual_network(tmp_path, capsys):
    train_classifier.main(["--arch", "wide-resnet", "--width", "1", "--dry-run", "--out-dir", str(tmp_path / "none")])
    assert "dry run" in capsys.readouterr().out and not (tmp_path / "none").exists()


def test_a_stopped_run_resumes_to_the_same_weights(tmp_path, interrupt):
    flags = [*TINY[:4], "--epochs", "4", "--warmup-steps", "20"]
    train_classifier.main([*flags, "--out-dir", str(tmp_path / "whole")])
    interrupt()
    with pytest.raises(SystemExit):
        train_classifier.main([*flags, "--out-dir", str(tmp_path / "stopped")])
    train_classifier.main(["--resume", "--out-dir", str(tmp_path / "stopped")])
    whole, stopped = (runs.load_checkpoint(tmp_path / name / "classifier.pt", "classifier") for name in ("whole", "stopped"))
    assert whole["finished"] and stopped["finished"]
    for name, value in whole["training"]["model"].items():
        assert torch.equal(value, stopped["training"]["model"][name])
