"""The report, end to end on the tiny run, and out-of-distribution data of every kind."""

import json
import re
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import generator, run
from PIL import Image

from sgld_nrg import evaluate, train_classifier
from sgld_nrg.models import joint_energy, load_model, marginal_energy, predict
from sgld_nrg.support import ood, plots, sample_metrics
from sgld_nrg.support.checkpoints import load_checkpoint, save_checkpoint
from sgld_nrg.support.commands import parse
from sgld_nrg.support.data import TORCHVISION
from sgld_nrg.support.errors import UserError
from sgld_nrg.support.parallel import Alone
from sgld_nrg.support.parser import plain
from sgld_nrg.support.presets import PRESETS
from sgld_nrg.support.report import detection, long_chains, study

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def report(tiny_run, tmp_path_factory):
    """The folder that evaluate.py fills for the tiny run; among the sets an .npz of the user's."""
    folder = tmp_path_factory.mktemp("evaluation") / "report"
    own = folder.parent / "my images.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (30, 12, 12, 3), dtype=np.uint8)
    np.savez(own, images=pixels)
    train = train_classifier.train

    def for_two_epochs(args, *rest, **more):
        args.epochs = 2
        return train(args, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "QUICK", study.DRY_RUN)
        patch.setattr(train_classifier, "train", for_two_epochs)
        flags = ("--quick", "--ood", "uniform-noise", "inverted", own)
        run("evaluate", "--checkpoint", tiny_run / "jem.pt", "--out-dir", folder, *flags)
    return folder


@pytest.fixture(scope="module")
def found(report):
    """What is in report.json."""
    return json.loads((report / "report.json").read_text())


@pytest.fixture(scope="module")
def network(report, digits):
    """The independent classifier that the report trained."""
    return evaluate.feature_network(digits, report, CPU, Alone())


@pytest.fixture
def prepared(network, monkeypatch):
    """Let evaluate.py train no network and draw no figures, which takes longer than to measure."""
    monkeypatch.setattr(evaluate, "feature_network", lambda *_: network)
    monkeypatch.setattr(plots, "finish", lambda figure, path: None)


def test_the_report_has_every_section_for_both_models_with_intervals(found):
    assert list(found) == [
        "protocol",
        "classification",
        "out_of_distribution",
        "robustness",
        "samples",
        "class_conditional",
        "long_chains",
        "chains",
    ]
    for name in ("jem", "classifier"):
        row = found["classification"][name]
        low, high = row["intervals"]["accuracy"]
        assert low <= row["accuracy"] <= high
        sets = found["out_of_distribution"]["results"][name]
        assert set(sets) == {"uniform-noise", "inverted", "my images"}
        for scores in sets.values():
            assert set(scores) == set(detection.SCORES)
    protocol = found["protocol"]
    assert protocol["sizes"]["bins"] == 15 and protocol["splits"]["test"] == 360
    kinds = {"training images", "buffer", "fresh", "test images"}
    assert set(found["samples"]["kinds"]) == kinds
    assert set(found["robustness"]["curves"]) == {"linf", "l2"}
    assert list(found["long_chains"]["steps"]) == ["0", "10"]


def test_the_numbers_are_those_of_the_model(found, checkpoint, digits):
    model = load_model(checkpoint)
    logits = predict(model, digits.test.images)
    accuracy = (logits.argmax(1) == digits.test.labels).double().mean()
    assert found["classification"]["jem"]["accuracy"] == pytest.approx(accuracy.item())
    inverted, _ = ood.load_ood("inverted", digits.test.images, "unused", 50, generator())
    outside, inside = marginal_energy(predict(model, inverted)), marginal_energy(logits)
    higher = (outside[None] > inside[:, None]).double().mean()
    auroc = found["out_of_distribution"]["results"]["jem"]["inverted"]["energy"]["auroc"]
    assert auroc == pytest.approx(higher.item(), abs=1e-3)


def test_the_markdown_shows_every_figure_and_no_raw_number_is_missing(report):
    text = (report / "report.md").read_text()
    figures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    pictures = {path.name for path in report.iterdir() if path.suffix == ".png"}
    assert set(figures) == pictures and len(figures) == 13
    for name in figures:
        with Image.open(report / name) as picture:
            assert picture.size[0] > 100
    assert "nan" not in text
    assert "my images: 30 images, colour, 12x12, uint8 from 0 to 255, as 1x8x8" in text


def test_one_folder_keeps_a_feature_classifier_for_each_data_set(report, digits):
    place = report / "feature-classifier-digits" / "classifier.pt"
    written = place.stat().st_mtime_ns
    evaluate.feature_network(digits, report, CPU, Alone())
    assert place.stat().st_mtime_ns == written  # the finished one is used again
    assert load_checkpoint(place, "classifier")["dataset"] == "digits"


