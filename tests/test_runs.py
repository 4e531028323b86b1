"""Checkpoints, the metrics log, devices: what is written, what is refused, what is left as it was."""

import csv
import json
import os
import pickle
from argparse import Namespace

import pytest
import torch

import runs
from cli import UserError

WHOLE = dict.fromkeys(runs.NEEDED["jem"], 0)  # a checkpoint that has everything, if little of use


class Bomb:
    """Unpickling one makes a file."""

    def __reduce__(self):
        return open, ("exploded", "w")


def test_a_checkpoint_comes_back_as_it_was_and_plain_torch_load_accepts_it(tmp_path):
    args = {"lr": 0.1, "clamp": (-1, 1), "none": None}
    state = {**WHOLE, "model": {"weight": torch.randn(2, 2)}, "args": args, "finished": True}
    runs.save_checkpoint(tmp_path / "jem.pt", "jem", **state)
    for loaded in (runs.load_checkpoint(tmp_path / "jem.pt", "jem"), torch.load(tmp_path / "jem.pt", weights_only=True)):
        assert torch.equal(loaded["model"]["weight"], state["model"]["weight"]) and loaded["args"] == state["args"]
    assert os.listdir(tmp_path) == ["jem.pt"]


def test_a_failed_write_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "jem.pt"
    runs.save_checkpoint(path, "jem", finished=False)
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match="No space left"):
        runs.save_checkpoint(path, "jem", finished=True)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["jem.pt"]


