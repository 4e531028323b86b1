"""The report, end to end on the tiny run, and out-of-distribution data of every kind that users bring."""

import argparse
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import chain_quality
import cli
import data
import evaluate
import measurements
import metrics
import runs
import train_classifier
from cli import UserError
from models import energy, joint_energy, predict


@pytest.fixture(scope="module")
def report(tiny_run, tmp_path_factory):
    """The folder that evaluate.py fills for the tiny run, with an .npz of the user's among the sets."""
    folder = tmp_path_factory.mktemp("evaluation") / "report"
    own = folder.parent / "my images.npz"
    np.savez(own, images=np.random.default_rng(0).integers(0, 256, (30, 12, 12, 3), dtype=np.uint8))
    before = evaluate.QUICK
    evaluate.QUICK = evaluate.DRY_RUN
    try:
        sets = ["uniform-noise", "inverted", str(own)]
        evaluate.main(["--checkpoint", str(tiny_run / "jem.pt"), "--quick", "--out-dir", str(folder), "--ood", *sets])
    finally:
        evaluate.QUICK = before
    return folder


def test_the_report_has_every_section_for_both_models_with_intervals(report):
    found = json.loads((report / "report.json").read_text())
    assert list(found) == [
        "protocol", "classification", "out_of_distribution", "robustness", "distal_adversarials", "samples",
        "class_conditional", "long_chains", "chains",
    ]  # fmt: skip
    for name in ("jem", "classifier"):
        row = found["classification"][name]
        low, high = row["intervals"]["accuracy"]
        assert low <= row["accuracy"] <= high
        assert set(found["out_of_distribution"]["results"][name]) == {"uniform-noise", "inverted", "my images"}
        for scores in found["out_of_distribution"]["results"][name].values():
            assert set(scores) == set(measurements.SCORES)
    assert found["protocol"]["sizes"]["bins"] == 15 and found["protocol"]["splits"]["test"] == 360
    assert set(found["samples"]["kinds"]) == {"training images", "buffer", "fresh", "test images"}
    assert set(found["robustness"]["curves"]) == {"linf", "l2"}
    assert list(found["long_chains"]["steps"]) == ["0", "10"]


def test_the_numbers_are_those_of_the_model(report, tiny_run, digits):
    found = json.loads((report / "report.json").read_text())
    model = runs.load_model(runs.load_checkpoint(tiny_run / "jem.pt", "jem"), "cpu")
    logits = predict(model, digits.test.images)
    accuracy = (logits.argmax(1) == digits.test.labels).double().mean()
    assert found["classification"]["jem"]["accuracy"] == pytest.approx(accuracy.item())
    inverted, _ = data.load_ood("inverted", digits.test.images, "unused", 50, torch.Generator().manual_seed(0))
    higher = energy(predict(model, inverted))[None] > energy(logits)[:, None]
    auroc = found["out_of_distribution"]["results"]["jem"]["inverted"]["energy"]["auroc"]
    assert auroc == pytest.approx(higher.double().mean().item(), abs=1e-3)


def test_the_markdown_shows_every_figure_and_no_raw_number_is_missing(report):
    text = (report / "report.md").read_text()
    figures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    pictures = {path.name for path in report.iterdir() if path.suffix == ".png"}
    assert set(figures) == pictures and len(figures) == 14
    for name in figures:
        with Image.open(report / name) as picture:
            assert picture.size[0] > 100
    assert "nan" not in text and "30 images, colour averaged to grey, resized from 12x12" in text


def test_one_folder_keeps_a_feature_classifier_for_each_data_set(report, digits):
    place = report / "feature-classifier-digits" / "classifier.pt"
    written = place.stat().st_mtime_ns
    chain_quality.feature_network(digits, report, torch.device("cpu"))
    assert place.stat().st_mtime_ns == written  # the finished one is used again
    assert runs.load_checkpoint(place, "classifier")["dataset"] == "digits"


def test_the_network_that_judges_samples_does_not_follow_the_preset(tmp_path, digits, monkeypatch):
    found = []
    monkeypatch.setattr(train_classifier, "train", lambda args, *_: found.append(vars(args)) or {})
    monkeypatch.setattr(runs, "load_model", lambda *_: None)
    chain_quality.feature_network(digits, tmp_path, torch.device("cpu"))
    changed = {"width": 8, "depth": 3, "batch_size": 32, "lr": 0.5, "warmup_steps": 7, "ema_decay": 0.5, "input_noise": 0.5}
    monkeypatch.setitem(cli.PRESETS, "digits", {**cli.PRESETS["digits"], **changed})
    chain_quality.feature_network(digits, tmp_path, torch.device("cpu"))
    assert found[0] == found[1]


