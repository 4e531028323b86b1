"""The benchmarks and examples go through and write what they promise."""

import csv
import importlib
import json
import re
import runpy
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, generator

from sgld_nrg import train_classifier
from sgld_nrg.models import build_model, energy_of, load_model, marginal_energy, predict
from sgld_nrg.sgld import Langevin, run_chains
from sgld_nrg.support import metrics
from sgld_nrg.support.detector import Detector
from sgld_nrg.support.judges import judges
from sgld_nrg.support.parallel import Alone
from sgld_nrg.support.presets import FRESH_STEPS
from sgld_nrg.support.report.robustness import attack
from sgld_nrg.support.report.study import Yardstick, cleaned, extend, fresh_chains

SIZES = {"samples": 60, "longest": FRESH_STEPS + 5, "attacked": 30, "attack_steps": 2}
SHORT = {**SIZES, "longest": 0}  # no long chains
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
    monkeypatch.setattr(time_to_quality, "POINT", SHORT)
    monkeypatch.setattr(time_to_quality, "QUICK", SIZES)
    monkeypatch.setenv("SGLD_NRG_LOOKS", str(tmp_path / "looks.csv"))
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
        assert {"buffer vgg", "long convmixer", "ood inverted", "linf"} <= set(run["test"])
    assert all(run["exit_code"] == 1 and run["test"] is None for run in found["diverging"])
    table = (tmp_path / "quality.md").read_text()
    assert "| | scratch | diverging |" in table and "±" in table
    assert "| runs that diverged | 0 of 2 | 2 of 2 |" in table
    assert (tmp_path / "quality.png").stat().st_size > 1000
    (look,) = csv.DictReader((tmp_path / "looks.csv").open())  # the trainings do not look
    assert look["data_set"] == "digits" and look["what_for"] == "time to quality"
    assert look["command"].startswith("python benchmarks/time_to_quality.py --dataset digits")

    monkeypatch.setattr(time_to_quality, "subprocess", None)  # nothing is trained again
    time_to_quality.main(time_to_quality.parse([*flags, "--resume"]))
    assert json.loads((tmp_path / "quality.json").read_text()) == found


@pytest.fixture(scope="module")
def networks(digits):
    """The judges of the digits, which come with the project."""
    return judges(digits, Path("nowhere"), torch.device("cpu"), Alone())


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_checkpoint_is_judged_on_the_split_that_is_named(
    part, tiny_run, checkpoint, digits, networks, time_to_quality
):
    path, split = tiny_run / "jem.pt", getattr(digits, part)
    row = time_to_quality.judge(path, digits, part, networks, SIZES, {"negative": "inverted"})
    model = load_model(checkpoint).eval()
    _, accuracy = train_classifier.evaluate(model, split)
    assert row["accuracy"] == pytest.approx(accuracy) and 0.8 < accuracy < 1
    assert row["ece"] == metrics.calibration(predict(model, split.images), split.labels)["ece"]
    assert row["iteration"] == checkpoint["training"]["iteration"] == 4 * 19
    assert 0 < row["minutes"] < 5 and row["rollbacks"] == 0

    source = generator()
    fresh = fresh_chains(checkpoint, model, 60, FRESH_STEPS, source)
    buffer = checkpoint["buffer"]["images"]
    buffer = buffer[torch.randperm(len(buffer), generator=generator())[:60]]
    kinds = {"buffer": buffer, "fresh": fresh, "long": extend(checkpoint, model, fresh, 5, source)}
    kinds["cleaned"] = cleaned(checkpoint, model, fresh, source)
    for name, network in networks.items():
        yardstick = Yardstick(network, split.images[:60], digits.train.images)
        for kind, images in kinds.items():
            found = yardstick.judge_images(images)
            assert row[f"{kind} {name}"] == pytest.approx(found["ratio_to_floor"], rel=1e-3)
            for score in ("deviation", "precision", "recall", "entropy"):
                assert row[f"{kind} {name} {score}"] == pytest.approx(found[score], rel=1e-3)

    inside, outside, chains = (
        marginal_energy(predict(model, x)) for x in (split.images, -split.images, buffer)
    )
    assert row["energy gap"] == pytest.approx(float(chains.mean() - inside.mean()), rel=1e-4)
    above = (outside[:, None] > inside).double().mean().item()
    assert row["ood negative"] == pytest.approx(above, abs=1e-3) and abs(above - 0.5) > 0.05
    detector = Detector.from_state(model, checkpoint["detector"])
    inside, outside = (detector.scores(x) for x in (split.images, -split.images))
    above = (outside[:, None] > inside).double().mean().item()
    assert row["ood negative, detector"] == pytest.approx(above, abs=1e-3) and above > 0.8

    x, labels = (values[:30] for values in split)
    settings = {"seed": 0, "attack_steps": 2, "random_starts": 1, "targets": 2}
    for norm, radius in {"linf": 0.1, "l2": 1.5}.items():
        whole, half = (
            attack(model, model, x, labels, norm, epsilon, **settings)["accuracy"]
            for epsilon in (radius, radius / 2)
        )
        assert row[norm] == whole < half


