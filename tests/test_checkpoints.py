"""Checkpoints: what is written, refused, left as it was; those of an earlier version go on."""

import os
import pickle
import shutil
import signal
from argparse import Namespace

import pytest
import torch
from conftest import TINY, Bomb, run

from sgld_nrg.models import build_model, load_model
from sgld_nrg.support import checkpoints
from sgld_nrg.support.checkpoints import (
    FORMATS,
    NEEDED,
    NEW_FLAGS,
    load_checkpoint,
    output_folder,
    save_checkpoint,
    training_folder,
)
from sgld_nrg.support.errors import UserError
from sgld_nrg.support.journal import Journal
from sgld_nrg.support.log import COLUMNS, read_metrics
from sgld_nrg.support.parallel import Alone

WHOLE = dict.fromkeys(NEEDED["jem"], 0)  # a checkpoint that has everything, if little of use


def test_a_checkpoint_comes_back_as_it_was_and_plain_torch_load_accepts_it(tmp_path):
    path, args = tmp_path / "jem.pt", {"lr": 0.1, "clamp": (-1, 1), "none": None}
    state = {**WHOLE, "model": {"weight": torch.randn(2, 2)}, "args": args, "finished": True}
    save_checkpoint(path, "jem", **state)
    ways = ((load_checkpoint(path, "jem"), NEW_FLAGS), (torch.load(path, weights_only=True), {}))
    for loaded, added in ways:
        assert torch.equal(loaded["model"]["weight"], state["model"]["weight"])
        assert loaded["args"] == {**added, **state["args"]}
    assert os.listdir(tmp_path) == ["jem.pt"]


@pytest.mark.parametrize(
    "module, name, error",
    [
        (os, "fsync", OSError(28, "No space left on device")),
        (torch, "save", RuntimeError("No space left for the archive\nand more lines")),
    ],
)
def test_a_failed_write_leaves_the_previous_checkpoint(tmp_path, monkeypatch, module, name, error):
    path = tmp_path / "jem.pt"
    save_checkpoint(path, "jem", finished=False)
    before = path.read_bytes()

    def full_disk(*_):
        raise error

    monkeypatch.setattr(module, name, full_disk)
    with pytest.raises(UserError, match="No space left") as caught:
        save_checkpoint(path, "jem", finished=True)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["jem.pt"]