def test_a_missing_classifier_leaves_the_jem_alone_and_no_attacks_says_so(tiny_run, tmp_path, monkeypatch):
    (tmp_path / "jem.pt").write_bytes((tiny_run / "jem.pt").read_bytes())
    monkeypatch.setattr(evaluate, "QUICK", evaluate.DRY_RUN)
    evaluate.main(["--checkpoint", str(tmp_path / "jem.pt"), "--quick", "--attacks", "none", "--ood", "constant"])
    found = json.loads((tmp_path / "report.json").read_text())
    assert list(found["classification"]) == ["jem"] and found["robustness"]["curves"] == {}
    assert "Not measured" in (tmp_path / "report.md").read_text()


def test_scores_that_are_not_finite_are_an_error_that_names_them(tiny_run, tmp_path, monkeypatch, capsys):
    def broken(model, images):
        return {"energy": np.full(len(images), np.nan), "max_prob": np.zeros(len(images)), "grad_norm": np.zeros(len(images))}

    monkeypatch.setattr(measurements, "ood_scores", broken)
    with pytest.raises(SystemExit) as caught:
        evaluate.main(["--checkpoint", str(tiny_run / "jem.pt"), "--dry-run", "--ood", "constant", "--attacks", "none"])
    assert caught.value.code == 1 and "jem energy on constant" in capsys.readouterr().err


def test_class_conditional_chains_climb_the_logit_of_the_class_that_they_were_asked_for(checkpoint, digits):
    model = runs.load_model(checkpoint, "cpu")
    x, labels = chain_quality.starts(checkpoint, 100, torch.Generator().manual_seed(0))
    end = chain_quality.extend(checkpoint, model, x, 20, torch.Generator().manual_seed(1), labels)
    before, after = (joint_energy(predict(model, images), labels) for images in (x, end))
    assert after.mean() < before.mean() - 0.5
    other = chain_quality.extend(checkpoint, model, x, 20, torch.Generator().manual_seed(1), (labels + 1) % 10)
    assert joint_energy(predict(model, other), labels).mean() > after.mean() + 0.5


def test_long_chains_are_one_run_whose_first_row_is_the_restart_distribution(report, checkpoint, digits):
    model, sizes = runs.load_model(checkpoint, "cpu"), {"long_chains": 50, "longest": 30}
    args, network = argparse.Namespace(seed=0), chain_quality.feature_network(digits, report, torch.device("cpu"))
    found = chain_quality.long_chains(checkpoint, model, network, digits, args, sizes, report, torch.device("cpu"))
    assert list(found["steps"]) == ["0", "10", "30"]
    generator = torch.Generator().manual_seed(3)
    x, _ = chain_quality.starts(checkpoint, 50, generator)
    reference = predict(network.features, digits.test.images)
    for steps, more in (("0", 0), ("10", 10), ("30", 20)):
        x = chain_quality.extend(checkpoint, model, x, more, generator)
        distance = metrics.frechet_distance(predict(network.features, x), reference)
        assert found["steps"][steps]["frechet_distance"] == pytest.approx(distance)
        assert found["steps"][steps]["ratio_to_floor"] == pytest.approx(distance / found["floor"])


def test_the_gradient_norm_is_that_of_the_energy(checkpoint, digits):
    model = runs.load_model(checkpoint, "cpu")
    x = digits.test.images[:5].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(energy(model(x)).sum(), x)
    found = measurements.ood_scores(model, digits.test.images[:5])
    np.testing.assert_allclose(found["grad_norm"], gradient.flatten(1).norm(dim=1).numpy(), rtol=1e-4)
    np.testing.assert_allclose(found["max_prob"], -model(x).softmax(1).amax(1).detach().numpy(), rtol=1e-4)


@pytest.mark.parametrize("name", data.GENERATED)
def test_generated_sets_have_the_models_shape_and_range_and_are_repeatable(name, digits):
    draw = lambda: data.load_ood(name, digits.test.images, "unused", 20, torch.Generator().manual_seed(3))[0]  # noqa: E731
    images = draw()
    assert images.shape == (20, 1, 8, 8) and images.min() >= -1 and images.max() <= 1
    assert torch.equal(images, draw())


def test_generated_sets_are_what_their_names_say(digits):
    images, generator = digits.test.images[:2], torch.Generator().manual_seed(0)
    assert torch.equal(data.GENERATED["inverted"](images, generator), -images)
    assert torch.equal(data.GENERATED["rotated"](images, generator)[0, 0, :, 0], images[0, 0, 0].flip(0))
    assert (data.GENERATED["constant"](images, generator).flatten(1).std(1) == 0).all()
    permuted = data.GENERATED["permuted"](images, generator)
    assert torch.equal(permuted.flatten(1).sort(1).values, images.flatten(1).sort(1).values) and not torch.equal(
        permuted, images
    )


