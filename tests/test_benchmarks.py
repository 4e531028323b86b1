"""The benchmarks and examples go through and write what they promise."""

import importlib
import json
import re
import runpy
import sys

import pytest
import torch
from conftest import ROOT, TINY

from models import build_model
from runs import chain_energy
from sgld import run_chains


def benchmark(name):
    """Make a fixture of a benchmark's names, as if imported."""

    @pytest.fixture
    def module(monkeypatch):
        monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module(name)
        sys.modules.pop(name)

    return module


time_to_quality, sgld_speed, costs = map(benchmark, ("time_to_quality", "sgld_speed", "costs"))


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

    monkeypatch.setattr(time_to_quality.subprocess, "Popen", None)  # nothing is trained again
    time_to_quality.main([*settings, *variants, "--resume", "--out-dir", str(tmp_path)])
    assert json.loads((tmp_path / "quality.json").read_text()) == found


def test_the_step_is_timed_beside_the_papers_and_the_machines_limit(tmp_path, sgld_speed, monkeypatch):
    monkeypatch.setitem(sgld_speed.MATRIX, "cpu", 64)
    flags = ["--networks", "small-cnn", "--batches", "2", "4", "--steps", "1", "3", "--rounds", "1", "--candidates"]
    sgld_speed.main([*flags, "--out-dir", str(tmp_path)])
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert {(row["batch"], row["steps"]) for row in rows} == {(2, 1), (2, 3), (4, 1), (4, 3)}
    assert {"ours", "ours, float32", "the paper's"} <= {row["method"] for row in rows}
    for row in rows:
        milliseconds = 1000 * row["batch"] / row["image_steps_per_second"]
        assert row["milliseconds_per_step"] == pytest.approx(milliseconds) and row["share_of_limit"] > 0
        assert row["method"] != "the paper's" or row["times_the_papers"] == 1
    parts = json.loads((tmp_path / "speed.json").read_text())["candidates"]
    assert parts[0]["name"] == "as it is" and all(row["milliseconds_per_step"] > 0 for row in parts)
    assert "times the paper's" in (tmp_path / "speed.md").read_text() and (tmp_path / "speed.png").stat().st_size > 1000


def test_the_papers_step_is_ours_at_its_settings(sgld_speed):
    torch.manual_seed(0)
    model = build_model("small-cnn", 10, 1, 28, width=4, depth=2, stem_stride=2)
    x = torch.rand(3, 1, 28, 28)
    torch.manual_seed(1)
    theirs = sgld_speed.paper_chains(model, x, 4)
    torch.manual_seed(1)
    ours = run_chains(chain_energy(model, torch.device("cpu"), "float32"), x, 4, step_size=1.0, noise_std=0.01, module=model)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_the_candidates_for_a_cheaper_step_give_the_same_chains(sgld_speed):
    torch.manual_seed(0)
    model, x = build_model(num_classes=10, **sgld_speed.NETWORKS["small-cnn"]), torch.rand(2, 1, 28, 28)
    ends = {}
    for name, call in sgld_speed.candidates(model, x).items():
        torch.manual_seed(1)
        ends[name] = call(x, 2)
    for end in ends.values():
        torch.testing.assert_close(end, ends["float32"], rtol=0, atol=0.02)  # bf16 beside it


def test_an_iterations_cost_grows_with_its_steps(costs):
    few, many = (costs.iteration_cost(torch.device("cpu"), [], steps, 64, 16) for steps in (1, 40))
    assert 0 < few < many


def test_what_costs_is_measured_written_and_drawn(tmp_path, costs, monkeypatch, tiny_run):
    monkeypatch.setattr(costs, "COUNTS", (10, 20))
    monkeypatch.setattr(costs, "AXES", {"steps": [1, 2], "batch": [4, 8], "size": [8, 12]})
    monkeypatch.setattr(costs, "STARTS", 1)
    costs.main(["--checkpoint", str(tiny_run / "jem.pt"), "--data-dir", str(tmp_path), "--out-dir", str(tmp_path)])
    found = json.loads((tmp_path / "costs.json").read_text())
    assert [count for count, _ in found["memory"]] == [10, 20] and all(50 < size < 4000 for _, size in found["memory"])
    assert 0 < found["start"]["help"] < found["start"]["first iteration on digits"]
    assert "batch: 4:" in (tmp_path / "costs.md").read_text() and (tmp_path / "costs.png").stat().st_size > 1000


SCRIPTS = [
    *("benchmarks/time_to_quality.py", "benchmarks/sgld_speed.py", "benchmarks/costs.py", "benchmarks/soak.py"),
    "examples/two_moons.py",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_runs_nothing(script, monkeypatch):
    monkeypatch.syspath_prepend(str((ROOT / script).parent))  # where Python looks first when it runs a script
    assert "main" in runpy.run_path(str(ROOT / script), run_name="imported")


def test_two_moons_are_classified_and_their_density_is_learned(tmp_path, capsys):
    example = runpy.run_path(str(ROOT / "examples" / "two_moons.py"), run_name="imported")
    example["main"](["--iterations", "1000", "--out", str(tmp_path / "moons.png")])
    out = capsys.readouterr().out
    accuracy, likelihood, gaussian, uniform = map(float, re.findall(r"(-?\d+\.\d+)", out)[:4])
    assert accuracy > 95 and likelihood > gaussian + 0.2 > uniform
    assert (tmp_path / "moons.png").stat().st_size > 1000


def test_the_walkthrough_goes_from_a_classifier_to_a_jem(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ITERATIONS", "400")
    monkeypatch.setenv("OUT", str(tmp_path))
    runpy.run_path(str(ROOT / "examples" / "walkthrough.py"))
    told = capsys.readouterr().out
    gaps = [float(gap) for gap in re.findall(r"energy gap (-?[\d.]+)", told)]
    assert len(gaps) == 10 and abs(gaps[-1]) < 3
    assert float(re.search(r"JEM: ([\d.]+) %", told)[1]) > 85
    assert float(re.search(r"against uniform-noise: ([\d.]+)", told)[1]) > 0.95
    before, after = map(float, re.search(r"per pixel: ([\d.]+) noisy, ([\d.]+) cleaned", told).groups())
    assert after < before
    pictures = ["buffer-after", "buffer-before", "class-conditional", "classifier-chains", "denoised", "fresh-chains"]
    assert sorted(path.stem for path in tmp_path.iterdir()) == pictures


def test_growth_compares_where_memory_settled_with_where_it_ended(monkeypatch):
    soak = runpy.run_path(str(ROOT / "benchmarks" / "soak.py"), run_name="imported")
    loading, flat, leaking = [50] * 10, [100] * 90, list(range(100, 190))
    for memory, wanted in ((flat, (100, 100)), (leaking, (104.5, 184.5))):
        assert soak["growth"]([[minute, value] for minute, value in enumerate(loading + memory)]) == wanted