def test_the_network_that_judges_samples_does_not_follow_the_preset(tmp_path, digits, monkeypatch):
    used = []
    train = lambda args, *_, **__: used.append(plain(args)) or {}  # noqa: E731
    monkeypatch.setattr(train_classifier, "train", train)
    monkeypatch.setattr(evaluate, "load_model", lambda *_: None)
    evaluate.feature_network(digits, tmp_path, CPU, Alone())
    changed = {"width": 8, "depth": 3, "batch_size": 32, "lr": 0.5, "warmup_iterations": 7}
    changed |= {"ema_decay": 0.5, "input_noise": 0.5}
    assert changed.keys() <= PRESETS["digits"].keys()
    monkeypatch.setitem(PRESETS, "digits", {**PRESETS["digits"], **changed})
    evaluate.feature_network(digits, tmp_path, CPU, Alone())
    assert used[0] == used[1]


def test_a_missing_classifier_leaves_the_jem_alone_and_no_attacks_says_so(
    tiny_run, prepared, tmp_path, monkeypatch
):
    (tmp_path / "jem.pt").write_bytes((tiny_run / "jem.pt").read_bytes())
    monkeypatch.setattr(study, "QUICK", study.DRY_RUN)
    flags = "--quick --attacks none --ood constant"
    run("evaluate", "--checkpoint", tmp_path / "jem.pt", *flags.split())
    found = json.loads((tmp_path / "report.json").read_text())
    assert list(found["classification"]) == ["jem"] and found["robustness"]["curves"] == {}
    assert "Not measured" in (tmp_path / "report.md").read_text()


def test_scores_that_are_not_finite_are_an_error_that_names_them(
    tiny_run, prepared, monkeypatch, capsys
):
    def broken(model, images):
        scores = {name: np.zeros(len(images)) for name in detection.SCORES}
        return {**scores, "energy": np.full(len(images), np.nan)}

    monkeypatch.setattr(detection, "ood_scores", broken)
    flags = "--dry-run --ood constant --attacks none"
    with pytest.raises(SystemExit) as caught:
        run("evaluate", "--checkpoint", tiny_run / "jem.pt", *flags.split())
    assert caught.value.code == 1 and "jem energy on constant" in capsys.readouterr().err


def test_class_conditional_chains_climb_the_logit_of_the_class_that_they_were_asked_for(checkpoint):
    model = load_model(checkpoint)
    x, labels = study.starts(checkpoint, 100, generator())
    end = study.extend(checkpoint, model, x, 20, generator(1), labels)
    before, after = (joint_energy(predict(model, images), labels) for images in (x, end))
    assert after.mean() < before.mean() - 0.5
    other = study.extend(checkpoint, model, x, 20, generator(1), (labels + 1) % 10)
    assert joint_energy(predict(model, other), labels).mean() > after.mean() + 0.5


def test_long_chains_are_one_run_whose_first_row_is_the_restart_distribution(
    tmp_path, network, checkpoint, digits
):
    model, sizes = load_model(checkpoint), {"long_chains": 50, "longest": 30}
    seen = (digits, checkpoint, {"jem": model}, network, ({}, {}, []), tmp_path)
    measured = long_chains.measure(study.Study(Namespace(seed=0), sizes, CPU, *seen))
    assert list(measured["steps"]) == ["0", "10", "30"]
    source = generator(3)
    x, _ = study.starts(checkpoint, 50, source)
    reference = predict(network.features, digits.test.images)
    for steps, more in (("0", 0), ("10", 10), ("30", 20)):
        x = study.extend(checkpoint, model, x, more, source)
        distance = sample_metrics.frechet_distance(predict(network.features, x), reference)
        row = measured["steps"][steps]
        assert row["frechet_distance"] == pytest.approx(distance)
        assert row["ratio_to_floor"] == pytest.approx(distance / measured["floor"])


def test_the_gradient_norm_is_that_of_the_energy(checkpoint, digits):
    model = load_model(checkpoint)
    x = digits.test.images[:5].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(marginal_energy(model(x)).sum(), x)
    scores = detection.ood_scores(model, digits.test.images[:5])
    norms = gradient.flatten(1).norm(dim=1).numpy()
    np.testing.assert_allclose(scores["grad_norm"], norms, rtol=1e-4)
    probabilities = model(x).softmax(1).amax(1).detach().numpy()
    np.testing.assert_allclose(scores["max_prob"], -probabilities, rtol=1e-4)


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
