"""A small checkpoint draws and classifies as the one it was made from."""

import hashlib
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import ROOT, generator, run

from sgld_nrg.models import load_model
from sgld_nrg.support.checkpoints import load_checkpoint
from sgld_nrg.support.commands import SHIPPED
from sgld_nrg.support.restarts import GaussianRestart, restart_from_state


@pytest.fixture
def script(monkeypatch):
    """The module of benchmarks/small_checkpoint.py."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module("small_checkpoint")


def make(script, *flags):
    script.main(script.parse(list(map(str, flags))))


def test_a_small_checkpoint_has_the_model_the_restarts_and_some_chains(
    script, tiny_run, checkpoint, digits, tmp_path, capsys
):
    path, whole = tmp_path / "small.pt", tiny_run / "jem.pt"
    make(script, "--checkpoint", whole, "--rank", 8, "--chains", 20, "--out", path)
    assert re.search(r"\d+ kB, SHA-256 [0-9a-f]{64}", capsys.readouterr().out)
    assert path.stat().st_size < whole.stat().st_size / 4
    small = load_checkpoint(path, "jem")
    buffer, buffer_before = small["buffer"], checkpoint["buffer"]
    assert torch.equal(buffer["labels"], buffer_before["labels"][:20])
    assert (buffer["images"] - buffer_before["images"][:20]).abs().max() < 0.001
    logits, wanted = (load_model(state)(digits.test.images) for state in (small, checkpoint))
    assert (logits - wanted).abs().max() < 0.05
    assert (logits.argmax(1) == wanted.argmax(1)).float().mean() > 0.99
    labels = torch.zeros(2000, dtype=torch.int64)
    spread, full = (
        restart_from_state(state["restart"]).draw(labels, generator()).var(0)
        for state in (small, checkpoint)
    )
    assert 0.5 < spread.sum() / full.sum() < 1.05
    run("sample", "--checkpoint", path, "--num", 4, "--steps", 2)
    assert (tmp_path / "small" / "samples-fresh.png").exists()


def test_the_most_frequent_gaussians_are_kept_and_the_classes_stay_as_frequent(script, checkpoint):
    mean, factor = torch.arange(6.0)[:, None].expand(6, 64), torch.zeros(6, 64, 2)
    weights = torch.tensor([[0.1, 0.2, 0.3], [0.15, 0.2, 0.05]])
    restart = GaussianRestart(mean, factor, (1, 8, 8), weights)
    state = {**checkpoint, "restart": restart.state_dict()}
    kept = restart_from_state(script.small(state, 2, 1, 3)["restart"])
    assert kept.mean[:, 0].tolist() == [2, 1, 4, 3] and kept.factor.shape == (4, 64, 1)
    expected = torch.tensor([[0.36, 0.24], [0.4 * 4 / 7, 0.4 * 3 / 7]])
    torch.testing.assert_close(kept.weights.float(), expected, rtol=0, atol=1e-3)


def test_nothing_is_replaced(script, tiny_run, tmp_path, capsys):
    (tmp_path / "there.pt").write_text("mine")
    with pytest.raises(SystemExit) as caught:
        make(script, "--checkpoint", tiny_run / "jem.pt", "--out", tmp_path / "there.pt")
    assert caught.value.code == 2 and "there already" in capsys.readouterr().err
    assert (tmp_path / "there.pt").read_text() == "mine"


def test_the_checkpoint_that_ships_is_the_model_of_its_card():
    shipped = Path(SHIPPED)
    card, digest = shipped.with_suffix(".md").read_text(), hashlib.sha256(shipped.read_bytes())
    assert digest.hexdigest() in card and shipped.stat().st_size < 1_000_000
    state = load_checkpoint(shipped, "jem")
    assert state["dataset"] == "mnist"
    assert load_model(state)(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