def test_a_write_that_really_fails_leaves_no_temporary_file(tmp_path):
    resource = pytest.importorskip("resource")  # the system refuses files beyond a size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*jem\.pt"):
            save_checkpoint(tmp_path / "jem.pt", "jem", model=torch.zeros(1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []


def test_the_last_two_checkpoints_stay_beside_the_new_one_and_a_damaged_one_names_them(tmp_path):
    path = tmp_path / "jem.pt"
    for iteration in range(4):
        save_checkpoint(path, "jem", **WHOLE, iteration=iteration)
    kept = [path, tmp_path / "jem.pt.1", tmp_path / "jem.pt.2"]
    assert sorted(tmp_path.iterdir()) == kept
    assert [torch.load(file, weights_only=True)["iteration"] for file in kept] == [3, 2, 1]
    for damaged, named in (
        (path, r"copy the older .*jem\.pt\.1"),
        (kept[1], r"copy the older .*jem\.pt\.2"),
        (kept[2], "another"),
    ):
        content = damaged.read_bytes()[:100]
        damaged.unlink()
        damaged.write_bytes(content)
        with pytest.raises(UserError, match=named):
            load_checkpoint(path, "jem")
    checkpoints.remove_older(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_belongs_to_one_training_at_a_time(tmp_path):
    args, ranks = Namespace(dry_run=False, out_dir=tmp_path), Alone()
    with training_folder(args, ranks):
        with pytest.raises(UserError, match="another training"), training_folder(args, ranks):
            pass
        with output_folder(args) as folder:  # sample.py and evaluate.py may
            assert folder == tmp_path
    with training_folder(args, ranks) as folder:
        assert folder == tmp_path


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # what it warns of is the test
@pytest.mark.parametrize(
    "content",
    [b"", b"not a checkpoint", "truncated", "pickle", "foreign", "incomplete", "classifier"],
)
def test_a_file_that_is_no_jem_is_refused_by_name_and_never_executed(
    tmp_path, content, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "some file é.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "truncated":
        save_checkpoint(path, "jem", model=torch.zeros(1000))
        path.write_bytes(path.read_bytes()[:2000])
    elif content == "pickle":
        state = {"format": FORMATS[-1], "kind": "jem", "model": Bomb()}
        path.write_bytes(pickle.dumps(state))
    elif content == "foreign":
        torch.save({"state_dict": {}}, path)
    elif content == "incomplete":
        save_checkpoint(path, "jem", model={})
    else:
        save_checkpoint(path, "classifier", model={})
    with pytest.raises(UserError, match=r"some file é\.pt"):
        load_checkpoint(path, "jem")
    assert not (tmp_path / "exploded").exists()


def test_weights_of_another_network_are_refused():
    config = {"arch": "small-cnn", "num_classes": 3, "channels": 1, "image_size": 8}
    config |= {"width": 2, "depth": 1}
    other = build_model(**{**config, "width": 4}).state_dict()
    with pytest.raises(UserError, match="do not fit"):
        load_model({"model_config": config, "model": other})


@pytest.fixture
def unfinished(tmp_path, monkeypatch, no_curves):
    """The folder of a training that ended within its first epoch, after its first checkpoint."""
    save = Journal.save

    def save_and_stop(journal, checkpoint):
        save(journal, checkpoint)
        raise KeyboardInterrupt

    folder = tmp_path / "unfinished"
    flags = "--from-scratch --epochs 1 --steps 2 --log-every 2 --save-iterations 5"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Journal, "save", save_and_stop)
        run("train_jem", *TINY, *flags.split(), "--out-dir", folder)
    return folder


def in_format_1(folder, copy, sam_rho):
    """Copy a training's folder as an earlier version would have left it."""
    shutil.copytree(folder, copy)
    state = torch.load(copy / "jem.pt", weights_only=True)
    args, part = state["args"], state["training"]
    for name in ("warmup", "save"):
        args[f"{name}_steps"] = args.pop(f"{name}_iterations")
    args["sam_rho"] = sam_rho
    part["step"] = part.pop("iteration")
    torch.save({**state, "format": "sgld-nrg 1"}, copy / "jem.pt")
    table = (copy / "metrics.csv").read_text()
    assert table.startswith("phase,iteration,")
    (copy / "metrics.csv").write_text(table.replace("phase,iteration,", "phase,step,", 1))


def test_a_run_of_the_earlier_format_goes_on_to_the_same_weights(unfinished, tmp_path):
    old = tmp_path / "old"
    in_format_1(unfinished, old, sam_rho=0.0)
    before = load_checkpoint(old / "jem.pt", "jem")
    assert before["training"]["iteration"] == 5 and not before["finished"]
    assert before["args"]["warmup_iterations"] == 20 and before["args"]["save_iterations"] == 5
    for folder in (unfinished, old):
        run("train_jem", "--resume", "--out-dir", folder)
    wanted, found = (load_checkpoint(folder / "jem.pt", "jem") for folder in (unfinished, old))
    assert found["format"] == FORMATS[-1] and found["finished"] and wanted["finished"]
    for one, other in (
        (wanted["model"], found["model"]),
        (wanted["buffer"], found["buffer"]),
        (wanted["training"]["model"], found["training"]["model"]),
    ):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    tables = [read_metrics(folder / "metrics.csv") for folder in (unfinished, old)]
    for row in (row for rows in tables for row in rows):
        del row["minutes"], row["iterations_per_second"]
    assert tables[0] == tables[1] and [row["iteration"] for row in tables[0]][:2] == ["2", "4"]
    header = (old / "metrics.csv").read_text().splitlines()[0]
    assert header == ",".join(COLUMNS)


def test_a_run_with_sharpness_aware_steps_is_refused_and_left_as_it_is(
    unfinished, tmp_path, capsys
):
    old = tmp_path / "old"
    in_format_1(unfinished, old, sam_rho=0.05)
    before = {path.name: path.read_bytes() for path in old.iterdir() if path.is_file()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run("train_jem", "--resume", "--out-dir", old)
    message = capsys.readouterr().err
    assert caught.value.code == 2
    assert message.startswith("error: ") and message.count("\n") == 1 and "--sam-rho" in message
    assert {path.name: path.read_bytes() for path in old.iterdir() if path.is_file()} == before