def test_the_last_two_checkpoints_stay_beside_the_new_one_and_a_damaged_one_names_them(tmp_path):
    path = tmp_path / "jem.pt"
    for step in range(4):
        runs.save_checkpoint(path, "jem", **WHOLE, step=step)
    kept = [path, tmp_path / "jem.pt.1", tmp_path / "jem.pt.2"]
    assert sorted(tmp_path.iterdir()) == kept
    assert [torch.load(file, weights_only=True)["step"] for file in kept] == [3, 2, 1]
    for damaged, named in (
        (path, r"copy the older .*jem\.pt\.1"),
        (kept[1], r"copy the older .*jem\.pt\.2"),
        (kept[2], "another"),
    ):
        content = damaged.read_bytes()[:100]
        damaged.unlink()
        damaged.write_bytes(content)
        with pytest.raises(UserError, match=named):
            runs.load_checkpoint(path, "jem")
    runs.remove_older(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_belongs_to_one_training_at_a_time(tmp_path):
    args = Namespace(dry_run=False, out_dir=tmp_path, resume=False)
    with runs.run_folder(args):
        with pytest.raises(UserError, match="another training"), runs.run_folder(args):
            pass
        with runs.run_folder(Namespace(dry_run=False, out_dir=tmp_path)) as folder:  # sample.py and evaluate.py may
            assert folder == tmp_path
    with runs.run_folder(args):
        pass


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # what it warns of is the test
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "truncated", "pickle", "foreign", "incomplete", "classifier"])
def test_a_file_that_is_no_jem_is_refused_by_name_and_never_executed(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "some file é.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "truncated":
        runs.save_checkpoint(path, "jem", model=torch.zeros(1000))
        path.write_bytes(path.read_bytes()[:2000])
    elif content == "pickle":
        path.write_bytes(pickle.dumps({"format": runs.FORMAT, "kind": "jem", "model": Bomb()}))
    elif content == "foreign":
        torch.save({"state_dict": {}}, path)
    elif content == "incomplete":
        runs.save_checkpoint(path, "jem", model={})
    else:
        runs.save_checkpoint(path, "classifier", model={})
    with pytest.raises(UserError, match=r"some file é\.pt"):
        runs.load_checkpoint(path, "jem")
    assert not (tmp_path / "exploded").exists()


def test_weights_of_another_network_are_refused():
    config = {"arch": "small-cnn", "num_classes": 3, "channels": 1, "image_size": 8, "width": 2, "depth": 1}
    other = runs.build_model(**{**config, "width": 4}).state_dict()
    with pytest.raises(UserError, match="do not fit"):
        runs.load_model({"model_config": config, "model": other}, "cpu")


def test_a_device_that_is_not_there_is_refused_with_what_to_do():
    for name in ("cuda:99", "no-such-device"):
        with pytest.raises(UserError, match="--device cpu"):
            runs.pick_device(name)
    assert runs.pick_device("cpu") == torch.device("cpu")


def test_rows_hold_the_means_since_the_row_before(tmp_path):
    log = runs.MetricsLog(tmp_path / "metrics.csv", "jem")
    for value in (1.0, 3.0):
        log.add(0.5, energy_gap=torch.tensor(value))
    log.write(2, 1.0, 0.1, 0.01)
    log.add(0.25, energy_gap=torch.tensor(7.0))
    log.write(3, 1.5, 0.2, 0.01, val_accuracy=0.5)
    first, second = runs.read_metrics(tmp_path / "metrics.csv")
    assert (float(first["energy_gap"]), float(first["iterations_per_second"]), first["val_accuracy"]) == (2, 2, "")
    assert (float(second["energy_gap"]), float(second["iterations_per_second"]), second["val_accuracy"]) == (7, 4, "0.5")
    assert list(first) == list(runs.COLUMNS)


def test_a_value_that_is_not_finite_is_named_with_its_step(tmp_path):
    log = runs.MetricsLog(tmp_path / "metrics.csv", "jem")
    log.add(1.0, energy_positive=torch.tensor(float("nan")))
    with pytest.raises(FloatingPointError, match="energy_positive is nan at step 7"):
        log.write(7, 1.0, 0.1, 0.01)


def test_a_new_log_replaces_its_phase_alone_and_a_resumed_one_cuts_what_comes_after(tmp_path):
    path = tmp_path / "metrics.csv"
    for phase in ("classifier", "jem"):
        log = runs.MetricsLog(path, phase)
        for step in (10, 20, 30):
            log.add(1.0, accuracy=torch.tensor(0.5))
            log.write(step, step / 10, 0.1, 0.01)
    runs.MetricsLog(path, "jem", resumed_at=20)
    assert [(row["phase"], row["step"]) for row in runs.read_metrics(path)] == [
        ("classifier", "10"), ("classifier", "20"), ("classifier", "30"), ("jem", "10"), ("jem", "20"),
    ]  # fmt: skip
    runs.MetricsLog(path, "classifier")
    assert [row["phase"] for row in runs.read_metrics(path)] == ["jem", "jem"]


def test_somebody_elses_metrics_and_config_are_not_overwritten(tmp_path):
    path = tmp_path / "metrics.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["mine"], ["1"]])
    with pytest.raises(UserError, match="--out-dir"):
        runs.MetricsLog(path, "jem")
    assert path.read_text().split() == ["mine", "1"]
    (tmp_path / "config.json").write_text("not json")
    with pytest.raises(UserError, match="not JSON"):
        runs.write_config(tmp_path, "jem", Namespace(lr=1))
    assert (tmp_path / "config.json").read_text() == "not json"


def test_the_config_records_what_a_repetition_needs(tiny_run):
    config = json.loads((tiny_run / "config.json").read_text())
    for phase in ("classifier", "jem"):
        assert config[phase]["arguments"]["seed"] == 0 and config[phase]["packages"]["torch"] == torch.__version__.split("+")[0]
        assert config[phase]["resolved"]["model_config"]["width"] == 8
    assert "steps" in config["jem"]["arguments"]


def test_chain_energy_is_float32_and_joint_where_labels_are_given():
    model = runs.build_model("small-cnn", 3, 1, 8, 2, 1)
    energy_of = runs.chain_energy(model, torch.device("cpu"), "float32")
    x, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(energy_of(x), -model(x).logsumexp(1))
    torch.testing.assert_close(energy_of(x, labels), -model(x)[range(4), labels])
    assert runs.chain_energy(model, torch.device("cpu"), "bf16")(x).dtype == torch.float32
