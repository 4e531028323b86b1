"""A small checkpoint draws and classifies as the one it was made from."""

import re

import pytest
import torch

import cli
import export
import runs
import sample
from restarts import GaussianRestart, restart_from_state


def test_a_small_checkpoint_has_the_model_the_restarts_and_some_chains(tiny_run, checkpoint, digits, tmp_path, capsys):
    path = tmp_path / "small.pt"
    export.main(["--checkpoint", str(tiny_run / "jem.pt"), "--rank", "8", "--chains", "20", "--out", str(path)])
    assert re.search(r"\d+ kB, SHA-256 [0-9a-f]{64}", capsys.readouterr().out)
    assert path.stat().st_size < (tiny_run / "jem.pt").stat().st_size / 4
    small = runs.load_checkpoint(path, "jem")
    assert torch.equal(small["buffer"]["labels"], checkpoint["buffer"]["labels"][:20])
    assert (small["buffer"]["images"] - checkpoint["buffer"]["images"][:20]).abs().max() < 0.001
    logits, wanted = (runs.load_model(state, "cpu")(digits.test.images) for state in (small, checkpoint))
    assert (logits - wanted).abs().max() < 0.05 and (logits.argmax(1) == wanted.argmax(1)).float().mean() > 0.99
    spread, full = (
        restart_from_state(state["restart"]).draw(torch.zeros(2000, dtype=torch.int64), torch.Generator().manual_seed(0)).var(0)
        for state in (small, checkpoint)
    )
    assert 0.5 < spread.sum() / full.sum() < 1.05
    sample.main(["--checkpoint", str(path), "--num", "4", "--steps", "2"])
    assert (tmp_path / "small" / "samples-fresh.png").exists()


def test_the_most_frequent_gaussians_are_kept_and_the_classes_stay_as_frequent(checkpoint):
    restart = GaussianRestart(torch.arange(6.0)[:, None].expand(6, 64), torch.zeros(6, 64, 2), (1, 8, 8))
    restart.weights = torch.tensor([[0.1, 0.2, 0.3], [0.15, 0.2, 0.05]])
    kept = restart_from_state(export.small({**checkpoint, "restart": restart.state_dict()}, 2, 1, 3)["restart"])
    assert kept.mean[:, 0].tolist() == [2, 1, 4, 3] and kept.factor.shape == (4, 64, 1)
    torch.testing.assert_close(
        kept.weights.float(), torch.tensor([[0.36, 0.24], [0.4 * 4 / 7, 0.4 * 3 / 7]]), rtol=0, atol=1e-3
    )


def test_nothing_is_replaced(tiny_run, tmp_path, capsys):
    (tmp_path / "there.pt").write_text("mine")
    with pytest.raises(SystemExit) as caught:
        export.main(["--checkpoint", str(tiny_run / "jem.pt"), "--out", str(tmp_path / "there.pt")])
    assert caught.value.code == 2 and "there already" in capsys.readouterr().err
    assert (tmp_path / "there.pt").read_text() == "mine"


def test_the_checkpoint_that_ships_is_the_model_of_its_card():
    import hashlib
    from pathlib import Path

    shipped = Path(cli.SHIPPED)
    card = shipped.with_suffix(".md").read_text()
    assert hashlib.sha256(shipped.read_bytes()).hexdigest() in card and shipped.stat().st_size < 1_000_000
    state = runs.load_checkpoint(shipped, "jem")
    assert state["dataset"] == "mnist" and runs.load_model(state, "cpu")(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