def test_without_long_chains_or_a_detector_their_numbers_alone_are_missing(
    tmp_path, tiny_run, digits, networks, time_to_quality
):
    state = torch.load(tiny_run / "jem.pt", weights_only=True)
    del state["detector"]  # as before the end of a training
    torch.save(state, tmp_path / "jem.pt")
    paths, sets = (tiny_run / "jem.pt", tmp_path / "jem.pt"), {"negative": "inverted"}
    rows = [
        time_to_quality.judge(path, digits, "val", networks, sizes, sets)
        for path, sizes in zip(paths, (SIZES, SHORT), strict=True)
    ]
    whole, less = rows
    assert less == {
        name: whole[name]
        for name in whole
        if not name.startswith("long ") and not name.endswith(", detector")
    }
    assert len(whole) == len(less) + 2 * 5 + 1


@pytest.mark.parametrize("test", [False, True])
def test_points_are_judged_on_the_validation_split_and_the_end_where_it_is_to_be(
    test, tmp_path, tiny_run, digits, networks, time_to_quality
):
    kmnist, path = tmp_path / "kmnist.npz", tiny_run / "jem.pt"
    np.savez(kmnist, images=np.random.default_rng(0).integers(0, 256, (20, 8, 8), np.uint8))
    flags = ["--dataset", "digits", "--kmnist", str(kmnist), *["--test"] * test]
    args, threads = time_to_quality.parse(flags), torch.get_num_threads()
    try:
        found = time_to_quality.measure(args, 0, (SHORT, SIZES), ({"seed": 3}, [path, path]))
        assert torch.get_num_threads() == 1  # at least
    finally:
        torch.set_num_threads(threads)
    part = "test" if test else "val"
    assert list(found) == ["seed", "points", part] and found["seed"] == 3
    known = {"rotated": "rotated", "inverted": "inverted"}
    point = time_to_quality.judge(path, digits, "val", networks, SHORT, known)
    assert found["points"] == [pytest.approx(point, rel=1e-3)] * 2
    sets = {**known, "kmnist": str(kmnist)} if test else known
    end = time_to_quality.judge(path, digits, part, networks, SIZES, sets)
    assert found[part] == pytest.approx(end, rel=1e-3)
    nothing = time_to_quality.measure(args, threads, (SHORT, SIZES), ({"seed": 3}, []))
    assert nothing == {"seed": 3, "points": [], part: None}


def test_the_ends_of_runs_are_a_table_of_means_and_their_points_a_figure(tmp_path, time_to_quality):
    flags = ["--minutes", "2", "--test", "--variant", "one:", "--variant", "lost:--lr 9"]
    args = time_to_quality.parse(flags)

    def ran(accuracy, code=0):
        end = {"accuracy": accuracy, "fresh vgg": 2.0}
        points = [{"minutes": minute, **end} for minute in (1, 2)]
        return {"exit_code": code, "points": points, "test": end if accuracy else None}

    found = {"one": [ran(0.75), ran(0.85)], "lost": [ran(0, 1), ran(0.5, 1)]}
    lines = time_to_quality.markdown(args, found).splitlines()
    assert lines[0].endswith("--minutes 2 --test --variant one: --variant 'lost:--lr 9'`.")
    assert lines[2] == "At the end, test set, 2 minutes; recipes are chosen by vgg:"
    assert lines[4] == "| | one | lost |" and lines[6] == "| accuracy | 0.8 ± 0.071 | – |"
    assert lines[7:] == ["| fresh vgg | 2 ± 0 | – |", "| runs that diverged | 0 of 2 | 2 of 2 |"]
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
    go_on = threading.Event()
    assert time_to_quality.train(args, "wide", "--width 9", 3, [0], go_on) == (1, [point])
    with pytest.raises(Started):
        time_to_quality.train(args, "wide", "--width 10", 3, [0], go_on)
    assert not point.exists()


def test_a_training_that_is_stopped_ends_and_is_not_recorded(tmp_path, time_to_quality):
    args = time_to_quality.parse(["--dataset", "digits", "--out-dir", str(tmp_path)])
    stop = threading.Event()
    stop.set()
    code, kept = time_to_quality.train(args, "long", "", 0, [0], stop)
    assert code != 0 and kept == []
    assert not (tmp_path / "runs" / "long-seed-0" / "training.json").exists()


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
