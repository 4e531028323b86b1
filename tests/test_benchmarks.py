"""The benchmarks and examples go through and write what they promise."""

import importlib
import json
import re
import runpy

import pytest
import torch
from conftest import ROOT, TINY, generator

from sgld_nrg import train_classifier
from sgld_nrg.models import build_model, energy_of, load_model
from sgld_nrg.sgld import Langevin, run_chains

SIZES = {"buffer": 100, "fresh": 50, "long": 50, "longest": 5}
SIZES |= {"attacked": 8, "attack_steps": 2, "random_starts": 1}
SCRIPTS = [
    *(
        "benchmarks/time_to_quality.py",
        "benchmarks/sgld_speed.py",
        "benchmarks/small_checkpoint.py",
    ),
    "examples/two_moons.py",
]
PICTURES = ["buffer-after", "buffer-before", "class-conditional", "classifier-chains"]
PICTURES += ["denoised", "fresh-chains"]


@pytest.fixture
def benchmark(monkeypatch):
    """Import a benchmark by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def time_to_quality(benchmark):
    """The benchmark of quality against minutes."""
    return benchmark("time_to_quality")


@pytest.fixture
def sgld_speed(benchmark):
    """The benchmark of the Langevin step."""
    return benchmark("sgld_speed")


@pytest.fixture
def two_moons():
    """The names of the example."""
    return runpy.run_path(str(ROOT / "examples" / "two_moons.py"), run_name="imported")


@pytest.mark.slow
def test_quality_against_minutes_is_measured_for_every_variant_and_seed(
    tmp_path, time_to_quality, monkeypatch
):
    monkeypatch.setattr(time_to_quality, "POINT", {**SIZES, "long": 0})
    monkeypatch.setattr(time_to_quality, "QUICK", SIZES)
    tiny = " ".join([*TINY, "--from-scratch"])  # its epochs end it long before the minutes do
    diverging = f"diverging:{tiny} --lr 1e30 --warmup-iterations 0 --max-rollbacks 0"
    flags = ["--variant", f"scratch:{tiny}", "--variant", diverging, "--out-dir", str(tmp_path)]
    flags += ["--dataset", "digits", "--minutes", "5", "--jobs", "2", "--seeds", "1", "2"]
    flags += ["--quick", "--test"]
    time_to_quality.main(time_to_quality.parse(flags))
    found = json.loads((tmp_path / "quality.json").read_text())
    assert [run["seed"] for run in found["scratch"]] == [1, 2]
    for run in found["scratch"]:
        assert run["exit_code"] == 0 and run["points"]
        assert run["points"][-1]["iteration"] == run["test"]["iteration"]
        assert 0 < run["test"]["accuracy"] < 1
        assert {"buffer", "fresh", "long", "ood inverted", "linf 0.1"} <= set(run["test"])
    assert all(run["exit_code"] == 1 and run["test"] is None for run in found["diverging"])
    table = (tmp_path / "quality.md").read_text()
    assert "| | scratch | diverging |" in table and "±" in table
    assert "| runs that diverged | 0 of 2 | 2 of 2 |" in table
    assert (tmp_path / "quality.png").stat().st_size > 1000

    monkeypatch.setattr(time_to_quality.subprocess, "Popen", None)  # nothing is trained again
    time_to_quality.main(time_to_quality.parse([*flags, "--resume"]))
    assert json.loads((tmp_path / "quality.json").read_text()) == found


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_checkpoint_is_judged_on_the_split_that_is_named(
    part, tiny_run, checkpoint, digits, time_to_quality
):
    torch.manual_seed(0)
    network = build_model("small-cnn", 10, 1, 8, width=4, depth=3).eval()
    judged = [
        time_to_quality.judge(
            tiny_run / "jem.pt", digits, part, network, sizes, {"negative": "inverted"}
        )
        for sizes in (SIZES, {**SIZES, "long": 0})
    ]
    row, without_long_chains = judged
    split = getattr(digits, part)
    _, accuracy = train_classifier.evaluate(load_model(checkpoint, "cpu"), split)
    assert row["accuracy"] == pytest.approx(accuracy) and 0.8 < accuracy < 1
    assert row["iteration"] == checkpoint["training"]["iteration"] == 4 * 19
    assert 0 < row["minutes"] < 5 and row["rollbacks"] == 0
    assert 0 < row["ece"] < 1 and 0 <= row["ood negative"] <= 1
    for kind in ("buffer", "fresh", "long"):
        assert row[kind] > 0 and 0 <= row[f"{kind} class entropy"] <= 1
    attacked = [row["linf 0.1"], row["l2 1.5"]]
    assert all(share in [hit / 8 for hit in range(9)] for share in attacked)
    gone = {"long", "long class entropy"}
    assert without_long_chains == {name: row[name] for name in row if name not in gone}


def test_the_ends_of_runs_are_a_table_of_means_and_their_points_a_figure(tmp_path, time_to_quality):
    flags = ["--minutes", "2", "--test", "--variant", "one:", "--variant", "lost:--lr 9"]
    args = time_to_quality.parse(flags)

    def ran(accuracy, code=0):
        points = [{"minutes": minute, "accuracy": accuracy, "fresh": 2.0} for minute in (1, 2)]
        end = {"accuracy": accuracy, "fresh": 2.0}
        return {"exit_code": code, "points": points, "test": end if accuracy else None}

    found = {"one": [ran(0.75), ran(0.85)], "lost": [ran(0, 1), ran(0.5, 1)]}
    lines = time_to_quality.markdown(args, found).splitlines()
    assert lines[0].endswith("--minutes 2 --test --variant one: --variant 'lost:--lr 9'`.")
    assert lines[2] == "At the end, test set, 2 minutes:"
    assert lines[4] == "| | one | lost |" and lines[6] == "| accuracy | 0.8 ± 0.071 | – |"
    assert lines[7:] == ["| fresh | 2 ± 0 | – |", "| runs that diverged | 0 of 2 | 2 of 2 |"]
    curves = {name: [run["points"] for run in runs] for name, runs in found.items()}
    time_to_quality.save_figure(curves, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 1000


def test_a_training_that_is_recorded_is_not_repeated_unless_its_flags_changed(
    tmp_path, time_to_quality, monkeypatch
):
    class Started(Exception):
        """Stands for a training."""

    def start(*_, **__):
        raise Started

    monkeypatch.setattr(time_to_quality.subprocess, "Popen", start)
    args = time_to_quality.parse(["--minutes", "2", "--resume", "--out-dir", str(tmp_path)])
    folder = tmp_path / "runs" / "wide-seed-3"
    (folder / "points").mkdir(parents=True)
    point = folder / "points" / "0000.pt"
    point.touch()
    settings = {"dataset": "mnist", "seed": 3, "minutes": 2, "flags": "--width 9"}
    (folder / "training.json").write_text(json.dumps({"settings": settings, "exit_code": 1}))
    assert time_to_quality.train(args, "wide", "--width 9", 3, [0]) == (1, [point])
    with pytest.raises(Started):
        time_to_quality.train(args, "wide", "--width 10", 3, [0])
    assert not point.exists()


def test_the_step_is_timed_beside_the_papers_and_the_machines_limit(
    tmp_path, sgld_speed, monkeypatch
):
    monkeypatch.setitem(sgld_speed.MATRIX, "cpu", 64)
    flags = ["--networks", "small-cnn", "--batches", "2", "4", "--steps", "1", "3"]
    sgld_speed.main(sgld_speed.parse([*flags, "--rounds", "1", "--out-dir", str(tmp_path)]))
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert {(row["batch"], row["steps"]) for row in rows} == {(2, 1), (2, 3), (4, 1), (4, 3)}
    assert {"ours", "ours, float32", "the paper's"} <= {row["method"] for row in rows}
    for row in rows:
        milliseconds = 1000 * row["batch"] / row["image_steps_per_second"]
        assert row["milliseconds_per_step"] == pytest.approx(milliseconds)
        assert row["share_of_limit"] > 0
        assert row["method"] != "the paper's" or row["times_the_papers"] == 1
    assert "times the paper's" in (tmp_path / "speed.md").read_text()
    assert (tmp_path / "speed.png").stat().st_size > 1000


def test_the_papers_step_is_ours_at_its_settings(sgld_speed):
    torch.manual_seed(0)
    model = build_model("small-cnn", 10, 1, 28, width=4, depth=2, stem_stride=2)
    x = torch.rand(3, 1, 28, 28)
    torch.manual_seed(1)
    theirs = sgld_speed.paper_chains(model, x, 4)
    torch.manual_seed(1)
    energy = energy_of(model, "float32")
    ours = run_chains(energy, x, 4, Langevin(step_size=1.0, noise_std=0.01), module=model)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_runs_nothing(script, capsys):
    names = runpy.run_path(str(ROOT / script), run_name="imported")
    assert "main" in names and "parse" in names and not capsys.readouterr().out


def test_two_moons_are_soon_told_apart_and_their_density_is_normalised(tmp_path, two_moons, capsys):
    points, labels = two_moons["moons"](1000, seed=1)
    assert points.abs().max() < 1.2 and labels.bincount().tolist() == [500, 500]
    torch.manual_seed(0)
    model, buffer = two_moons["train"](points, labels, 100, generator())
    assert (model(points).argmax(1) == labels).float().mean() > 0.75
    assert buffer.images.abs().max() <= 1 and buffer.ages.max() >= 20
    grid, log_p, _ = two_moons["density"](model, side=50)
    assert grid.shape == (2500, 2)
    assert (log_p.exp().sum() * (2 / 50) ** 2).item() == pytest.approx(1, abs=1e-4)
    two_moons["draw"](model, points, labels, buffer.images, str(tmp_path / "moons.png"))
    assert (tmp_path / "moons.png").stat().st_size > 1000


@pytest.mark.slow
def test_two_moons_are_classified_and_their_density_is_learned(tmp_path, two_moons, capsys):
    flags = ["--iterations", "1000", "--out", str(tmp_path / "moons.png")]
    two_moons["main"](two_moons["parse"](flags))
    out = capsys.readouterr().out
    accuracy, likelihood, gaussian, uniform = map(float, re.findall(r"(-?\d+\.\d+)", out)[:4])
    assert accuracy > 95 and likelihood > gaussian + 0.2 > uniform
    assert (tmp_path / "moons.png").stat().st_size > 1000


def walk_through(folder, iterations, monkeypatch, capsys):
    """Run the walkthrough; return what it said and its energy gaps."""
    monkeypatch.setenv("ITERATIONS", str(iterations))
    monkeypatch.setenv("OUT", str(folder))
    runpy.run_path(str(ROOT / "examples" / "walkthrough.py"))
    assert sorted(path.stem for path in folder.iterdir()) == PICTURES
    told = capsys.readouterr().out
    gaps = [float(gap) for gap in re.findall(r"energy gap (-?[\d.]+)", told)]
    assert len(gaps) == 10
    return told, gaps


def test_the_walkthrough_goes_through_all_its_cells(tmp_path, monkeypatch, capsys):
    told, _ = walk_through(tmp_path, 10, monkeypatch, capsys)
    assert len(re.findall(r"AUROC of the energy against .*: [\d.]+", told)) == 3
    assert re.search(r"ECE [\d.]+ %", told) and re.search(
        r"read as the class asked for: \d+ %", told
    )


@pytest.mark.slow
def test_the_walkthrough_goes_from_a_classifier_to_a_jem(tmp_path, monkeypatch, capsys):
    told, gaps = walk_through(tmp_path, 400, monkeypatch, capsys)
    assert abs(gaps[-1]) < 3
    assert float(re.search(r"JEM: ([\d.]+) %", told)[1]) > 85
    assert float(re.search(r"against uniform-noise: ([\d.]+)", told)[1]) > 0.95
    found = re.search(r"per pixel: ([\d.]+) noisy, ([\d.]+) cleaned", told)
    before, after = map(float, found.groups())
    assert after < before
