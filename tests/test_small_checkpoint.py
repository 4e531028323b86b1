"""A small checkpoint draws and classifies as the one it was made from."""

import hashlib
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import ROOT, generator, run

from sgld_nrg.models import load_model
from sgld_nrg.support.checkpoints import NEW_FLAGS, load_checkpoint
from sgld_nrg.support.commands import SHIPPED
from sgld_nrg.support.restarts import restart_from_state


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
    make(script, "--checkpoint", whole, "--rank", 20, "--chains", 20, "--out", path)
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


def test_a_checkpoint_of_an_earlier_version_can_be_made_small(script, checkpoint, tmp_path):
    args = {name: value for name, value in checkpoint["args"].items() if name not in NEW_FLAGS}
    torch.save({**checkpoint, "args": args}, tmp_path / "jem.pt")
    make(script, "--checkpoint", tmp_path / "jem.pt", "--out", tmp_path / "small.pt")
    assert load_checkpoint(tmp_path / "small.pt", "jem")["args"]["pretrain_lr"] == 0


def test_a_small_checkpoint_names_no_folder_and_keeps_its_recipe_and_detector(script, checkpoint):
    origin = {**checkpoint["origin"], "data_dir": "/home/me/pictures"}
    small = script.small({**checkpoint, "origin": origin}, 20, 4, 10)
    assert small["origin"] == {**origin, "data_dir": ""}
    assert small["detector"] == checkpoint["detector"]
    assert small["args"]["p_x_weight"] == checkpoint["args"]["p_x_weight"]
    assert not any("/" in str(value) for value in small["args"].values())


def test_nothing_is_replaced(script, tiny_run, tmp_path, capsys):
    (tmp_path / "there.pt").write_text("mine")
    with pytest.raises(SystemExit) as caught:
        make(script, "--checkpoint", tiny_run / "jem.pt", "--out", tmp_path / "there.pt")
    assert caught.value.code == 2 and "there already" in capsys.readouterr().err
    assert (tmp_path / "there.pt").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "shape", "largest"),
    [
        ("mnist", (1, 28, 28), 1_500_000),
        ("fashion-mnist", (1, 28, 28), 1_500_000),
        ("cifar10", (3, 32, 32), 8_000_000),
    ],
)
def test_the_checkpoints_that_ship_are_the_models_of_their_cards(name, shape, largest):
    shipped = ROOT / "results" / f"{name}.pt"
    card, digest = shipped.with_suffix(".md").read_text(), hashlib.sha256(shipped.read_bytes())
    assert digest.hexdigest() in card and shipped.stat().st_size < largest
    state = load_checkpoint(shipped, "jem")
    assert state["dataset"] == name or (name == "cifar10" and "horse" in state["origin"]["classes"])
    assert not state["origin"]["data_dir"] and state["detector"]
    assert load_model(state)(torch.zeros(1, *shape)).shape == (1, 10)


def test_the_default_checkpoint_is_one_that_ships():
    assert Path(SHIPPED) == ROOT / "results" / "mnist.pt"