@pytest.mark.parametrize(
    "array",
    [
        np.full((5, 8, 8), 51, np.uint8), np.full((5, 1, 8, 8), 0.2, np.float32), np.full((5, 8, 8, 3), 51, np.uint8),
        np.full((5, 3, 16, 16), 0.2), np.full((5, 30, 20), 51, np.int64),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_arrays_of_any_layout_are_brought_to_the_models_shape(array, suffix, digits, tmp_path):
    path = tmp_path / f"bilder ü{suffix}"
    np.save(path, array) if suffix == ".npy" else np.savez(path, array)
    images, words = data.load_ood(str(path), digits.test.images, "unused", 100, torch.Generator())
    assert images.shape == (5, 1, 8, 8) and words
    torch.testing.assert_close(images, torch.full_like(images, -0.6))


def test_a_folder_of_images_of_unequal_sizes_is_read_and_resized(digits, tmp_path):
    for index, (mode, size) in enumerate([("L", (8, 8)), ("RGB", (20, 10)), ("RGBA", (40, 40)), ("P", (9, 9))]):
        Image.new(mode, size).save(tmp_path / f"{index}.png")
    (tmp_path / "notes.txt").write_text("no image")
    images, words = data.load_ood(str(tmp_path), digits.test.images, "unused", 100, torch.Generator())
    assert images.shape == (4, 1, 8, 8) and (images <= -0.99).all() and "read as grey" in words and "resized" in words


@pytest.mark.parametrize("name, folder, stem", [
    ("fashion-mnist", "FashionMNIST", "t10k"), ("kmnist", "KMNIST", "t10k"),
    ("emnist-letters", "EMNIST", "emnist-letters-test"),
])  # fmt: skip
def test_torchvisions_sets_are_read_from_their_files_the_right_way_up(name, folder, stem, digits, tmp_path):
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    picture = np.zeros((28, 28), np.uint8)
    picture[:7] = 255  # a bar at the top
    stored = picture.T if folder == "EMNIST" else picture
    for part in (stem, "train"):  # MNIST's kin want all four files
        images, labels = raw / f"{part}-images-idx3-ubyte", raw / f"{part}-labels-idx1-ubyte"
        images.write_bytes(np.array([2051, 3, 28, 28], ">i4").tobytes() + np.stack([stored] * 3).tobytes())
        labels.write_bytes(np.array([2049, 3], ">i4").tobytes() + bytes([1, 2, 3]))
    images, words = data.load_ood(name, digits.test.images, tmp_path, 2, torch.Generator().manual_seed(0))
    assert images.shape == (2, 1, 8, 8) and "resized from 28x28" in words
    assert (images[:, :, 0] > 0.9).all() and (images[:, :, 4:] < -0.9).all()


def test_without_names_a_data_set_is_not_told_from_itself(digits, monkeypatch):
    asked = []
    monkeypatch.setattr(data, "load_ood", lambda name, *rest: asked.append(name) or (digits.test.images[:20], ""))
    args = argparse.Namespace(ood=None, seed=0, data_dir="unused", download=False)
    kmnist = digits._replace(name="kmnist")
    measurements.ood_sets(kmnist, args, {"ood": 20}, torch.device("cpu"))
    assert asked == [name for name in [*data.GENERATED, *data.TORCHVISION] if name != "kmnist"] and len(asked) > 10


def test_unusable_sets_are_refused_with_what_to_do(digits, tmp_path):
    np.save(tmp_path / "flat.npy", np.zeros((3, 4)))
    np.save(tmp_path / "nan.npy", np.full((3, 8, 8), np.nan))
    np.save(tmp_path / "range.npy", np.full((3, 8, 8), -4.0))
    np.save(tmp_path / "objects.npy", np.array([{}, {}]), allow_pickle=True)
    np.savez(tmp_path / "two.npz", a=np.zeros((3, 8, 8)), b=np.zeros((3, 8, 8)))
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    names = ["flat.npy", "nan.npy", "range.npy", "objects.npy", "two.npz", "text.npz", "empty", "broken", "missing"]
    for name in names:
        with pytest.raises(UserError, match=name):
            data.load_ood(str(tmp_path / name), digits.test.images, "unused", 100, torch.Generator())
    with pytest.raises(UserError, match="--download"):
        data.load_ood("svhn", digits.test.images, tmp_path, 100, torch.Generator())


def test_a_classifier_of_another_data_set_is_refused(tiny_run, tmp_path, capsys):
    state = runs.load_checkpoint(tiny_run / "classifier.pt", "classifier")
    runs.save_checkpoint(tmp_path / "other.pt", **{**{k: v for k, v in state.items() if k != "format"}, "dataset": "mnist"})
    with pytest.raises(SystemExit) as caught:
        evaluate.main(["--checkpoint", str(tiny_run / "jem.pt"), "--classifier", str(tmp_path / "other.pt"), "--dry-run"])
    assert caught.value.code == 2 and "trained on mnist" in capsys.readouterr().err
