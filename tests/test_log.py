"""What a run writes down: rows of metrics.csv, config.json, TensorBoard."""

import csv
import json
import sys
from argparse import Namespace

import pytest
import torch

from sgld_nrg.support import log
from sgld_nrg.support.errors import UserError
from sgld_nrg.support.log import COLUMNS, MetricsLog, read_metrics


@pytest.fixture
def path(tmp_path):
    """Where metrics.csv of a test lies."""
    return tmp_path / "metrics.csv"


def started(path, phase="jem", resumed_at=None):
    metrics = MetricsLog(phase)
    metrics.start(path, resumed_at)
    return metrics


def test_rows_hold_the_means_since_the_row_before(path):
    metrics = started(path)
    for value in (1.0, 3.0):
        metrics.add(0.5, energy_gap=torch.tensor(value))
    metrics.write(2, 1.0, 0.1, 0.01)
    metrics.add(0.25, energy_gap=torch.tensor(7.0))
    row = metrics.write(3, 1.5, 0.2, 0.01, val_accuracy=0.5)
    assert row["energy_gap"] == 7 and row["val_accuracy"] == 0.5 and row["iteration"] == 3
    found = read_metrics(path)
    assert [float(row["energy_gap"]) for row in found] == [2, 7]
    assert [float(row["iterations_per_second"]) for row in found] == [2, 4]
    assert [row["val_accuracy"] for row in found] == ["", "0.5"]
    assert list(found[0]) == list(COLUMNS)


def test_a_value_that_is_not_finite_is_named_with_its_iteration(path):
    metrics = started(path)
    metrics.add(1.0, energy_positive=torch.tensor(float("nan")))
    with pytest.raises(FloatingPointError, match="energy_positive is nan at iteration 7"):
        metrics.write(7, 1.0, 0.1, 0.01)


def test_the_sums_since_the_last_row_survive_a_state_dict(path):
    metrics = started(path)
    metrics.add(0.5, energy_gap=torch.tensor(1.0))
    other = started(path)
    other.load_state_dict(metrics.state_dict())
    other.add(0.5, energy_gap=torch.tensor(3.0))
    row = other.write(2, 1.0, 0.1, 0.01)
    assert (row["energy_gap"], row["iterations_per_second"]) == (2, 2)


def write_two_phases(path):
    for phase in ("classifier", "jem"):
        metrics = started(path, phase)
        for iteration in (10, 20, 30):
            metrics.add(1.0, accuracy=torch.tensor(0.5))
            metrics.write(iteration, iteration / 10, 0.1, 0.01)


def test_a_new_log_replaces_its_phase_alone_and_a_resumed_one_cuts_what_comes_after(path):
    write_two_phases(path)
    started(path, "jem", resumed_at=20)
    assert [(row["phase"], row["iteration"]) for row in read_metrics(path)] == [
        ("classifier", "10"),
        ("classifier", "20"),
        ("classifier", "30"),
        ("jem", "10"),
        ("jem", "20"),
    ]
    started(path, "classifier")
    assert [row["phase"] for row in read_metrics(path)] == ["jem", "jem"]


def test_the_metrics_of_an_earlier_version_are_read_and_written_with_todays_names(path):
    write_two_phases(path)
    wanted = read_metrics(path)
    path.write_text(path.read_text().replace("phase,iteration,", "phase,step,", 1))
    assert read_metrics(path) == wanted
    started(path, "jem", resumed_at=30)
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)
    assert read_metrics(path) == wanted


def test_a_last_row_that_was_cut_short_is_none(path):
    write_two_phases(path)
    wanted = read_metrics(path)
    path.write_bytes(path.read_bytes() + b"jem,40,4,0.1")
    assert read_metrics(path) == wanted
    started(path, "jem", resumed_at=40)
    assert read_metrics(path) == wanted


def test_somebody_elses_metrics_are_not_overwritten(path):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["mine"], ["1"]])
    with pytest.raises(UserError, match="--out-dir"):
        started(path)
    assert path.read_text().split() == ["mine", "1"]


@pytest.mark.parametrize("content", ["not json", "[1]"])
def test_somebody_elses_config_is_not_overwritten(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"no config\.json of this project.*--out-dir"):
        log.write_config(tmp_path, "jem", Namespace(lr=1))
    assert (tmp_path / "config.json").read_text() == content


def test_the_config_records_what_a_repetition_needs(tiny_run):
    config = json.loads((tiny_run / "config.json").read_text())
    for phase in ("classifier", "jem"):
        assert config[phase]["arguments"]["seed"] == 0
        assert config[phase]["packages"]["torch"] == torch.__version__.split("+")[0]
        assert config[phase]["resolved"]["model_config"]["width"] == 8
    assert "steps" in config["jem"]["arguments"]


def test_tensorboard_without_its_package_is_refused_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        log.open_board(Namespace(tensorboard=True), tmp_path)
    assert log.open_board(Namespace(tensorboard=False), tmp_path) is None
