"""The benchmarks and examples go through and write what they promise."""

import json
import re
import runpy
import sys

import pytest
from conftest import ROOT, TINY


@pytest.fixture
def time_to_quality(monkeypatch):
    """The benchmark's names, as if imported."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield __import__("time_to_quality")
    sys.modules.pop("time_to_quality")


def test_quality_against_minutes_is_measured_for_every_variant_and_seed(tmp_path, time_to_quality, monkeypatch):
    small = {"buffer": 100, "fresh": 50, "long": 50, "longest": 5, "attacked": 8, "attack_steps": 2, "restarts": 1}
    monkeypatch.setattr(time_to_quality, "POINT", {**small, "long": 0})
    monkeypatch.setattr(time_to_quality, "QUICK", small)
    tiny = " ".join([*TINY, "--from-scratch"])  # its epochs end it long before the minutes do
    diverging = f"diverging:{tiny} --lr 1e30 --warmup-steps 0 --max-rollbacks 0"
    variants = ["--variant", f"scratch:{tiny}", "--variant", diverging]
    settings = ["--dataset", "digits", "--minutes", "5", "--jobs", "2", "--seeds", "1", "2", "--quick", "--test"]
    time_to_quality.main([*settings, *variants, "--out-dir", str(tmp_path)])
    found = json.loads((tmp_path / "quality.json").read_text())
    assert [run["seed"] for run in found["scratch"]] == [1, 2]
    for run in found["scratch"]:
        assert run["exit_code"] == 0 and run["points"]
        assert run["points"][-1]["step"] == run["test"]["step"] and 0 < run["test"]["accuracy"] < 1
        assert {"buffer", "fresh", "long", "ood inverted", "linf 0.1"} <= set(run["test"])
    assert all(run["exit_code"] == 1 and run["test"] is None for run in found["diverging"])
    table = (tmp_path / "quality.md").read_text()
    assert "| | scratch | diverging |" in table and "| runs that diverged | 0 of 2 | 2 of 2 |" in table and "±" in table
    assert (tmp_path / "quality.png").stat().st_size > 1000


@pytest.mark.parametrize("script", ["benchmarks/time_to_quality.py", "examples/two_moons.py"])
def test_importing_a_script_runs_nothing(script):
    assert "main" in runpy.run_path(str(ROOT / script), run_name="imported")


def test_two_moons_are_classified_and_their_density_is_learned(tmp_path, capsys):
    example = runpy.run_path(str(ROOT / "examples" / "two_moons.py"), run_name="imported")
    example["main"](["--iterations", "1000", "--out", str(tmp_path / "moons.png")])
    out = capsys.readouterr().out
    accuracy, likelihood, gaussian, uniform = map(float, re.findall(r"(-?\d+\.\d+)", out)[:4])
    assert accuracy > 95 and likelihood > gaussian + 0.2 > uniform
    assert (tmp_path / "moons.png").stat().st_size > 1000
