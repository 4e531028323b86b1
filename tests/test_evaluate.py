"""The report, end to end on the tiny run, and out-of-distribution data of every kind."""

import csv
import json
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import generator, run
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance

from sgld_nrg.models import energy_of, joint_energy, load_model, marginal_energy, predict
from sgld_nrg.sgld import langevin_step, run_chains
from sgld_nrg.support import looks, ood, plots, sample_metrics
from sgld_nrg.support.checkpoints import langevin_from, load_checkpoint, save_checkpoint
from sgld_nrg.support.commands import parse
from sgld_nrg.support.data import TORCHVISION
from sgld_nrg.support.detector import detector_for
from sgld_nrg.support.errors import UserError
from sgld_nrg.support.judges import JUDGES, judges
from sgld_nrg.support.parallel import Alone
from sgld_nrg.support.report import (
    class_conditional,
    detection,
    long_chains,
    samples,
    study,
    unfamiliar,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def report(tiny_run, tmp_path_factory):
    """The folder that evaluate.py fills for the tiny run; among the sets an .npz of the user's."""
    folder = tmp_path_factory.mktemp("evaluation") / "report"
    own = folder.parent / "my images.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (30, 12, 12, 3), dtype=np.uint8)
    np.savez(own, images=pixels)
    control = folder.parent / "control.pt"
    save_checkpoint(control, "jem", **without_density(tiny_run / "jem.pt"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "QUICK", study.DRY_RUN)
        patch.setenv("SGLD_NRG_LOOKS", str(folder.parent / "looks.csv"))
        flags = ("--quick", "--control", control, "--ood", "uniform-noise", "inverted", own)
        run("evaluate", "--checkpoint", tiny_run / "jem.pt", "--out-dir", folder, *flags)
    return folder


def without_density(path):
    """Return a checkpoint that says that it was trained without a density."""
    state = load_checkpoint(path, "jem")
    del state["format"], state["kind"]
    return {**state, "args": {**state["args"], "p_x_weight": 0.0}}


@pytest.fixture(scope="module")
def found(report):
    """What is in report.json."""
    return json.loads((report / "report.json").read_text())


@pytest.fixture(scope="module")
def networks(digits):
    """The judges of the digits, which come with the project."""
    return judges(digits, Path("nowhere"), CPU, Alone())


@pytest.fixture
def no_figures(monkeypatch):
    """Let evaluate.py draw no figures, which takes longer than to measure."""
    monkeypatch.setattr(plots, "finish", lambda figure, path: None)


def test_the_report_has_every_section_for_both_models_with_intervals(found):
    assert list(found) == [
        "protocol",
        "classification",
        "out_of_distribution",
        "unfamiliar",
        "robustness",
        "samples",
        "class_conditional",
        "long_chains",
        "chains",
    ]
    for name in ("classifier", "control", "jem"):
        row = found["classification"][name]
        low, high = row["intervals"]["accuracy"]
        assert low <= row["accuracy"] <= high
        sets = found["out_of_distribution"]["results"][name]
        assert set(sets) == {"uniform-noise", "inverted", "my images"}
        for scores in sets.values():
            assert set(scores) == set(detection.SCORES)
    protocol = found["protocol"]
    assert protocol["sizes"]["bins"] == 15 and protocol["splits"]["test"] == 360
    for judge in JUDGES:
        kinds = {"training images", "training images with the training's noise"}
        kinds |= {"buffer", "buffer, cleaned", "fresh", "fresh, cleaned"}
        assert set(found["samples"]["judges"][judge]["kinds"]) == kinds
        assert list(found["long_chains"]["judges"][judge]["steps"]) == ["0", "10"]
    assert set(found["robustness"]["curves"]) == {"linf", "l2"}


def test_the_numbers_are_those_of_the_model(found, checkpoint, digits):
    model = load_model(checkpoint)
    logits = predict(model, digits.test.images)
    accuracy = (logits.argmax(1) == digits.test.labels).double().mean()
    assert found["classification"]["jem"]["accuracy"] == pytest.approx(accuracy.item())
    inverted, _ = ood.load_ood("inverted", digits.test.images, "unused", 50, generator())
    outside, inside = marginal_energy(predict(model, inverted)), marginal_energy(logits[:50])
    higher = (outside[None] > inside[:, None]).double().mean()
    auroc = found["out_of_distribution"]["results"]["jem"]["inverted"]["energy"]["auroc"]
    assert auroc == pytest.approx(higher.item(), abs=1e-3)


def test_the_markdown_shows_every_figure_and_no_raw_number_is_missing(report):
    text = (report / "report.md").read_text()
    figures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    pictures = {path.name for path in report.iterdir() if path.suffix == ".png"}
    assert set(figures) == pictures and len(figures) == 12
    for name in figures:
        with Image.open(report / name) as picture:
            assert picture.size[0] > 100
    assert "nan" not in text
    assert "my images: 30 images, colour, 12x12, uint8 from 0 to 255, as 1x8x8" in text


def test_a_missing_classifier_leaves_the_jem_alone_and_no_attacks_says_so(
    tiny_run, no_figures, tmp_path, monkeypatch
):
    (tmp_path / "jem.pt").write_bytes((tiny_run / "jem.pt").read_bytes())
    monkeypatch.setattr(study, "QUICK", study.DRY_RUN)
    flags = "--quick --attacks none --ood constant"
    run("evaluate", "--checkpoint", tmp_path / "jem.pt", *flags.split())
    found = json.loads((tmp_path / "report.json").read_text())
    assert list(found["classification"]) == ["jem"] and found["robustness"]["curves"] == {}
    assert "Not measured" in (tmp_path / "report.md").read_text()


def test_scores_that_are_not_finite_are_an_error_that_names_them(
    tiny_run, no_figures, monkeypatch, capsys
):
    def broken(detector, images, median):
        scores = {name: np.zeros(len(images)) for name in detection.SCORES}
        return {**scores, "energy": np.full(len(images), np.nan)}

    monkeypatch.setattr(detection, "ood_scores", broken)
    flags = "--dry-run --ood constant --attacks none"
    with pytest.raises(SystemExit) as caught:
        run("evaluate", "--checkpoint", tiny_run / "jem.pt", *flags.split())
    assert caught.value.code == 1 and "energy on constant" in capsys.readouterr().err


def test_class_conditional_chains_climb_the_logit_of_the_class_that_they_were_asked_for(checkpoint):
    model = load_model(checkpoint)
    x, labels = study.starts(checkpoint, 100, generator())
    end = study.extend(checkpoint, model, x, 20, generator(1), labels)
    before, after = (joint_energy(predict(model, images), labels) for images in (x, end))
    assert after.mean() < before.mean() - 0.5
    other = study.extend(checkpoint, model, x, 20, generator(1), (labels + 1) % 10)
    assert joint_energy(predict(model, other), labels).mean() > after.mean() + 0.5


def test_long_chains_are_one_run_whose_first_row_is_the_restart_distribution(
    tmp_path, networks, checkpoint, digits
):
    model, sizes = load_model(checkpoint), {"long_chains": 50, "longest": 30}
    seen = (digits, checkpoint, {"jem": model}, networks, ({}, {}, []), tmp_path)
    measured = long_chains.measure(study.Study(Namespace(seed=0), sizes, CPU, *seen))
    judge, rows = networks["vgg"], measured["judges"]["vgg"]
    assert list(rows["steps"]) == ["0", "10", "30"]
    source = generator(3)
    x, _ = study.starts(checkpoint, 50, source)
    reference = predict(judge.features, digits.test.images[:50])
    for steps, more in (("0", 0), ("10", 10), ("30", 20)):
        x = study.extend(checkpoint, model, x, more, source)
        distance = sample_metrics.frechet_distance(predict(judge.features, x), reference)
        row = rows["steps"][steps]
        assert row["frechet_distance"] == pytest.approx(distance)
        assert row["ratio_to_floor"] == pytest.approx(distance / rows["floor"])
        if more:
            langevin = langevin_from(checkpoint).without_noise()
            end = run_chains(energy_of(model), x, 1, langevin, module=model)
            distance = sample_metrics.frechet_distance(predict(judge.features, end), reference)
        assert row["cleaned"] == pytest.approx(distance / rows["floor"], rel=1e-3)


class FirstPixels(torch.nn.Module):
    """Stands in for Inception: five pixels of the first channel are the features."""

    num_features = 5

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        return x[:, 0].flatten(1)[:, :5].double()


def test_the_fid_is_the_frechet_distance_to_all_training_images_of_8_bits():
    source = generator()
    train, drawn = (torch.rand(n, 1, 4, 4, generator=source) * 3 - 1.5 for n in (250, 130))
    found = sample_metrics.inception_distances(
        train, {"fresh": drawn, "same": train}, FirstPixels()
    )
    first, second = (
        ((x.clamp(-1, 1) + 1) * 127.5).round().flatten(1)[:, :5].double() for x in (train, drawn)
    )
    assert found["fresh"] == pytest.approx(sample_metrics.frechet_distance(second, first), rel=1e-6)
    assert found["same"] == pytest.approx(0, abs=1e-6)


def test_a_fid_waits_for_no_other_process(monkeypatch):
    made = []

    class Watched(FrechetInceptionDistance):
        """Remembers what is made."""

        def __init__(self, *values, **settings):
            super().__init__(*values, **settings)
            made.append(self)

    monkeypatch.setattr("torchmetrics.image.fid.FrechetInceptionDistance", Watched)
    images = torch.rand(8, 1, 4, 4, generator=generator())
    sample_metrics.inception_distances(images, {"fresh": images}, FirstPixels())
    sample_metrics.frechet_distance(images.flatten(1), images.flatten(1))
    assert len(made) == 2 and not any(metric.sync_on_compute for metric in made)


def test_a_fid_without_its_weights_is_told_and_not_measured(monkeypatch, capsys):
    train = torch.zeros(4, 1, 4, 4)
    assert samples._fid(train, {"fresh": train}, wanted=False) == {}

    def offline(*_):
        raise OSError("no connection to the weights\nand more")

    monkeypatch.setattr(sample_metrics, "inception_distances", offline)
    found = samples._fid(train, {"fresh": train}, wanted=True)
    assert found == {"no_fid": "no connection to the weights"}
    assert capsys.readouterr().err == "--fid: no connection to the weights; going on without\n"
    assert samples._words_of_fid(found) == ["FID: not measured (no connection to the weights)."]
    shown = samples._words_of_fid({"images": 4, "fid": {"fresh": 12.3}})
    assert "4 images" in shown[0] and "fresh 12.30" in shown[0]
    assert samples._words_of_fid({}) == []


def test_the_floor_is_the_mean_over_eight_draws_of_as_many_training_images(networks, digits):
    judge, reference = networks["convmixer"], digits.test.images[:60]
    yardstick = study.Yardstick(judge, reference, digits.train.images)
    features = [predict(judge.features, x) for x in (reference, digits.train.images)]
    distances = []
    for draw in range(8):
        rows = torch.randperm(len(features[1]), generator=generator(draw))[:60]
        distances.append(sample_metrics.frechet_distance(features[1][rows], features[0]))
    assert yardstick.floor == pytest.approx(sum(distances) / 8, rel=1e-4)
    assert yardstick.deviation == pytest.approx(np.std(distances, ddof=1), rel=1e-3)
    found = yardstick.judge_images(digits.val.images[:60])
    assert found["deviation"] / found["ratio_to_floor"] == pytest.approx(
        yardstick.deviation / yardstick.floor
    )
    with pytest.raises(ValueError, match="59 images cannot be judged against 60"):
        yardstick.judge_images(digits.val.images[:59])


def test_samples_are_judged_against_the_floor_with_their_own_precision_and_recall(
    tmp_path, networks, checkpoint, digits, no_figures
):
    sizes = {"samples": 100, "nearest": 20}
    models = {"jem": load_model(checkpoint)}
    few = {**checkpoint, "buffer": {**checkpoint["buffer"]}}
    few["buffer"]["images"] = digits.train.images[:1].expand(200, -1, -1, -1)  # one picture
    seen = (digits, few, models, networks, ({}, {}, []), tmp_path)
    measured = samples.measure(study.Study(Namespace(seed=0, fid=False), sizes, CPU, *seen))
    for judge in measured["judges"].values():
        kinds = judge["kinds"]
        assert kinds["buffer"]["precision"] == 1 and kinds["buffer"]["recall"] < 0.2
        for row in kinds.values():
            ratio = row["frechet_distance"] / judge["floor"]
            assert row["ratio_to_floor"] == pytest.approx(ratio)
    near = measured["distance_to_nearest_training_image"]
    assert near["buffer"]["median"] < near["test images"]["smallest"]
    picture, model = digits.train.images[:1], models["jem"]
    langevin = langevin_from(checkpoint).without_noise()
    _, moved = langevin_step(energy_of(model), picture, langevin)
    far = (digits.train.images - moved).flatten(1).norm(dim=1).min()
    assert near["buffer"]["median"] == pytest.approx(float(far), rel=1e-3)  # shown cleaned
    table = next(part for part in samples.words(measured, sizes).split("\n\n") if "| --" in part)
    head, _, *rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()]
    shown = {(row[0], row[1]): dict(zip(head, row, strict=True)) for row in rows}
    row = measured["judges"]["vgg"]["kinds"]["buffer"]
    assert shown["vgg", "buffer"]["recall"] == f"{row['recall']:.3f}"
    assert shown["vgg", "buffer"]["precision"] == "1.000"
    worst = max(
        networks, key=lambda name: measured["judges"][name]["kinds"]["fresh"]["ratio_to_floor"]
    )
    assert rows[0][0] == worst  # the worse judge comes first


def test_changed_chains_start_in_another_class_and_are_counted_when_read_as_asked(
    tmp_path, checkpoint, digits, monkeypatch, no_figures
):
    asked = []

    def arrive(checkpoint, model, x, steps, source, labels):
        asked.append(labels)
        return labels.view(-1, 1, 1, 1).expand(-1, 1, 8, 8) / 10  # as if all arrived

    class Reader(torch.nn.Module):
        """Reads the class that `arrive` wrote."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x):
            read = (x[:, 0, 0, 0] * 10).round().long().clamp(0, 9)
            return torch.nn.functional.one_hot(read, 10).float()

    monkeypatch.setattr(class_conditional, "extend", arrive)
    models, sizes = {"jem": load_model(checkpoint)}, {"conditional": 200, "resamples": 10}
    seen = (digits, checkpoint, models, {"reader": Reader()}, ({}, {}, []), tmp_path)
    measured = class_conditional.measure(study.Study(Namespace(seed=0), sizes, CPU, *seen))
    own, other = asked
    assert (own != other).all() and len(set(zip(own.tolist(), other.tolist(), strict=True))) == 90
    found = measured["judges"]["reader"]
    assert found["as_asked"]["share"] == found["changed"]["share"] == 1
    assert found["of_the_starts"]["share"] < 0.5


def test_the_judge_that_fewer_changed_chains_convince_comes_first():
    def judge(share):
        row = {"share": share, "interval": [share, share]}
        own = {"share": 1.0, "interval": [1.0, 1.0]}
        return {"as_asked": own, "of_the_starts": own, "changed": row, "changed_before": own}

    found = {"chains": 10, "steps": 30, "changing_steps": 100}
    found["judges"] = {"a": judge(0.5), "b": judge(0.25), "c": judge(0.75)}
    rows = [line.split(" | ") for line in class_conditional.words(found, {}).splitlines()]
    shown = {row[0]: row[3] for row in rows if len(row) == 5}
    assert list(shown) == ["| judge", "| ---", "| b", "| a", "| c"]
    assert shown["| b"].startswith("25.00 %")


def test_the_detector_is_judged_on_the_whole_test_set_and_disturbances_one_by_one(
    tmp_path, checkpoint, digits
):
    models = {"jem": load_model(checkpoint)}
    seen = (digits, checkpoint, models, {}, ({}, {}, []), tmp_path)
    looked = study.Study(Namespace(seed=0), {"ood": 100}, CPU, *seen)
    found = unfamiliar.measure(looked)
    p_values = looked.detector("jem").p_values(digits.test.images)
    for alpha in unfamiliar.ALPHAS:
        share = (p_values <= alpha).double().mean().item()
        row = found["promises"][str(alpha)]["unfamiliar"]
        assert row["share"] == share and row["images"] == 360
        assert row["interval"][0] <= share <= row["interval"][1]
        missed = found["promises"][str(alpha)]["label_missed"]
        assert missed["share"] <= alpha + 3 * (alpha / 180) ** 0.5
    assert set(found["disturbed"]) == set(ood.DISTURBANCES)
    assert "called unfamiliar" in unfamiliar.words(found, {})


def test_disturbances_keep_shape_and_range_and_change_little(digits):
    images = digits.test.images[:40]
    for name, disturb in ood.DISTURBANCES.items():
        seen = disturb(images, generator())
        assert seen.shape == images.shape and seen.abs().max() <= 1, name
        assert torch.equal(seen, images) == (name == "none")
    thicker = ood.DISTURBANCES["thicker stroke"](images, generator())
    assert (thicker >= images).all()
    moved = ood.DISTURBANCES["shift by 1 pixel"](images, generator())
    assert torch.equal(moved[..., 1:, 1:], images[..., :-1, :-1])


def test_a_report_is_a_look_at_the_test_set_and_a_dry_run_is_none(report, tiny_run, monkeypatch):
    rows = list(csv.DictReader((report.parent / "looks.csv").open()))
    assert [row["data_set"] for row in rows] == ["digits"]
    assert rows[0]["command"].startswith("python evaluate.py --checkpoint")
    assert rows[0]["what_for"] == "report" and rows[0]["date"].startswith("20")
    monkeypatch.setenv("SGLD_NRG_LOOKS", str(report.parent / "looks.csv"))
    looks.record("python evaluate.py", Namespace(dry_run=True, given=frozenset()), "digits", "")
    looks.record("python x.py", Namespace(dry_run=False, given=frozenset()), "mnist", "to see")
    rows = list(csv.DictReader((report.parent / "looks.csv").open()))
    assert [row["data_set"] for row in rows] == ["digits", "mnist"]


def test_a_look_that_cannot_be_written_ends_no_run(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SGLD_NRG_LOOKS", str(tmp_path / "file" / "looks.csv"))
    looks.record("python x.py", Namespace(dry_run=False, given=frozenset()), "mnist", "to see")
    assert "this look is not counted" in capsys.readouterr().err


def test_a_control_with_a_density_is_refused(tiny_run, capsys):
    flags = ("--control", tiny_run / "jem.pt", "--dry-run")
    with pytest.raises(SystemExit) as caught:
        run("evaluate", "--checkpoint", tiny_run / "jem.pt", *flags)
    assert caught.value.code == 2 and "--p-x-weight 0" in capsys.readouterr().err


def test_the_gradient_norm_is_that_of_the_energy(checkpoint, digits):
    model = load_model(checkpoint)
    x = digits.test.images[:5].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(marginal_energy(model(x)).sum(), x)
    detector = detector_for(model, digits)
    scores = detection.ood_scores(detector, digits.test.images[:5], median=-3.0)
    norms = gradient.flatten(1).norm(dim=1).numpy()
    np.testing.assert_allclose(scores["grad_norm"], norms, rtol=1e-4)
    probabilities = model(x).softmax(1).amax(1).detach().numpy()
    np.testing.assert_allclose(scores["max_prob"], -probabilities, rtol=1e-4)
    np.testing.assert_allclose(scores["typicality"], np.abs(scores["energy"] + 3), rtol=1e-6)
    np.testing.assert_allclose(scores["detector"], detector.scores(digits.test.images[:5]))


@pytest.mark.parametrize("name", ood.GENERATED)
def test_generated_sets_have_the_models_shape_and_range_and_are_repeatable(name, digits):
    test = digits.test.images
    images, again = (ood.load_ood(name, test, "unused", 20, generator(3))[0] for _ in range(2))
    assert images.shape == (20, 1, 8, 8) and images.min() >= -1 and images.max() <= 1
    assert torch.equal(images, again)


def test_generated_sets_are_what_their_names_say(digits):
    images, source = digits.test.images[:2], generator()
    assert torch.equal(ood.GENERATED["inverted"](images, source), -images)
    turned = ood.GENERATED["rotated"](images, source)
    assert torch.equal(turned[0, 0, :, 0], images[0, 0, 0].flip(0))
    assert (ood.GENERATED["constant"](images, source).flatten(1).std(1) == 0).all()
    permuted = ood.GENERATED["permuted"](images, source)
    assert torch.equal(permuted.flatten(1).sort(1).values, images.flatten(1).sort(1).values)
    assert not torch.equal(permuted, images)


@pytest.mark.parametrize(
    "name, folder, stem",
    [
        ("fashion-mnist", "FashionMNIST", "t10k"),
        ("kmnist", "KMNIST", "t10k"),
        ("emnist-letters", "EMNIST", "emnist-letters-test"),
    ],
)
def test_torchvisions_sets_are_read_from_their_files_the_right_way_up(
    name, folder, stem, digits, tmp_path
):
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    picture = np.zeros((28, 28), np.uint8)
    picture[:7] = 255  # a bar at the top
    stored = picture.T if folder == "EMNIST" else picture
    for part in (stem, "train"):  # MNIST's kin want all four files
        images = np.array([2051, 5, 28, 28], ">i4").tobytes() + np.stack([stored] * 5).tobytes()
        labels = np.array([2049, 5], ">i4").tobytes() + bytes([1, 2, 3, 4, 5])
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    images, words = ood.load_ood(name, digits.test.images, tmp_path, 2, generator())
    assert images.shape == (2, 1, 8, 8) and words == "grey, 28x28, uint8 from 0 to 255, as 1x8x8"
    assert (images[:, :, 0] > 0.9).all() and (images[:, :, 4:] < -0.9).all()


def test_without_names_a_data_set_is_not_told_from_itself(digits, monkeypatch):
    asked = []
    load = lambda name, *_: asked.append(name) or (digits.test.images[:20], "")  # noqa: E731
    monkeypatch.setattr(ood, "load_ood", load)
    args = parse("evaluate", [])
    assert args.ood is None
    detection.ood_sets(digits._replace(name="kmnist"), args, 20, CPU)
    known = [*ood.GENERATED, *TORCHVISION]
    assert asked == [name for name in known if name != "kmnist"] and len(asked) > 10


def test_sets_that_are_ambiguous_or_not_there_are_refused_with_what_to_do(digits, tmp_path):
    np.savez(tmp_path / "two.npz", a=np.zeros((3, 8, 8)), b=np.zeros((3, 8, 8)))
    images = digits.test.images
    with pytest.raises(UserError, match=r"two\.npz"):
        ood.load_ood(str(tmp_path / "two.npz"), images, "unused", 100, generator())
    with pytest.raises(UserError, match="--download"):
        ood.load_ood("svhn", images, tmp_path, 100, generator())


def test_a_classifier_of_another_data_set_is_refused(tiny_run, tmp_path, capsys):
    state = load_checkpoint(tiny_run / "classifier.pt", "classifier")
    state = {**state, "dataset": "mnist"}
    del state["format"], state["kind"]
    other = tmp_path / "other.pt"
    save_checkpoint(other, "classifier", **state)
    flags = ("--classifier", other, "--dry-run")
    with pytest.raises(SystemExit) as caught:
        run("evaluate", "--checkpoint", tiny_run / "jem.pt", *flags)
    assert caught.value.code == 2 and "trained on mnist" in capsys.readouterr().err
